"""The worked example of docs/protocol.md: a whole session with fixed keys.

`python -m tests.protocol_example` prints the block; a test compares it with the page.
"""

from __future__ import annotations

import msgpack

from mesh.frames import (
    Credit,
    Data,
    End,
    GoAway,
    Head,
    Message,
    Open,
    Ping,
    Pong,
    encode,
    prefix_length,
)
from mesh.handshake import WHOIS_REQUEST, Initiator, Responder, announce_invitation, whois_reply
from mesh.identity import Identity
from mesh.join import encode_token, issue
from mesh.network import Network
from mesh.noise import CipherState

CALLER = Identity(bytes([0x11]) * 32)
NODE = Identity(bytes([0x22]) * 32)
EPHEMERALS = (bytes([0x33]) * 32, bytes([0x44]) * 32)
SECRET = bytes([0x55]) * 32
WHOIS_NONCE = bytes([0x66]) * 24
INVITATION_ID = bytes([0x77]) * 8
NOW = 1_800_000_000_000


class Writer:
    """Collects the lines of the example."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def value(self, name: str, data: bytes) -> None:
        """A value in hex, wrapped."""
        digits = data.hex()
        parts = [digits[start : start + 64] for start in range(0, len(digits), 64)] or [""]
        for number, part in enumerate(parts):
            self.lines.append(f"{name if number == 0 else '':28}{part}".rstrip())

    def note(self, text: str) -> None:
        """A line of explanation."""
        self.lines += ["", f"# {text}"]

    def frame(self, arrow: str, cipher: CipherState, messages: list[Message]) -> None:
        """A frame: its messages, its plaintext, and the bytes on the wire."""
        number = cipher.nonce
        plaintext = b"".join(map(encode, messages))
        self.note(f"{arrow}, frame {number}: " + ", ".join(type(one).__name__.upper() for one in messages))
        for one in messages:
            self.value("message", encode(one))
        self.value("on the wire", prefix_length(cipher.encrypt(plaintext)))


def session(network: Network, *, frames: bool) -> list[str]:
    """The lines of one session: its opening, and the frames that follow."""
    out = Writer()
    initiator = Initiator(CALLER, network, NODE.id, ephemeral=EPHEMERALS[0], user_agent="example/1")
    responder = Responder(NODE, network, ephemeral=EPHEMERALS[1], user_agent="qmesh/0.1.0")
    out.lines += [f"# network name: {network.name}" + ("" if network.private else " (open mesh)")]
    if network.secret is not None:
        out.value("network secret", network.secret)
        out.value("psk", network.psk or b"")
        out.value("whois key", network.derive(b"qmesh-whois") or b"")
    out.value("prologue", network.prologue)
    for name, identity, ephemeral in (
        ("caller", CALLER, EPHEMERALS[0]),
        ("node", NODE, EPHEMERALS[1]),
    ):
        out.value(f"{name}: Ed25519 seed", identity.seed)
        out.value(f"{name}: id", identity.id)
        out.value(f"{name}: X25519 secret", identity.transport_secret)
        out.value(f"{name}: X25519 public", identity.transport_public)
        out.value(f"{name}: ephemeral secret", ephemeral)
    out.note("caller -> node: asks for the node id")
    out.value("on the wire", WHOIS_REQUEST)
    out.note("node -> caller: tells it" + (f" (nonce {WHOIS_NONCE.hex()})" if network.private else ""))
    out.value("on the wire", whois_reply(network, NODE.id, WHOIS_NONCE))

    first = initiator.message_1(NOW)
    out.note("caller -> node: Noise message 1")
    payload = {"v": 1, "id": CALLER.id, "ua": "example/1", "t": NOW}
    out.value("payload", msgpack.packb(payload))
    out.value("on the wire", first)
    peer = responder.message_1(first[2:])
    second, at_node = responder.message_2(peer, NOW + 5)
    out.note("node -> caller: Noise message 2")
    hello = {"v": 1, "ua": "qmesh/0.1.0", "t": NOW + 5, "max_streams": 1024, "window": 65_536}
    out.value("payload", msgpack.packb(hello))
    out.value("on the wire", second)
    at_caller = initiator.message_2(second[2:], NOW + 9)
    out.note("the keys that follow")
    out.value("handshake hash", initiator._noise.handshake_hash)
    out.value("caller -> node key", at_caller.send._key)
    out.value("node -> caller key", at_node.send._key)
    if frames:
        exchange(out, at_caller.send, at_node.send)
    return out.lines


def exchange(out: Writer, caller: CipherState, node: CipherState) -> None:
    """A request, its answer and the goodbye."""
    meta = {"path": "/v1/completions", "model": "qmesh-demo", "deadline_ms": 60_000}
    body = b'{"prompt":"Once","stream":true}'
    out.frame(
        "caller -> node",
        caller,
        [Ping(1), Open(1, "infer", meta), Data(1, body), End(1, {})],
    )
    answer = b'data: {"choices":[{"text":" upon"}]}\n\n'
    head = {
        "status": 200,
        "content_type": "text/event-stream",
        "worker": NODE.id,
        "model": "qmesh-demo",
        "digest": bytes(range(16)),
        "queue_ms": 0,
    }
    load = {"slots": 4, "busy": 1, "queue": 0, "health": 93}
    out.frame("node -> caller", node, [Pong(1, load), Head(1, head), Data(1, answer)])
    out.frame("caller -> node", caller, [Credit(1, len(answer))])
    usage = {"completion_tokens": 2, "prompt_tokens": 2, "total_tokens": 4}
    last: list[Message] = [Data(1, b"data: [DONE]\n\n"), End(1, {"usage": usage, "load": load})]
    out.frame("node -> caller", node, last)
    out.frame("caller -> node", caller, [GoAway(0, 7, "done")])
    caller.rekey()
    out.note("the caller's key if it rekeyed now (it would after 2^20 frames)")
    out.value("caller -> node key", caller._key)


def admission(network: Network) -> list[str]:
    """How a guest opens the door with the node's invitation: token, announcement, message 1, secret."""
    out = Writer()
    invitation = issue(network, NODE.id, ("192.0.2.1:9470",), NOW // 1000 + 86_400, INVITATION_ID)
    ticket = invitation.ticket
    assert ticket is not None
    out.lines += [f"# an invitation of the same node into the same private network: {network.name}"]
    out.value("invitation root", network.derive(b"qmesh-invite") or b"")
    out.value("invitation id", ticket.id)
    out.value("invitation key", ticket.key)
    out.value("psk", invitation.door.psk or b"")
    token = encode_token(invitation)
    for start in range(0, len(token), 64):
        out.lines.append(f"{'' if start else 'token':28}{token[start : start + 64]}")
    initiator = Initiator(CALLER, invitation.door, NODE.id, ephemeral=EPHEMERALS[0], user_agent="example/1")
    responder = Responder(NODE, invitation.door, ephemeral=EPHEMERALS[1], user_agent="qmesh/0.1.0")
    out.note("caller -> node: names the invitation; Noise message 1 right behind it")
    out.value("on the wire", announce_invitation(ticket.id))
    first = initiator.message_1(NOW)
    out.value("on the wire", first)
    second, at_node = responder.message_2(responder.message_1(first[2:]), NOW + 5)
    out.note("node -> caller: Noise message 2")
    out.value("on the wire", second)
    at_caller = initiator.message_2(second[2:], NOW + 9)
    out.frame("caller -> node", at_caller.send, [Ping(1), Open(1, "join", {}), End(1, {})])
    last: list[Message] = [Pong(1, {}), End(1, {"secret": network.secret}), GoAway(1, 7, "admitted")]
    out.frame("node -> caller", at_node.send, last)
    return out.lines


def block() -> str:
    """The sessions as they stand in the page."""
    private = Network("example", SECRET)
    parts = (session(private, frames=True), session(Network(), frames=False), admission(private))
    return "\n\n".join("\n".join(["```", *lines, "```"]) for lines in parts)


if __name__ == "__main__":
    print(block())
