"""The routing table and the addresses in it."""

from __future__ import annotations

import random

import pytest

from mesh.dht import limits
from mesh.dht.addresses import (
    may_introduce,
    normal,
    pack_address,
    pack_neighbour,
    scope,
    subnet,
    unpack_address,
    unpack_neighbours,
)
from mesh.dht.table import Contact, Table
from mesh.errors import MalformedMessage


def make_contact(number: int, host: str | None = None) -> Contact:
    rng = random.Random(number)
    host = host or f"{rng.randrange(20, 90)}.{rng.randrange(256)}.{rng.randrange(256)}.1"
    return Contact(rng.randbytes(32), (host, 9470 + number % 1000), "dht", 0.0)


def make_table(**options: bool) -> Table:
    return Table(bytes(20), **options)


def test_the_nearest_are_the_nearest() -> None:
    table = make_table()
    contacts = [make_contact(i) for i in range(500)]
    held = [contact for contact in contacts if table.add(contact)]
    assert len(held) == len(table) >= 100
    target = random.Random(1).randbytes(20)
    number = int.from_bytes(target)
    expected = sorted(held, key=lambda c: c.long_id ^ number)[:20]
    assert table.closest(target) == expected


def test_a_failing_contact_is_not_recommended_and_then_forgotten() -> None:
    table = make_table()
    good, bad = make_contact(1), make_contact(2)
    table.add(good)
    table.add(bad)
    table.failed(bad)
    assert table.closest(bytes(20)) == [good]
    bad.seen(1.0)
    assert set(table.closest(bytes(20))) == {good, bad}
    for _ in range(limits.MAX_FAILURES):
        table.failed(bad)
    assert list(table) == [good]
    table.failed(good)
    assert table.isolated
    assert table.closest(bytes(20)) == [good], "where nobody answers, anybody is better than nobody"


def test_few_contacts_of_one_subnet_enter_a_bucket() -> None:
    table = make_table()
    added = [table.add(make_contact(i, "45.33.113.7")) for i in range(10)]
    assert sum(added) == limits.MAX_CONTACTS_PER_SUBNET
    assert table.add(make_contact(11, "45.33.114.7"))


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.5", "10.0.0.9", "fd00::5"])
def test_private_subnets_are_limited_only_where_asked(host: str) -> None:
    assert all(make_table().add(make_contact(i, host)) for i in range(15))
    table = make_table(limit_private=True)
    assert sum(table.add(make_contact(i, host)) for i in range(15)) == limits.MAX_CONTACTS_PER_SUBNET


def test_a_contact_keeps_its_address_while_it_answers() -> None:
    table = make_table()
    contact = make_contact(1)
    table.add(contact)
    moved = Contact(contact.node_id, ("46.51.100.1", 1), "dht", 0.0)
    assert not table.add(moved)
    table.failed(contact)
    assert table.add(moved)
    assert [c.address for c in table] == [("46.51.100.1", 1)]
    assert table.at(contact.address) is None


def test_a_full_far_bucket_takes_a_contact_only_for_a_failing_one() -> None:
    table = make_table()
    for i in range(2000):
        table.add(make_contact(i))
    far = next(c for c in (make_contact(i) for i in range(2000, 3000)) if not table.wants(c.id, c.address))
    bucket = table.buckets[table.get_bucket_for(far)]
    assert len(bucket) == limits.BUCKET_SIZE
    table.failed(bucket.get_nodes()[0])
    assert table.add(far)
    assert len(bucket) == limits.BUCKET_SIZE


def test_ipv4_mapped_addresses_are_ipv4() -> None:
    assert normal("::ffff:192.0.2.1") == normal("192.0.2.1") == "192.0.2.1"
    assert normal("2001:DB8::0:1") == "2001:db8::1"
    assert subnet("::ffff:192.0.2.1") == subnet("192.0.2.200") != subnet("192.0.3.1")
    assert subnet("2001:db8::1") == subnet("2001:db8::ffff:1") != subnet("2001:db8:0:1::1")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 0),
        ("::1", 0),
        ("192.168.0.1", 1),
        ("fe80::1", 1),
        ("fd00::1", 1),
        ("8.8.8.8", 2),
        ("0.0.0.0", 3),
        ("::", 3),
        ("224.0.0.1", 3),
        ("255.255.255.255", 3),
        ("ff02::1", 3),
    ],
)
def test_scopes(host: str, expected: int) -> None:
    assert scope(host) == expected


def test_strangers_cannot_point_us_at_our_own_lan() -> None:
    assert may_introduce("8.8.8.8", "9.9.9.9")
    assert not may_introduce("8.8.8.8", "192.168.0.1")
    assert not may_introduce("192.168.0.1", "127.0.0.1")
    assert may_introduce("192.168.0.1", "8.8.8.8")
    assert may_introduce("127.0.0.1", "192.168.0.1")
    assert not may_introduce("127.0.0.1", "0.0.0.0")


@pytest.mark.parametrize("address", [("192.0.2.1", 1), ("2001:db8::1", 65535)])
def test_compact_addresses(address: tuple[str, int]) -> None:
    assert unpack_address(pack_address(address)) == address
    packed = pack_neighbour(b"i" * 20, address)
    assert unpack_neighbours(packed * 2) == [(b"i" * 20, address)] * 2
    for broken in (
        packed[:-1],
        packed + b"x",
        b"i" * 20,
        b"i" * 20 + b"\x05" + bytes(20),
        packed[:-2] + bytes(2),
    ):
        with pytest.raises(MalformedMessage):
            unpack_neighbours(broken)
