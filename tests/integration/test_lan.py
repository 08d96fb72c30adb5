"""mDNS for real, on the loopback interface."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from mesh.interfaces import local_addresses
from mesh.lan import Lan, network_tag
from mesh.network import Network
from tests.support import seconds

OPEN = Network(f"lan-test-{secrets.token_hex(4)}")
"""Of this run alone: other nodes of this machine, and other runs of these tests, are on the same LAN."""


class Found:
    """Remembers what a search found and wakes whoever waits for it."""

    def __init__(self) -> None:
        self.addresses: set[tuple[str, int]] = set()
        self._news = asyncio.Event()

    def __call__(self, addresses: list[tuple[str, int]]) -> None:
        self.addresses.update(addresses)
        self._news.set()

    async def until(self, condition: Callable[[set[tuple[str, int]]], bool]) -> None:
        async with asyncio.timeout(seconds(15)):
            while not condition(self.addresses):
                self._news.clear()
                await self._news.wait()


async def test_two_nodes_find_each_other_and_no_other_mesh() -> None:
    first, second, stranger = Found(), Found(), Found()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(Lan(network, found).run("127.0.0.1", port))
            for network, found, port in (
                (OPEN, first, 9470),
                (OPEN, second, 9471),
                (Network(OPEN.name, b"s" * 32), stranger, 9472),
            )
        ]
        await first.until(lambda found: ("127.0.0.1", 9471) in found)
        await second.until(lambda found: ("127.0.0.1", 9470) in found)
        for task in tasks:
            task.cancel()
    assert first.addresses == {("127.0.0.1", 9471)}
    assert second.addresses == {("127.0.0.1", 9470)}
    assert stranger.addresses == set()


async def test_without_mdns_the_reason_is_kept_and_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = asyncio.Event()
    attempts = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            tried.set()
        raise OSError(19, "No such device")

    monkeypatch.setattr("mesh.lan.AsyncZeroconf", refuse)
    monkeypatch.setattr("mesh.lan._RETRY", 0.01)
    lan = Lan(OPEN, Found())
    async with asyncio.TaskGroup() as group:
        task = group.create_task(lan.run("127.0.0.1", 9470))
        await asyncio.wait_for(tried.wait(), seconds(5))
        task.cancel()
    assert lan.problem is not None
    assert "No such device" in lan.problem


async def test_new_addresses_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.2"]
    monkeypatch.setattr("mesh.lan.local_addresses", lambda: list(hosts))
    monkeypatch.setattr("mesh.lan._CHECK_INTERVAL", 0.1)
    seen, ignored = Found(), Found()
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(Lan(OPEN, ignored).run("0.0.0.0", 9470))
        await asyncio.sleep(0)
        hosts[:] = ["127.0.0.1"]
        watching = group.create_task(Lan(OPEN, seen).run("127.0.0.1", 9471))
        await seen.until(lambda found: ("127.0.0.1", 9470) in found)
        moving.cancel()
        watching.cancel()


def test_the_tag_tells_meshes_apart_and_hides_names() -> None:
    networks = [OPEN, Network("home"), Network("home", b"a" * 32), Network("home", b"b" * 32)]
    tags = [network_tag(network) for network in networks]
    assert len(set(tags)) == 4
    assert all(len(tag) == 16 for tag in tags)


def test_local_addresses_are_for_others() -> None:
    for host in local_addresses():
        address = ip_address(host)
        assert not (address.is_loopback or address.is_link_local)
