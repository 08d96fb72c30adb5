"""Signed records: what is accepted, what is refused and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgpack
import pytest

from mesh.errors import AuthenticationError, ConfigurationError, MalformedMessage, ReplayError
from mesh.identity import Identity, dht_id
from mesh.limits import MAX_RECORD
from mesh.network import Network
from mesh.records import (
    CATALOGUE_SHARDS,
    WorkerRecord,
    catalogue_key,
    catalogue_shard,
    model_key,
    open_catalogue,
    open_envelope,
    open_record,
    shard_prefix,
    sign_catalogue,
    sign_record,
)

NOW = 1_800_000_000.0
OPEN = Network()
PRIVATE = Network("home", b"s" * 32)
WORKER = Identity(b"w" * 32)


def make_record(**changes: object) -> WorkerRecord:
    record = WorkerRecord(
        node_id=WORKER.id,
        seq=int(NOW * 1000),
        expires=int(NOW) + 180,
        addresses=("203.0.113.5:9470", "[2001:db8::1]:9470"),
        model="qmesh-demo",
        digest=b"d" * 16,
        health=87,
        slots=4,
        context=4096,
        generation_speed=33.25,
        prompt_speed=410.5,
        flags=frozenset({"embeddings"}),
        software="qmesh/0.1.0",
    )
    return replace(record, **changes)  # type: ignore[arg-type]  # tests name the fields


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
def test_a_record_survives_the_round_trip(network: Network) -> None:
    record = make_record()
    key = model_key(network, record.model)
    blob = sign_record(record, WORKER, network, key)
    assert len(blob) <= MAX_RECORD
    assert open_record(blob, network, key, NOW) == record


def test_the_layout_is_the_documented_one() -> None:
    record = make_record()
    key = model_key(OPEN, record.model)
    blob = sign_record(record, WORKER, OPEN, key)
    version, signed_key, node_id, seq, expires, body = msgpack.unpackb(blob[:-64])
    assert (version, signed_key, node_id, seq, expires) == (1, key, WORKER.id, record.seq, record.expires)
    assert body[:6] == [list(record.addresses), "qmesh-demo", b"d" * 16, 87, 4, 4096]
    assert blob[-64:] == WORKER.sign(b"qmesh/record/1" + blob[:-64])


def test_a_private_record_shows_nothing_to_an_outsider() -> None:
    key = model_key(PRIVATE, "qmesh-demo")
    blob = sign_record(make_record(), WORKER, PRIVATE, key)
    assert b"qmesh-demo" not in blob
    assert b"203.0.113.5" not in blob
    for outsider in (OPEN, Network("home"), Network("home", b"x" * 32)):
        assert model_key(outsider, "qmesh-demo") != key
        with pytest.raises(AuthenticationError, match=r"private|secret"):
            open_record(blob, outsider, key, NOW)


def test_an_open_record_is_refused_in_a_private_mesh() -> None:
    key = model_key(PRIVATE, "qmesh-demo")
    blob = sign_record(make_record(), WORKER, OPEN, key)
    with pytest.raises(AuthenticationError, match="not sealed"):
        open_record(blob, PRIVATE, key, NOW)


def test_a_record_is_worthless_under_another_key() -> None:
    blob = sign_record(make_record(), WORKER, OPEN, model_key(OPEN, "qmesh-demo"))
    with pytest.raises(AuthenticationError, match="another key"):
        open_record(blob, OPEN, model_key(OPEN, "other"), NOW)


@pytest.mark.parametrize("position", [0, 5, 30, 60, 120, -65, -64, -1])
def test_one_changed_byte_is_refused(position: int) -> None:
    key = model_key(OPEN, "qmesh-demo")
    blob = bytearray(sign_record(make_record(), WORKER, OPEN, key))
    blob[position] ^= 1
    with pytest.raises((AuthenticationError, MalformedMessage)):
        open_record(bytes(blob), OPEN, key, NOW)


def test_times_out_of_range_are_refused() -> None:
    key = model_key(OPEN, "qmesh-demo")
    for expires, reason in ((int(NOW), "expired"), (int(NOW) + 931, "future")):
        blob = sign_record(make_record(expires=expires), WORKER, OPEN, key)
        with pytest.raises(ReplayError, match=reason):
            open_record(blob, OPEN, key, NOW)
    blob = sign_record(make_record(expires=int(NOW) + 930), WORKER, OPEN, key)
    assert open_record(blob, OPEN, key, NOW).expires == int(NOW) + 930


def test_a_record_is_signed_by_its_own_node() -> None:
    with pytest.raises(ValueError, match="own node"):
        sign_record(make_record(), Identity(), OPEN, model_key(OPEN, "qmesh-demo"))


def test_what_does_not_fit_is_refused_before_it_is_sent() -> None:
    too_long = tuple(f"very-long-host-name-number-{i}.example.org:9470" for i in range(8))
    record = make_record(addresses=too_long, model="m" * 200)
    with pytest.raises(ConfigurationError, match="512"):
        sign_record(record, WORKER, OPEN, model_key(OPEN, record.model))


@pytest.mark.parametrize(
    "changes",
    [
        {"health": 101},
        {"health": -1},
        {"digest": b"short"},
        {"model": ""},
        {"model": "a\nb"},
        {"addresses": tuple("a:1" for _ in range(9))},
        {"generation_speed": float("nan")},
        {"slots": 1 << 20},
    ],
)
def test_values_that_readers_refuse_are_not_signed(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        sign_record(make_record(**changes), WORKER, OPEN, model_key(OPEN, "qmesh-demo"))


@pytest.mark.parametrize(
    "array",
    [
        [1],
        [2, b"k" * 20, WORKER.id, 1, int(NOW) + 9, []],
        [1, b"k" * 20, b"short", 1, int(NOW) + 9, []],
        [1, b"k" * 20, WORKER.id, -1, int(NOW) + 9, []],
        [1, b"k" * 20, WORKER.id, 1 << 60, int(NOW) + 9, []],
        [1, b"k" * 20, WORKER.id, 1, "soon", []],
        [1, b"k" * 20, WORKER.id, 1, int(NOW) + 9, {}],
        [1, b"k" * 20, WORKER.id, 1, int(NOW) + 9, [], "more"],
        "text",
        7,
    ],
)
def test_other_shapes_are_malformed(array: object) -> None:
    packed = msgpack.packb(array)
    blob = packed + WORKER.sign(b"qmesh/record/1" + packed)
    with pytest.raises(MalformedMessage):
        open_envelope(blob.ljust(70, b"\x00"), b"k" * 20, NOW)


def test_later_fields_of_a_body_are_ignored() -> None:
    record = make_record()
    key = model_key(OPEN, record.model)
    array = msgpack.unpackb(sign_record(record, WORKER, OPEN, key)[:-64])
    array[5].append("of version 2")
    packed = msgpack.packb(array)
    blob = packed + WORKER.sign(b"qmesh/record/1" + packed)
    assert open_record(blob, OPEN, key, NOW).model == record.model


def test_shards_differ_and_share_prefixes() -> None:
    bits = dht_id(WORKER.id)
    assert shard_prefix(WORKER.id, 0) == b""
    assert shard_prefix(WORKER.id, 8) == bits[:1]
    assert shard_prefix(WORKER.id, 3) == bytes([bits[0] & 0b1110_0000])
    keys = {model_key(OPEN, "m", depth, shard_prefix(WORKER.id, depth)) for depth in range(17)}
    assert len(keys) == 17
    with pytest.raises(ValueError, match="prefix"):
        model_key(OPEN, "m", 3, b"")


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
def test_a_catalogue_record_lists_names(network: Network) -> None:
    blob = sign_catalogue([("a", 1), ("b", 7)], 5, int(NOW) + 60, WORKER, network)
    assert open_catalogue(blob, network, NOW) == (WORKER.id, 5, (("a", 1), ("b", 7)))
    assert catalogue_key(network) != model_key(network, "a")
    with pytest.raises(ConfigurationError, match="512"):
        sign_catalogue([(f"model-{i}", 1) for i in range(90)], 5, int(NOW) + 60, WORKER, network)


@pytest.mark.parametrize("network", [OPEN, PRIVATE], ids=["open", "private"])
def test_a_catalogue_record_of_one_shard_is_worthless_in_another(network: Network) -> None:
    blob = sign_catalogue([("a", 1)], 5, int(NOW) + 60, WORKER, network, 15)
    assert open_catalogue(blob, network, NOW, 15) == (WORKER.id, 5, (("a", 1),))
    for other in (None, 0, 14):
        with pytest.raises(AuthenticationError, match="another key"):
            open_catalogue(blob, network, NOW, other)
    assert len({catalogue_key(network, shard) for shard in (None, *range(CATALOGUE_SHARDS))}) == 17
    sizes = Counter(catalogue_shard(f"model-{number}") for number in range(1600))
    assert sizes.keys() == set(range(CATALOGUE_SHARDS))
    assert max(sizes.values()) < 150
