"""What a holder accepts, refuses, returns and forgets."""

from __future__ import annotations

import pytest

from mesh.dht import limits
from mesh.dht.store import Outcome, RecordStore
from mesh.identity import Identity
from mesh.limits import MAX_RECORDS_PER_KEY
from mesh.network import Network
from mesh.records import sign_catalogue

NOW = 1_800_000_000.0
OPEN = Network()
PUBLIC = "45.33.113.5"


def make_blob(identity: Identity, key: bytes, *, seq: int = 1, lifetime: float = 180) -> bytes:
    import msgpack

    array = msgpack.packb([1, key, identity.id, seq, int(NOW + lifetime), []])
    return bytes(array + identity.sign(b"qmesh/record/1" + array))


KEY = b"k" * 20


def test_a_record_is_kept_and_returned_until_it_expires() -> None:
    store = RecordStore()
    blob = make_blob(Identity(), KEY)
    assert store.put(KEY, blob, PUBLIC, NOW) is Outcome.STORED
    assert store.put(KEY, blob, PUBLIC, NOW) is Outcome.STORED
    assert store.count(KEY, NOW) == 1
    assert list(store.sample(KEY, b"", 0, NOW)) == [blob]
    assert store.count(KEY, NOW + 180) == 0
    assert list(store.sample(KEY, b"", 0, NOW + 180)) == []
    store.sweep(NOW + 180)
    assert (len(store), store.records) == (0, 0)


def test_bad_records_are_refused() -> None:
    store = RecordStore()
    identity = Identity()
    good = make_blob(identity, KEY)
    bad = {
        "forged": good[:-1] + bytes([good[-1] ^ 1]),
        "wrong key": make_blob(identity, b"x" * 20),
        "expired": make_blob(identity, KEY, lifetime=-1),
        "far future": make_blob(identity, KEY, lifetime=931),
        "oversize": good + bytes(512),
        "empty": b"",
        "junk": bytes(200),
    }
    for name, blob in bad.items():
        assert store.put(KEY, blob, PUBLIC, NOW) is Outcome.REFUSED, name
    assert store.records == 0


def test_only_a_higher_seq_replaces_a_record() -> None:
    store = RecordStore()
    identity = Identity()
    second = make_blob(identity, KEY, seq=2)
    assert store.put(KEY, second, None, NOW) is Outcome.STORED
    assert store.put(KEY, make_blob(identity, KEY, seq=1), None, NOW) is Outcome.REFUSED
    assert store.put(KEY, make_blob(identity, KEY, seq=2, lifetime=170), None, NOW) is Outcome.REFUSED
    third = make_blob(identity, KEY, seq=3)
    assert store.put(KEY, third, None, NOW) is Outcome.STORED
    assert list(store.sample(KEY, b"", 0, NOW)) == [third]


def test_a_replayed_record_does_not_return_after_a_shorter_lived_successor() -> None:
    store = RecordStore()
    identity = Identity()
    old = make_blob(identity, KEY, seq=1, lifetime=180)
    store.put(KEY, old, None, NOW)
    store.put(KEY, make_blob(identity, KEY, seq=2, lifetime=30), None, NOW)
    store.sweep(NOW + 60)
    assert store.count(KEY, NOW + 60) == 0
    assert store.put(KEY, old, None, NOW + 60) is Outcome.REFUSED


def test_a_full_key_refuses_the_new_and_keeps_the_old() -> None:
    store = RecordStore()
    first = [Identity() for _ in range(MAX_RECORDS_PER_KEY)]
    for identity in first:
        assert store.put(KEY, make_blob(identity, KEY), None, NOW) is Outcome.STORED
    assert store.put(KEY, make_blob(Identity(), KEY), None, NOW) is Outcome.FULL
    assert store.put(KEY, make_blob(first[0], KEY, seq=2), None, NOW) is Outcome.STORED
    assert store.count(KEY, NOW) == MAX_RECORDS_PER_KEY
    assert store.put(KEY, make_blob(Identity(), KEY, lifetime=400), None, NOW + 200) is Outcome.STORED


def test_one_subnet_cannot_fill_a_key() -> None:
    store = RecordStore()
    for _ in range(limits.MAX_RECORDS_PER_SUBNET_AND_KEY):
        assert store.put(KEY, make_blob(Identity(), KEY), "45.33.113.7", NOW) is Outcome.STORED
    assert store.put(KEY, make_blob(Identity(), KEY), "45.33.113.99", NOW) is Outcome.FULL
    assert store.put(KEY, make_blob(Identity(), KEY), "46.51.100.1", NOW) is Outcome.STORED
    assert store.put(KEY, make_blob(Identity(), KEY), "192.168.1.1", NOW) is Outcome.STORED


def test_caps_in_all_and_per_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.dht.store.MAX_RECORDS", 6)
    monkeypatch.setattr("mesh.dht.store.MAX_RECORDS_PER_SUBNET", 4)
    store = RecordStore()

    def put(number: int, source: str, now: float = NOW) -> Outcome:
        key = number.to_bytes(20)
        return store.put(key, make_blob(Identity(), key, lifetime=180 + now - NOW), source, now)

    assert [put(i, "45.33.113.1") for i in range(5)] == [Outcome.STORED] * 4 + [Outcome.FULL]
    assert [put(i, f"46.51.{i}.1") for i in range(5, 8)] == [Outcome.STORED] * 2 + [Outcome.FULL]
    assert put(9, "45.33.113.1", NOW + 181) is Outcome.STORED
    assert store.records == 1


def test_private_addresses_count_where_that_is_asked_for() -> None:
    store = RecordStore(limit_private=True)
    outcomes = [
        store.put(KEY, make_blob(Identity(), KEY), "127.0.0.1", NOW)
        for _ in range(limits.MAX_RECORDS_PER_SUBNET_AND_KEY + 1)
    ]
    assert outcomes[-1] is Outcome.FULL


def test_pages_with_one_salt_cover_a_key_exactly_once() -> None:
    store = RecordStore()
    blobs = {make_blob(Identity(), KEY) for _ in range(10)}
    for blob in blobs:
        store.put(KEY, blob, None, NOW)
    for salt in (b"", b"one", b"two"):
        pages = []
        for skip in range(0, 10, 2):
            sample = store.sample(KEY, salt, skip, NOW)
            pages += [next(sample), next(sample)]
        assert set(pages) == blobs
    orders = {tuple(store.sample(KEY, bytes([salt]), 0, NOW)) for salt in range(20)}
    assert len(orders) == 20


def test_the_packages_own_paths_find_nothing_to_push() -> None:
    store = RecordStore()
    store.put(KEY, make_blob(Identity(), KEY), None, NOW)
    assert list(store) == []
    assert list(store.iter_older_than(0)) == []
    with pytest.raises(TypeError):
        store[KEY] = b"value"
    with pytest.raises(KeyError):
        store[b"x" * 20]
    assert len(store[KEY]) == 1


def test_a_catalogue_record_is_stored_like_any_other() -> None:
    from mesh.records import catalogue_key

    identity = Identity()
    blob = sign_catalogue([("m", 1)], 1, int(NOW) + 60, identity, OPEN)
    assert RecordStore().put(catalogue_key(OPEN), blob, None, NOW) is Outcome.STORED
