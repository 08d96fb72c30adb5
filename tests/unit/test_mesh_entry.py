"""Addresses and join arguments as people write them, and the owner of background tasks."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.address import format_address, parse_address, usable_addresses
from mesh.entry import parse_entry
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.join import encode_token, issue
from mesh.limits import DEFAULT_PORT
from mesh.network import Network
from mesh.tasks import TaskOwner
from tests.support import seconds

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("host.example:0", ("host.example", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:9470", ("fe80::1%eth0", 9470)),
        ("bücher.example:1", ("bücher.example", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert format_address(*address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "host", ":80", "host:", "host:x", "host:-1", "host:65536", "host: 80", "host:8_0", "host:٣",
        "::1:80", "[]:80", "[::1]", "a..b:80", "a b:80", f"{'x' * 64}:80", "a\0b:80", "id@host:80",
        f"{'x.' * 200}y:80", "host:" + "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|port between"):
        parse_address(text)


@given(st.text())
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = parse_address(text)
    except ValueError:
        return
    assert 0 <= port <= 65535
    assert parse_address(format_address(host, port)) == (host, port)


def test_of_a_records_addresses_those_that_are_understood() -> None:
    assert usable_addresses(["a:1", "relay@b:2", "", "[::1]:3"]) == [("a", 1), ("::1", 3)]


def test_entries() -> None:
    identity = Identity()
    name = identity.id.hex()
    assert parse_entry("host", NOW).addresses == (("host", DEFAULT_PORT),)
    assert parse_entry(" host:1 ", NOW).addresses == (("host", 1),)
    assert parse_entry("[::1]", NOW).addresses == (("::1", DEFAULT_PORT),)
    assert parse_entry("[::1]:7", NOW).addresses == (("::1", 7),)
    with_id = parse_entry(f"{name}@host:1", NOW)
    assert (with_id.addresses, with_id.peer, with_id.network) == ((("host", 1),), identity.id, None)


@pytest.mark.parametrize(
    "text", ["", "::1", "host:x", "@host", "xyz@host:1", f"{'0' * 63}@host", "a..b", "a b"]
)
def test_what_is_no_entry(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_entry(text, NOW)
    assert "no place to join" in refused.value.cause
    assert refused.value.fix
    assert refused.value.exit_code == 2


def token_of(network: Network, *addresses: str) -> str:
    return encode_token(issue(network, Identity(bytes(32)).id, addresses, int(NOW) + 10, b"12345678"))


def test_tokens_of_open_meshes_bring_the_network_along() -> None:
    network = Network("ours")
    token = token_of(network, "a:1", "[::1]:2")
    entry = parse_entry(token, NOW)
    assert (entry.addresses, entry.peer, entry.network) == ((("a", 1), ("::1", 2)), None, network)
    assert entry.invitation is None
    with pytest.raises(ConfigurationError, match="expired"):
        parse_entry(token, NOW + 11)
    with pytest.raises(ConfigurationError, match="garbled"):
        parse_entry(token[:-3], NOW)


def test_tokens_of_private_meshes_bring_an_invitation() -> None:
    token = token_of(Network("ours", bytes(32)), "a:1")
    for now in (NOW, NOW + 11):  # whoever has redeemed it may go on using it
        entry = parse_entry(token, now)
        assert (entry.addresses, entry.peer, entry.network) == ((("a", 1),), None, None)
        assert entry.invitation is not None
        assert entry.invitation.ticket is not None
        assert (entry.invitation.name, entry.invitation.ticket.inviter) == ("ours", Identity(bytes(32)).id)


@pytest.mark.parametrize("address", ["nowhere", "a:b", "", "a..b:1"])
def test_a_token_with_a_bad_address_is_refused(address: str) -> None:
    token = token_of(Network(), address)
    with pytest.raises(ConfigurationError):
        parse_entry(token, NOW)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_is_an_entry_or_a_configuration_error(text: str) -> None:
    try:
        parse_entry(text, NOW)
    except ConfigurationError as error:
        assert error.fix


# --- tasks


async def test_an_owned_task_is_cancelled_at_the_close() -> None:
    owner = TaskOwner()
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    owner.spawn(work(), name="work")
    await asyncio.sleep(0)
    async with asyncio.timeout(seconds(5)):
        await owner.close()
    assert cleaned == [True]
    assert len(owner) == 0


async def test_tasks_spawned_by_a_closing_task_are_closed_too() -> None:
    owner = TaskOwner()

    async def work(depth: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            if depth:
                owner.spawn(work(depth - 1), name=f"work {depth}")

    owner.spawn(work(3), name="work")
    await asyncio.sleep(0)
    async with asyncio.timeout(seconds(5)):
        await owner.close()
    assert len(owner) == 0


async def test_a_failing_task_is_told(caplog: pytest.LogCaptureFixture) -> None:
    told: asyncio.Queue[BaseException] = asyncio.Queue()
    owner = TaskOwner(told.put_nowait)

    async def work() -> None:
        raise ZeroDivisionError

    owner.spawn(work(), name="the one that fails")
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(seconds(5)):
            assert isinstance(await told.get(), ZeroDivisionError)
    assert len(owner) == 0
    assert "the one that fails" in caplog.text


async def test_an_awaited_tasks_failure_is_its_awaiters(caplog: pytest.LogCaptureFixture) -> None:
    failures: list[BaseException] = []
    owner = TaskOwner(failures.append)

    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await owner.spawn(work(), name="work", awaited=True)
    assert failures == []
    assert caplog.text == ""
