from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.admission import Admission, AdmissionPolicy, network_of
from mesh.errors import ErrorCode
from mesh.identity import NodeId

PEERS = [NodeId(bytes([n]) * 32) for n in range(4)]


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
    ],
)
def test_networks_that_addresses_count_under(host: str, network: str | None) -> None:
    assert network_of(host) == (network and ip_network(network))


def test_one_network_cannot_take_all_places() -> None:
    admission = Admission(AdmissionPolicy(max_half_open_per_network=2))
    assert [admission.arrived(n, f"192.0.2.{n}")[0] for n in range(2)] == [None, None]
    refusal, leaving = admission.arrived(2, "192.0.2.2")
    assert refusal is not None
    assert (refusal.code, leaving) == (ErrorCode.OVERLOADED, None)
    assert admission.arrived(3, "192.0.3.1") == (None, None)
    assert [admission.arrived(n, "127.0.0.1")[0] for n in range(10, 20)] == [None] * 10
    assert admission.proven(0, PEERS[0]) is None
    assert admission.arrived(4, "192.0.2.4") == (None, None), "a proven visitor leaves its half-open place"
    admission.validate()


def test_a_flood_displaces_itself() -> None:
    admission = Admission(AdmissionPolicy(max_half_open=4))
    admission.arrived("honest", "192.0.2.1")
    for n in range(3):
        admission.arrived(n, "127.0.0.1")
    assert admission.arrived(3, "127.0.0.1") == (None, 0)
    assert admission.arrived(4, "198.51.100.1") == (None, 1)
    assert admission.half_open == 4
    assert admission.proven("honest", PEERS[0]) is None
    admission.validate()


def test_all_connections_are_bounded() -> None:
    admission = Admission(AdmissionPolicy(max_connections=2))
    admission.arrived(0, "192.0.2.1")
    admission.proven(0, PEERS[0])
    admission.arrived(1, "192.0.2.1")
    refusal, _ = admission.arrived(2, "192.0.2.1")
    assert refusal is not None
    assert refusal.code == ErrorCode.OVERLOADED
    admission.left(0)
    admission.left(0)
    assert admission.arrived(2, "192.0.2.1") == (None, None)


def test_replayed_handshakes_do_not_count_against_their_victim() -> None:
    admission = Admission(AdmissionPolicy(max_connections_per_peer=1))
    for n in range(10):
        admission.arrived(n, "127.0.0.1")
        assert admission.introduced(PEERS[0]) is None
    assert admission.proven(5, PEERS[0]) is None
    refusal = admission.proven(6, PEERS[0])
    assert refusal is not None
    assert refusal.code == ErrorCode.OVERLOADED
    assert admission.established == 1
    assert admission.proven(7, PEERS[1]) is None


def test_lists() -> None:
    denying = Admission(
        AdmissionPolicy(deny=frozenset(PEERS[:1]), deny_networks=(ip_network("192.0.2.0/24"),))
    )
    assert denying.introduced(PEERS[1]) is None
    refusal = denying.introduced(PEERS[0])
    assert refusal is not None
    assert refusal.code == ErrorCode.UNAUTHORIZED
    for host in ("192.0.2.9", "::ffff:192.0.2.9"):
        refusal, _ = denying.arrived(0, host)
        assert refusal is not None
        assert refusal.code == ErrorCode.UNAUTHORIZED
    assert denying.half_open == 0
    allowing = Admission(AdmissionPolicy(allow=frozenset(PEERS[:2]), deny=frozenset(PEERS[:1])))
    assert allowing.introduced(PEERS[1]) is None
    assert allowing.introduced(PEERS[0]) is not None, "deny wins"
    assert allowing.introduced(PEERS[2]) is not None


class Crowd(RuleBasedStateMachine):
    """Visitors come, prove themselves and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(
            AdmissionPolicy(
                max_half_open=5, max_half_open_per_network=2, max_connections=8, max_connections_per_peer=2
            )
        )
        self.inside: dict[int, bool] = {}
        self.count = 0

    @rule(host=st.sampled_from(["127.0.0.1", "192.0.2.1", "192.0.2.2", "198.51.100.1", "2001:db8::1"]))
    def arrive(self, host: str) -> None:
        self.count += 1
        refusal, leaving = self.admission.arrived(self.count, host)
        if refusal is None:
            self.inside[self.count] = False
        if leaving is not None:
            assert refusal is None
            assert isinstance(leaving, int)
            assert not self.inside.pop(leaving), "only half-open visitors are displaced"

    @rule(pick=st.integers(0, 10), peer=st.sampled_from(PEERS))
    def prove(self, pick: int, peer: NodeId) -> None:
        waiting = [visitor for visitor, proven in self.inside.items() if not proven]
        if waiting:
            visitor = waiting[pick % len(waiting)]
            self.inside[visitor] = self.admission.proven(visitor, peer) is None

    @rule(pick=st.integers(0, 10))
    def leave(self, pick: int) -> None:
        if self.inside:
            visitor = list(self.inside)[pick % len(self.inside)]
            del self.inside[visitor]
            self.admission.left(visitor)

    @invariant()
    def books_balance(self) -> None:
        self.admission.validate()
        proven = sum(self.inside.values())
        assert (self.admission.established, self.admission.half_open) == (proven, len(self.inside) - proven)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
