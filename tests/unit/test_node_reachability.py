"""Whom a node asks to dial back, and what it makes of the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from mesh.dht import Dht, Holdings, PeerInfo, Role
from mesh.dht.rpc import Traffic
from mesh.identity import Identity, NodeId
from mesh.network import Network
from node import reachability
from node.contacts import describe
from node.reachability import Reachability, choose

REFUSED = "Connection refused"


def peer(host: str, number: int = 0, **facts: Any) -> PeerInfo:
    known: dict[str, Any] = {
        "id": NodeId(bytes([number]) * 32), "host": host, "port": 9470, "found": "dht", "last_seen": 1.0,
        "rtt": 0.01, "clock_offset": 0.0, "failures": 0,
    }  # fmt: skip
    return PeerInfo(**known | facts)


def report(*, tcp: str | None = None, udp: str | None = None, seen: str = "8.8.8.8:9470") -> dict[str, Any]:
    return {"peer": "aa", "seen": seen, "tcp": tcp, "udp": udp}


@dataclass
class FakeDht:
    peers: list[PeerInfo]
    role: Role = Role.NEWCOMER
    seen_address: tuple[str, int] | None = ("8.8.8.8", 9470)
    unreached: dict[Any, str] = field(default_factory=dict)
    holdings: Holdings = Holdings(0, 0, 0, Traffic())  # noqa: RUF009 - never changed


def make(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any] | None) -> tuple[Reachability, FakeDht]:
    """A node whose peers answer so, one each."""
    dht = FakeDht([peer(f"9.9.{number}.9", number) for number in range(len(answers))])
    one = Reachability(Identity(), Network(), cast("Dht", dht), 9470)

    async def ask(host: str, port: int) -> dict[str, Any] | None:
        return answers[int(host.split(".")[2])]

    monkeypatch.setattr(one, "_ask", ask)
    monkeypatch.setattr(reachability, "local_addresses", lambda: ["192.168.1.7"])
    return one, dht


def test_the_farthest_and_the_most_different_are_asked() -> None:
    near = [peer("192.168.1.2"), peer("192.168.1.3"), peer("127.0.0.1")]
    assert {one.host for one in choose([*near, peer("8.8.8.8"), peer("9.9.9.9")], 2)} == {
        "8.8.8.8",
        "9.9.9.9",
    }
    crowd = [peer(f"8.8.8.{number}") for number in range(20)]
    for _ in range(20):
        assert {one.host for one in choose([*crowd, peer("9.9.9.9")], 2)} > {"9.9.9.9"}
    assert choose(near, 3)[-1].host == "127.0.0.1"
    assert choose([], 3) == []


async def test_nobody_to_ask_leaves_it_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers in ((), (None, None)):
        one, dht = make(monkeypatch, *answers)
        await one.check()
        assert one.reachable is None
        assert dht.role is Role.NEWCOMER


async def test_one_peer_that_comes_through_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    one, dht = make(monkeypatch, report(tcp=REFUSED), report(), None)
    await one.check()
    assert one.reachable
    assert dht.role is Role.HOLDER


@pytest.mark.parametrize("closed", [{"tcp": REFUSED}, {"udp": "no answer"}])
async def test_without_tcp_or_without_udp_it_is_a_client(
    monkeypatch: pytest.MonkeyPatch, closed: dict[str, Any]
) -> None:
    one, dht = make(monkeypatch, report(**closed), report(**closed))
    await one.check()
    assert one.reachable is False
    assert dht.role is Role.CLIENT
    assert one.describe()["behind_nat"]
    dht.seen_address = ("192.168.1.7", 9470)
    assert not one.describe()["behind_nat"]


async def test_the_outside_address_is_one_that_was_seen_and_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    one, dht = make(monkeypatch, report(seen="8.8.8.8:50000"), report(seen="7.7.7.7:1", tcp=REFUSED))
    await one.check()
    assert one.outside == "8.8.8.8"
    for seen in (("7.7.7.7", 9470), ("192.168.1.7", 9470), ("127.0.0.1", 9470), None):
        dht.seen_address = seen
        assert one.outside is None


async def test_a_lying_report_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = make(monkeypatch, {"peer": "aa", "seen": None, "tcp": None, "udp": None})
    await one.check()
    assert one.outside is None


def test_what_peers_say_is_fit_for_a_terminal() -> None:
    assert reachability._told("no\x1b[2Jway\n") == "no[2Jway"
    assert reachability._told(5) == "5"
    assert reachability._told(None) is None
    assert len(reachability._told("x" * 999) or "") == reachability.MOST_TOLD


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({}, None),
        ({"clock_offset": 29.0}, None),
        ({"clock_offset": -3600.4}, "its clock is 3600 s behind this machine's"),
        ({"clock_offset": 31.0}, "its clock is 31 s ahead of this machine's"),
        ({"failures": 1, "clock_offset": 99.0}, "left 1 request unanswered"),
        ({"failures": 2}, "left 2 requests unanswered"),
    ],
)
def test_what_is_wrong_with_a_peer(facts: dict[str, Any], problem: str | None) -> None:
    assert describe(peer("8.8.8.8", **facts))["problem"] == problem


@pytest.mark.parametrize(
    ("host", "path"),
    [("127.0.0.1", "loopback"), ("10.0.0.1", "LAN"), ("fd00::1", "LAN"), ("8.8.8.8", "internet")],
)
def test_the_path_to_a_peer(host: str, path: str) -> None:
    assert describe(peer(host))["path"] == path
