"""Every cap and deadline of the protocol, by name. Sizes in bytes, times in seconds."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
DEFAULT_PORT: Final = 9470

# Handshake
HANDSHAKE_TIMEOUT: Final = 5.0
MAX_HANDSHAKE_MESSAGE: Final = 1024
"""Nothing larger is buffered before a peer has authenticated."""
MAX_HALF_OPEN: Final = 256
MAX_HALF_OPEN_PER_NETWORK: Final = 16
"""Half-open connections per /24 (IPv4) or /64 (IPv6); loopback is exempt, the total is not."""
MAX_CONNECTIONS: Final = 4096
MAX_CONNECTIONS_PER_PEER: Final = 8

# Frames
MAX_FRAME: Final = 65_535
"""Ciphertext with its tag, so that a u16 length holds it."""
TAG_SIZE: Final = 16
MAX_PLAINTEXT: Final = MAX_FRAME - TAG_SIZE
MAX_DATA: Final = 16_384
"""Body bytes of one DATA message."""
REKEY_AFTER_FRAMES: Final = 1 << 20

# msgpack
MAX_META_DEPTH: Final = 16
MAX_META_ITEMS: Final = 4096
MAX_TEXT: Final = 256
"""Characters of a method, of an error message or of a user agent."""
MAX_TOKEN: Final = 32
"""Bytes of a PING's token."""

# Streams
INITIAL_CREDIT: Final = 65_536
MAX_CREDIT: Final = 4 << 20
"""The most unread credit that a receiver may have granted on one stream."""
MAX_CONNECTION_CREDIT: Final = 16 << 20
"""What all streams of one connection together may have above their initial credit."""
GATHER: Final = 0.001
"""Seconds between two frames of a connection whose streams have nothing but more of their bodies to send, and
for which a head waits for its body."""
SEND_BUFFER: Final = 65_536
"""A sender waits while its stream has more than this queued."""
MAX_STREAMS: Final = 1024
"""Streams that one side may have open on one connection."""
MAX_SID: Final = (1 << 31) - 1
MAX_PENDING_PONGS: Final = 16
"""Answers owed to a peer that sends PINGs and does not read; older ones are dropped."""
MAX_BODY: Final = 32 << 20
"""A request body, held by the worker until its answer ends."""
CREDIT_DEADLINE: Final = 30.0
"""A stream without credit for this long is reset and its generation cancelled."""
WRITE_HIGH_WATER: Final = 256 << 10
"""Bytes queued in a socket before the writer waits."""
READ_BUFFER: Final = 256 << 10
"""Bytes read from a socket at once; one buffer serves all connections of a thread."""
MESSAGES_PER_TURN: Final = 32
"""What one connection may have done before all others have had their turn."""
CLOSE_TIMEOUT: Final = 2.0
"""What is still queued when a connection is closed has this long to leave."""
CONNECT_STAGGER: Final = 0.25
"""The next address of a peer is tried when the last one has not answered for this long (RFC 8305)."""

# Liveness
PING_AFTER_IDLE: Final = 15.0
DEAD_AFTER_IDLE: Final = 45.0
RESET_BURST: Final = 100.0
RESETS_PER_SECOND: Final = 10.0

# Records
MAX_RECORD: Final = 512
MAX_RECORD_LIFETIME: Final = 15 * 60
RECORD_CLOCK_SKEW: Final = 30
RECORD_TTL: Final = 180.0
ANNOUNCE_INTERVAL: Final = 60.0
MIN_ANNOUNCE_INTERVAL: Final = 10.0
MAX_RECORDS_PER_KEY: Final = 64

# Datagrams
MAX_DATAGRAM: Final = 1200
MAX_AMPLIFICATION: Final = 3
"""A reply to an asker without a valid token is at most this many times its request."""
