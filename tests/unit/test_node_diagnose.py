"""What the doctor concludes from what it found."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from node.diagnose import Check, Reach, check_running, judge, local_checks, within_reach


def reached(**facts: Any) -> Reach:
    found: dict[str, Any] = {
        "address": "10.0.0.1:9470", "peer": "ab", "tcp": 0.001, "tcp_problem": None, "udp": 0.001,
        "udp_problem": None, "skew": 0.0,
    }  # fmt: skip
    return Reach(**found | facts)


def bad(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.finding for check in checks if not check.ok}


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"udp": None}, "drops UDP"),
        ({"tcp": None, "tcp_problem": "timeout"}, "drops TCP"),
        ({"tcp": None, "udp": None, "tcp_problem": "Connection refused"}, "nothing listens there"),
        ({"tcp": None, "udp": None, "tcp_problem": "timeout"}, "no answer over TCP or UDP"),
        ({"tcp": None, "udp": None, "denied": "mesh"}, "another secret"),
        ({"tcp": None, "tcp_problem": "speaks version 2", "denied": "version"}, "speaks version 2"),
    ],
)
def test_a_node_out_there(facts: dict[str, Any], cause: str) -> None:
    [check] = judge(reached(**facts))
    assert not check.ok
    assert cause in check.finding
    assert check.fix


def test_a_clock_is_named_beside_what_else_is_wrong() -> None:
    assert bad(judge(reached(skew=-45.0))) == {
        "clock of 10.0.0.1:9470": "its clock is 45 s behind this machine's: records look expired or forged"
    }
    assert len(bad(judge(reached(skew=3600.0, udp=None)))) == 2
    assert bad(judge(reached(skew=20.0))) == {}


def status(*clocks: float, **reachability: Any) -> dict[str, Any]:
    """Of a running node whose peers' clocks are so many seconds ahead."""
    peers = [
        {"address": f"10.0.0.{number}:1", "clock": clock, "last_seen": 1.0}
        for number, clock in enumerate(clocks)
    ]
    known = {"reachable": True, "seen": "8.8.8.8:1", "behind_nat": False, "reports": []}
    return {"contacts": {"peers": peers, "unreached": {}}, "reachability": known | reachability, "mdns": "on"}


def test_the_clock_of_the_minority_is_wrong() -> None:
    assert bad(check_running(status(0, 1, 3600))) == {
        "clock of 10.0.0.2:1": "it is 3600 s ahead of this machine's"
    }
    assert bad(check_running(status(3600, 3601, 0))) == {
        "clock": "this machine's clock is 3600 s behind those of 2 of 3 peers"
    }
    assert list(bad(check_running(status(3600)))) == ["clock of 10.0.0.0:1"], "one against one: who can tell"
    assert bad(check_running(status(5, -5))) == {}


@pytest.mark.parametrize(
    ("own", "reachable"),
    [
        (["10.0.0.9"], ["10.0.0.1", "name.example"]),
        (["fd00::9"], ["fd00::1", "name.example"]),
        (["10.0.0.9", "fd00::9"], ["10.0.0.1", "fd00::1", "name.example"]),
        ([], ["10.0.0.1", "fd00::1", "name.example"]),
    ],
)
def test_addresses_of_an_ip_version_that_is_not_there_are_left_out(
    own: list[str], reachable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.diagnose.local_addresses", lambda: own)
    told = ["10.0.0.1:1", "[fd00::1]:1", "name.example:1"]
    assert [host for host, _ in within_reach(told)] == reachable


def test_a_lan_that_cannot_be_searched() -> None:
    assert bad(check_running(status(0))) == {}
    assert bad(check_running(status(0) | {"mdns": "off"})) == {}
    problem = "mDNS is not possible here: No such device"
    assert bad(check_running(status(0) | {"mdns": problem})) == {"LAN": problem}


def test_nobody_known() -> None:
    assert "knows nobody" in bad(check_running(status()))["peers"]


def test_why_peers_cannot_dial_back() -> None:
    reports = [{"tcp": "refused", "udp": None}, {"tcp": "refused", "udp": None}]
    [check] = [one for one in check_running(status(0, reachable=False, reports=reports)) if not one.ok]
    assert "over TCP: a firewall drops it" in check.finding
    assert "for TCP in the firewall" in check.fix
    behind = check_running(status(0, reachable=False, behind_nat=True, reports=reports))
    assert "behind a router, they see 8.8.8.8:1" in bad(behind)["reachable"]
    assert bad(check_running(status(0, reachable=None))) == {}


def test_the_holder_of_a_port_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:

    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        checks = local_checks(tmp_path_factory.mktemp("d"), listen=where, running=False, llama_server=None)
    assert f"(pid {os.getpid()})" in bad(checks)["port"]
