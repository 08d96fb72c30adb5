"""Records, tokens and addresses against anything that hypothesis thinks of."""

from __future__ import annotations

from dataclasses import replace

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from mesh.dht.addresses import pack_neighbour, unpack_neighbours
from mesh.dht.datagrams import Codec
from mesh.errors import ConfigurationError, ProtocolError
from mesh.identity import Identity
from mesh.join import decode_token, encode_token, issue
from mesh.limits import MAX_RECORD
from mesh.network import Network
from mesh.records import (
    WorkerRecord,
    catalogue_key,
    model_key,
    open_catalogue,
    open_record,
    sign_catalogue,
    sign_record,
    unpack,
)

NOW = 1_800_000_000.0
WORKER = Identity(b"w" * 32)
NETWORKS = st.sampled_from([Network(), Network("home", b"s" * 32)])
TEXT = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=40)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(max_size=64),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)
RECORDS = st.builds(
    WorkerRecord,
    node_id=st.just(WORKER.id),
    seq=st.integers(1, 2**53 - 1),
    expires=st.integers(int(NOW) + 1, int(NOW) + 930),
    addresses=st.lists(TEXT, max_size=3).map(tuple),
    model=TEXT,
    digest=st.binary(min_size=16, max_size=16),
    health=st.integers(0, 100),
    slots=st.integers(0, 1 << 16),
    context=st.integers(0, 1 << 31),
    generation_speed=st.floats(0, 1e5).map(round),
    prompt_speed=st.floats(0, 1e5).map(round),
    flags=st.frozensets(TEXT, max_size=2),
    software=TEXT,
)


@given(RECORDS, NETWORKS)
def test_what_is_signed_can_be_opened(record: WorkerRecord, network: Network) -> None:
    key = model_key(network, record.model)
    try:
        blob = sign_record(record, WORKER, network, key)
    except ConfigurationError as error:
        assert "512" in str(error)
        return
    assert len(blob) <= MAX_RECORD
    assert open_record(blob, network, key, NOW) == record


@given(st.binary(max_size=600), NETWORKS)
def test_random_bytes_are_no_record(blob: bytes, network: Network) -> None:
    for open_it in (
        lambda: open_record(blob, network, b"k" * 20, NOW),
        lambda: open_catalogue(blob, network, NOW),
        lambda: unpack(blob),
        lambda: Codec(network).decode(blob),
        lambda: unpack_neighbours(blob),
    ):
        try:
            open_it()
        except ProtocolError:
            continue


@given(ANYTHING, NETWORKS)
def test_a_signed_body_of_any_shape_is_opened_or_refused(body: object, network: Network) -> None:
    for key in (b"k" * 20, catalogue_key(network)):
        array = msgpack.packb([1, key, WORKER.id, 1, int(NOW) + 60, body])
        blob = array + WORKER.sign(b"qmesh/record/1" + array)
        for open_it in (
            lambda blob=blob, key=key: open_record(blob, network, key, NOW),
            lambda blob=blob: open_catalogue(blob, network, NOW),
        ):
            try:
                open_it()
            except ProtocolError:
                continue


@given(RECORDS, st.integers(0, MAX_RECORD), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(record: WorkerRecord, position: int, flip: int) -> None:
    network = Network()
    key = model_key(network, "m")
    small = replace(record, addresses=(), flags=frozenset())
    blob = bytearray(sign_record(small, WORKER, network, key))
    blob[position % len(blob)] ^= flip
    try:
        open_record(bytes(blob), network, key, NOW)
    except ProtocolError:
        return
    raise AssertionError("a changed record was accepted")


@given(st.lists(st.tuples(TEXT, st.integers(0, 1 << 32)), max_size=6), NETWORKS)
def test_catalogues_survive(listing: list[tuple[str, int]], network: Network) -> None:
    try:
        blob = sign_catalogue(listing, 1, int(NOW) + 60, WORKER, network)
    except ConfigurationError:
        return
    assert open_catalogue(blob, network, NOW) == (WORKER.id, 1, tuple(listing))


@given(
    TEXT,
    st.none() | st.binary(min_size=32, max_size=32),
    st.lists(TEXT, min_size=1, max_size=8),
    st.binary(min_size=8, max_size=8),
)
def test_tokens_survive(name: str, secret: bytes | None, addresses: list[str], invitation_id: bytes) -> None:
    try:
        network = Network(name, secret)
    except ConfigurationError:
        return
    invitation = issue(network, WORKER.id, tuple(addresses), int(NOW) + 1, invitation_id)
    assert decode_token(encode_token(invitation)) == invitation


@given(st.text(max_size=80).map(lambda text: "qmesh1" + text))
def test_a_garbled_token_is_a_configuration_error(text: str) -> None:
    try:
        decode_token(text)
    except ConfigurationError:
        return
    raise AssertionError("a garbled token was accepted")


@given(
    st.lists(
        st.tuples(st.binary(min_size=20, max_size=20), st.ip_addresses().map(str), st.integers(1, 65535))
    )
)
def test_neighbours_survive(neighbours: list[tuple[bytes, str, int]]) -> None:
    from mesh.dht.addresses import normal

    packed = b"".join(pack_neighbour(i, (host, port)) for i, host, port in neighbours)
    assert unpack_neighbours(packed) == [(i, (normal(host), port)) for i, host, port in neighbours]
