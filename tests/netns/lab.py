"""Several machines on this one: network namespaces as hosts, bridges as switches, nftables as firewalls.

Needs root, Linux with veth, bridges and nf_tables, and the tools `ip`, `nft` and `setpriv`. Nothing is
left when a lab is closed; what a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_PREFIX = "qmesh-test"
_NAMED = Path("/run/netns")
_PACKAGES = {"ip": "iproute2", "nft": "nftables", "setpriv": "util-linux"}


def command(*words: str, stdin: str | None = None) -> str:
    """Run a tool to its end; the test fails with what it said where it cannot."""
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.fail(f"{words[0]} is missing: install the Debian package {_PACKAGES.get(words[0], words[0])}")
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        pytest.fail(
            f"`{' '.join(words)}` failed: {said}\n{stdin or ''}\nThese tests need root (CAP_SYS_ADMIN and "
            "CAP_NET_ADMIN) and a kernel with network namespaces, veth, bridges and nf_tables."
        )
    return done.stdout


@dataclass(frozen=True, slots=True)
class Switch:
    """A LAN. The router has the first address of each IP version that is spoken on it."""

    name: str
    v4: str | None
    v6: str | None
    multicast: bool

    def address(self, number: int, version: int = 4) -> str:
        """The host part `number` of this LAN."""
        return f"{self.v4}.{number}" if version == 4 else f"{self.v6}::{number}"


class Namespace:
    """One machine's network."""

    def __init__(self, name: str) -> None:
        self.name = name
        command("ip", "netns", "add", name)
        # Duplicate address detection would keep IPv6 addresses from being used for some seconds.
        self.sysctl("net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        self.ip("link set lo up")

    def ip(self, *lines: str) -> None:
        """Lines for `ip`."""
        command("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def sysctl(self, *settings: str) -> None:
        """Kernel settings of this machine."""
        self.run("sysctl", "-qw", *settings)

    def run(self, *words: str) -> str:
        """A tool on this machine."""
        return command("ip", "netns", "exec", self.name, *words)

    def nft(self, rules: str) -> None:
        """Add rules to this machine's firewall."""
        command("ip", "netns", "exec", self.name, "nft", "-f", "-", stdin=rules)

    def drop(self, what: str) -> None:
        """Drop what comes in and matches an nftables expression, such as `udp dport 9470`."""
        self.nft(
            "table inet wall { chain in { type filter hook input priority 0; policy accept; "
            f"iifname != lo {what} drop; }}\n}}"
        )

    def allow(self) -> None:
        """Take the firewall down."""
        self.nft("delete table inet wall")

    async def inside(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on this machine: what it opens are this machine's sockets."""

        def enter() -> T:
            libc = ctypes.CDLL(None, use_errno=True)
            with (_NAMED / self.name).open() as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
            return asyncio.run(function())

        # The thread never comes back to our own network, so it does nothing else.
        with ThreadPoolExecutor(1) as thread:
            return await asyncio.get_running_loop().run_in_executor(thread, enter)


class Lab:
    """A router with switches, and hosts on them. A context manager."""

    def __init__(self) -> None:
        self._mark = f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
        self._namespaces: list[Namespace] = []
        self._ports = count()
        self.router: Namespace

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.fail("these tests make network namespaces: run them as root")
        for tool, package in _PACKAGES.items():
            if shutil.which(tool) is None:
                pytest.fail(f"{tool} is missing: install the Debian package {package}")
        _remove_leftovers()
        try:
            self.router = self._namespace("router")
            self.router.sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _namespace(self, name: str) -> Namespace:
        namespace = Namespace(f"{self._mark}-{name}")
        self._namespaces.append(namespace)
        return namespace

    def switch(
        self, name: str, v4: str | None = None, v6: str | None = None, *, multicast: bool = True
    ) -> Switch:
        """A LAN with an IPv4 /24 (`10.1.0`), an IPv6 /64 (`fd00:1`), or both. Without `multicast` it
        drops mDNS and IGMP, as guest networks do.
        """
        lines = [f"link add {name} type bridge mcast_snooping 0 forward_delay 0", f"link set {name} up"]
        if v4 is not None:
            lines.append(f"addr add {v4}.1/24 dev {name}")
        if v6 is not None:
            lines.append(f"addr add {v6}::1/64 dev {name} nodad")
        self.router.ip(*lines)
        return Switch(name, v4, v6, multicast)

    def masquerade(self, inner: Switch, outer: Switch) -> None:
        """Make the router hide one LAN from the other behind its own address, and let nobody in."""
        # Named by addresses: where bridges are filtered too, these rules also see what stays in one LAN.
        away = f"ip saddr {inner.v4}.0/24 ip daddr != {inner.v4}.0/24"
        into = f"ip saddr != {inner.v4}.0/24 ip daddr {inner.v4}.0/24"
        self.router.nft(
            f"table ip nat-{inner.name} {{ "
            f"chain out {{ type nat hook postrouting priority 100; oifname {outer.name} {away} masquerade; }}\n"
            f"chain pass {{ type filter hook forward priority 0; "
            f"ct status dnat accept; {into} ct state new drop; }}\n}}"
        )

    def forward(self, outer: Switch, port: int, to: str) -> None:
        """Make the router pass a port of its outer address on to a host inside, as its owner would."""
        self.router.nft(
            f"table ip forward-{outer.name} {{ chain in {{ type nat hook prerouting priority -100; "
            f"ip daddr {outer.address(1)} meta l4proto {{ tcp, udp }} th dport {port} dnat to {to}; }}\n}}"
        )

    def host(self, name: str, switch: Switch, number: int) -> Namespace:
        """A machine on a LAN, with the router as its way to the others."""
        host = self._namespace(name)
        self.plug(host, switch, number)
        ways = [f"{net}.1" for net in [switch.v4] if net] + [f"{net}::1" for net in [switch.v6] if net]
        host.ip(*(f"route add default via {way}" for way in ways))
        return host

    def plug(self, host: Namespace, switch: Switch, number: int, interface: str = "eth0") -> None:
        """Connect a machine to a LAN, where its address ends in `number`."""
        port = f"p{next(self._ports)}"
        self.router.ip(
            f"link add {port} type veth peer name {interface} netns {host.name}",
            f"link set {port} master {switch.name}",
            f"link set {port} up",
        )
        if not switch.multicast:
            self.router.nft(
                f"table bridge quiet-{port} {{ chain forward {{ type filter hook forward priority 0; "
                f"iifname {port} udp dport 5353 drop; iifname {port} ip protocol igmp drop; }}\n}}"
            )
        lines = [f"link set {interface} up"]
        if switch.v4 is not None:
            lines.append(f"addr add {switch.address(number)}/24 dev {interface}")
        if switch.v6 is not None:
            lines.append(f"addr add {switch.address(number, 6)}/64 dev {interface} nodad")
        host.ip(*lines)

    def close(self) -> None:
        """End every process of the lab's machines, and the machines."""
        _remove([namespace.name for namespace in self._namespaces])
        self._namespaces.clear()


def _remove_leftovers() -> None:
    """Machines of test runs that are no more."""
    names = re.findall(rf"^({_PREFIX}-(\d+)-\S+)", command("ip", "netns", "list"), re.MULTILINE)
    _remove(name for name, pid in names if not Path(f"/proc/{pid}").exists())


def _remove(names: Iterable[str]) -> None:
    for name in names:
        for pid in command("ip", "netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        command("ip", "netns", "del", name)
