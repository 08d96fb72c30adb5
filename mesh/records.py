"""Signed records: what a worker says of itself on the mesh, and the keys it says it under.

A record is ``array ‖ signature``, at most 512 bytes. The array is msgpack
``[1, key, node_id, seq, expires, body]``; the signature is Ed25519 over ``b"qmesh/record/1" ‖ array``
by ``node_id``. `key` (20 bytes) is signed too, so a record of one key is worthless under another.
The body of a model's record is the array of `WorkerRecord`'s last ten fields; the body of a catalogue
record is an array of ``[model name, workers]``. In a private mesh the body is sealed
(XChaCha20-Poly1305) with a key derived from the network secret.

Pure: the caller passes `now` in unix seconds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from mesh.errors import AuthenticationError, ConfigurationError, MalformedMessage, ReplayError
from mesh.identity import NODE_ID_SIZE, SIGNATURE_SIZE, Identity, NodeId, dht_id, verify
from mesh.limits import MAX_RECORD, MAX_RECORD_LIFETIME, RECORD_CLOCK_SKEW
from mesh.network import Network

Listing = tuple[tuple[str, int], ...]
"""Model names, each with the number of workers it is thought to have."""

KEY_SIZE: Final = 20
DIGEST_SIZE: Final = 16
MAX_DEPTH: Final = 16
"""Prefix bits of the deepest shard: 65,536 shards of a model."""
CATALOGUE_SHARDS: Final = 16
_VERSION: Final = 1
_SIGNATURE_DOMAIN: Final = b"qmesh/record/1"
"""Keeps a signature over a record from passing for one over anything else."""
_NONCE_SIZE: Final = 24
_MAX_ADDRESSES: Final = 8
_MAX_TEXT: Final = 255
_MAX_SEQ: Final = 1 << 53


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One model on one worker.

    `seq` is unix milliseconds and strictly rises, `expires` unix seconds; `addresses` are
    ``host:port`` (IPv6 in brackets) or ``relay_id@host:port``, the preferred first; `digest` is the
    first 16 bytes of the GGUF's SHA-256; `health` 0 (serves nothing) to 100; `context` in tokens per
    slot; speeds in tokens/s as measured, 0 where unknown.
    """

    node_id: NodeId
    seq: int
    expires: int
    addresses: tuple[str, ...]
    model: str
    digest: bytes
    health: int
    slots: int
    context: int
    generation_speed: float
    prompt_speed: float
    flags: frozenset[str]
    software: str


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """A verified record with the bytes that prove it."""

    record: WorkerRecord
    blob: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """The verified outside of a record; `body` is still packed, and sealed in a private mesh."""

    key: bytes
    node_id: NodeId
    seq: int
    expires: int
    body: Any


def shard_prefix(node_id: bytes, depth: int) -> bytes:
    """The first `depth` bits of BLAKE2b(node id), in whole bytes with the rest of the bits zero."""
    size = (depth + 7) // 8
    value = int.from_bytes(dht_id(node_id)[:size])
    return (value >> (8 * size - depth) << (8 * size - depth)).to_bytes(size)


def model_key(network: Network, model: str, depth: int = 0, prefix: bytes = b"") -> bytes:
    """Where the workers of a model are found: one key, or one of 2^depth shards of it.

    `prefix` is the shard's `shard_prefix`. In a private mesh the hash is keyed with the secret.
    """
    if not 0 <= depth <= MAX_DEPTH or len(prefix) != (depth + 7) // 8:
        raise ValueError(f"a shard of depth {depth} has no prefix of {len(prefix)} bytes")
    return _key(network, b"qmesh/1/model" + network.name.encode() + model.encode() + bytes([depth]) + prefix)


def catalogue_key(network: Network, shard: int | None = None) -> bytes:
    """Where the names of the mesh's models are found: all of few, or the shard of many (`catalogue_shard`)."""
    tail = b"" if shard is None else bytes([shard])
    return _key(network, b"qmesh/1/catalogue" + network.name.encode() + tail)


def catalogue_shard(model: str) -> int:
    """Which of the catalogue's shards a model is listed in: the first 4 bits of BLAKE2b-8(its name)."""
    return hashlib.blake2b(model.encode(), digest_size=1).digest()[0] >> 4


def _key(network: Network, data: bytes) -> bytes:
    secret = network.derive(b"qmesh-key") or b""
    return hashlib.blake2b(data, digest_size=KEY_SIZE, key=secret).digest()


def sign_record(record: WorkerRecord, identity: Identity, network: Network, key: bytes) -> bytes:
    """The bytes of a worker's record under `key`.

    Raises ValueError where the record is another node's, ConfigurationError where it does not fit
    into 512 bytes or holds a value that readers refuse.
    """
    body = [
        list(record.addresses),
        record.model,
        record.digest,
        record.health,
        record.slots,
        record.context,
        float(record.generation_speed),
        float(record.prompt_speed),
        sorted(record.flags),
        record.software,
    ]
    try:
        _worker(Envelope(key, record.node_id, record.seq, record.expires, body), body)
    except MalformedMessage as error:
        raise ConfigurationError(f"the record of {record.model[:80]!r} is not valid: {error}", "") from error
    return _sign(identity, network, key, (record.node_id, record.seq, record.expires), body)


def open_record(blob: bytes, network: Network, key: bytes, now: float) -> WorkerRecord:
    """The worker's record in `blob`, verified for `key` at `now` (unix seconds).

    Raises MalformedMessage, AuthenticationError (signature, key or seal), ReplayError (expired, or
    from the far future).
    """
    envelope = open_envelope(blob, key, now)
    return _worker(envelope, _open_body(envelope, network))


def sign_catalogue(
    listing: Iterable[tuple[str, int]],
    seq: int,
    expires: int,
    identity: Identity,
    network: Network,
    shard: int | None = None,
) -> bytes:
    """The catalogue record that lists (model name, workers that it is thought to have), of one shard or none.

    Raises ConfigurationError where they do not fit.
    """
    body = [[name, workers] for name, workers in listing]
    return _sign(identity, network, catalogue_key(network, shard), (identity.id, seq, expires), body)


def open_catalogue(
    blob: bytes, network: Network, now: float, shard: int | None = None
) -> tuple[NodeId, int, Listing]:
    """(node id, seq, listing) of a verified catalogue record. Raises as `open_record`."""
    envelope = open_envelope(blob, catalogue_key(network, shard), now)
    body = _open_body(envelope, network)
    if not isinstance(body, list) or not all(isinstance(item, list) and len(item) >= 2 for item in body):
        raise MalformedMessage("a catalogue is a list of names with numbers")
    listing = tuple((_text(item[0], "model name"), _integer(item[1], 1 << 32, "workers")) for item in body)
    return envelope.node_id, envelope.seq, listing


def open_envelope(blob: bytes, key: bytes, now: float) -> Envelope:
    """The verified outside of a record; what a holder needs, who need not understand the body.

    Raises as `open_record`.
    """
    if not SIGNATURE_SIZE < len(blob) <= MAX_RECORD:
        raise MalformedMessage(f"a record has {SIGNATURE_SIZE} to {MAX_RECORD} bytes, this one {len(blob)}")
    array, signature = blob[:-SIGNATURE_SIZE], blob[-SIGNATURE_SIZE:]
    match unpack(array):
        case [
            int(version),
            bytes(signed_key),
            bytes(node_id),
            int(seq),
            int(expires),
            list() | bytes() as body,
        ] if version == _VERSION and len(node_id) == NODE_ID_SIZE and 0 < seq < _MAX_SEQ:
            pass
        case _:
            raise MalformedMessage("not a record of version 1")
    if signed_key != key:
        raise AuthenticationError("the record was made for another key")
    if expires <= now:
        raise ReplayError("the record has expired")
    if expires > now + MAX_RECORD_LIFETIME + RECORD_CLOCK_SKEW:
        raise ReplayError("the record expires too far in the future")
    if not verify(node_id, _SIGNATURE_DOMAIN + array, signature):
        raise AuthenticationError("the record's signature is wrong")
    return Envelope(key, NodeId(node_id), seq, expires, body)


def unpack(data: bytes) -> Any:
    """Strict msgpack without maps and extensions; no length beyond the data's own.

    Raises MalformedMessage.
    """
    size = len(data)
    try:
        return msgpack.unpackb(
            data, max_str_len=size, max_bin_len=size, max_array_len=size, max_map_len=0, max_ext_len=0
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedMessage("not valid msgpack") from error


def _sign(
    identity: Identity, network: Network, key: bytes, head: tuple[NodeId, int, int], body: list[Any]
) -> bytes:
    node_id, seq, expires = head
    if node_id != identity.id:
        raise ValueError("a record is signed by its own node")
    packed = _pack(body)
    sealed = _seal(network, key, head, packed)
    array = _pack([_VERSION, key, node_id, seq, expires, body if sealed is None else sealed])
    blob = array + identity.sign(_SIGNATURE_DOMAIN + array)
    if len(blob) > MAX_RECORD:
        raise ConfigurationError(
            f"the worker's record has {len(blob)} bytes, {MAX_RECORD} are allowed",
            "Give the model a shorter name or advertise fewer addresses.",
        )
    return blob


def _pack(value: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(value, use_single_float=True)
    return packed


def _seal(network: Network, key: bytes, head: tuple[NodeId, int, int], packed: bytes) -> bytes | None:
    secret = network.derive(b"qmesh-record")
    if secret is None:
        return None
    # The nonce is a keyed hash of all that is sealed: it repeats only when everything does.
    nonce = hashlib.blake2b(_pack([key, *head]) + packed, digest_size=_NONCE_SIZE, key=secret).digest()
    return nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(packed, key + head[0], nonce, secret)


def _open_body(envelope: Envelope, network: Network) -> Any:
    secret = network.derive(b"qmesh-record")
    if secret is None:
        if isinstance(envelope.body, bytes):
            raise AuthenticationError("the record is sealed for a private mesh")
        return envelope.body
    if not isinstance(envelope.body, bytes) or len(envelope.body) <= _NONCE_SIZE:
        raise AuthenticationError("the record is not sealed for this private mesh")
    nonce, sealed = envelope.body[:_NONCE_SIZE], envelope.body[_NONCE_SIZE:]
    try:
        packed = crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed, envelope.key + envelope.node_id, nonce, secret
        )
    except (CryptoError, ValueError) as error:
        raise AuthenticationError("the record is sealed with another network secret") from error
    return unpack(packed)


def _worker(envelope: Envelope, body: Any) -> WorkerRecord:
    if not isinstance(body, list) or len(body) < 10:
        raise MalformedMessage("a worker's body has ten fields")
    # Further fields are a later version's: ignored.
    addresses, model, digest, health, slots, context, generation, prompt, flags, software = body[:10]
    if not isinstance(digest, bytes) or len(digest) != DIGEST_SIZE:
        raise MalformedMessage(f"a model digest has {DIGEST_SIZE} bytes")
    return WorkerRecord(
        node_id=envelope.node_id,
        seq=envelope.seq,
        expires=envelope.expires,
        addresses=tuple(_texts(addresses, _MAX_ADDRESSES, "addresses")),
        model=_text(model, "model name"),
        digest=digest,
        health=_integer(health, 100, "health"),
        slots=_integer(slots, 1 << 16, "slots"),
        context=_integer(context, 1 << 31, "context"),
        generation_speed=_speed(generation),
        prompt_speed=_speed(prompt),
        flags=frozenset(_texts(flags, 16, "flags")),
        software=_text(software, "software"),
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_TEXT or not value.isprintable():
        raise MalformedMessage(f"the {what} is not a printable text of 1 to {_MAX_TEXT} characters")
    return value


def _texts(value: Any, most: int, what: str) -> list[str]:
    if not isinstance(value, list) or len(value) > most:
        raise MalformedMessage(f"the {what} are not a list of at most {most}")
    return [_text(item, what) for item in value]


def _integer(value: Any, most: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise MalformedMessage(f"{what} is not an integer from 0 to {most}")
    return value


def _speed(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise MalformedMessage("a speed is not a number of tokens per second")
    return round(float(value), 2)
