"""The gateway and its keys from the command line, as a user meets them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.cluster import Cluster, Member
from tests.gateway_support import CHAT, TO_LISTEN, until
from tests.support import seconds

COMMAND = (sys.executable, "-P", "-m", "node")
CHAT_BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=seconds(30), check=False
    )


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[str]:
    """`qmesh-node gateway`; gives its URL."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "gateway", "--json", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds(15)):
            yield json.loads(await process.stdout.readline())["gateway"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(seconds(15)):
            rest, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(rest) == {"event": "stopped"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One node; its gateway is not used here."""
    nodes = Cluster(tmp_path_factory.mktemp("cli"), attached=True)
    try:
        yield asyncio.run(nodes.up(1, TO_LISTEN))[0]
    finally:
        asyncio.run(nodes.down())


def test_a_busy_port_that_was_named(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        home = ("--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
        done = command("run", "--json", "--no-mdns", *home, "--gateway", address)
        assert done.returncode == 6
        assert address in done.stderr
        assert 6 in [json.loads(line).get("exit_code") for line in done.stdout.splitlines()]
        assert command("gateway", "--join", "127.0.0.1:1", "--listen", address).returncode == 6


def test_never_open_to_others_without_a_key(tmp_path: Path) -> None:
    done = command("gateway", "--join", "127.0.0.1:1", "--listen", "0.0.0.0:0", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert "qmesh-node keys add" in done.stderr
    assert command("gateway", "--listen", "127.0.0.1:0").returncode == 2  # nothing to join


def test_keys(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path))
    made = command("keys", "add", "laptop", "--requests-per-minute", "60", *folder)
    assert made.returncode == 0
    secret = made.stdout.strip()
    file = tmp_path / "api-keys.json"
    assert secret not in file.read_text("utf-8")
    assert file.stat().st_mode & 0o077 == 0
    listed = [json.loads(line) for line in command("keys", "ls", "--json", *folder).stdout.splitlines()]
    assert [(key["name"], key["requests_per_minute"]) for key in listed] == [("laptop", 60)]
    assert command("keys", "add", "laptop", *folder).returncode == 2
    assert command("keys", "revoke", "tablet", *folder).returncode == 2
    assert command("keys", "revoke", listed[0]["id"], *folder).returncode == 0
    assert command("keys", "ls", "--json", *folder).stdout == ""


async def test_a_gateway_alone(node: Member, tmp_path: Path) -> None:
    """With a key beyond loopback, over TLS, with an alias and a default model; the key is revoked."""
    secret = command("keys", "add", "me", "--data-dir", str(tmp_path)).stdout.strip()
    certificate, key = _certificate(tmp_path)
    trust = ssl.create_default_context(cafile=certificate)
    async with (
        serving(
            *("--join", node.address, "--listen", "0.0.0.0:0", "--data-dir", str(tmp_path)),
            *("--tls-certificate", str(certificate), "--tls-key", str(key)),
            *("--alias", f"gpt-4o={CHAT}", "--default-model", CHAT),
        ) as url,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust), headers={"Authorization": f"Bearer {secret}"}
        ) as http,
    ):
        assert url.startswith("https://127.0.0.1:")
        for model in ({}, {"model": "gpt-4o"}, {"model": CHAT}):
            async with http.post(f"{url}/v1/chat/completions", json={**CHAT_BODY, **model}) as answer:
                assert answer.status == 200, await answer.text()
                assert answer.headers["X-QMesh-Worker"] == node.worker_id
        async with http.get(f"{url}/v1/models/gpt-4o") as answer:
            assert (await answer.json())["id"] == CHAT
        async with http.get(f"{url}/v1/models", headers={"Authorization": "Bearer qm-other"}) as answer:
            assert answer.status == 401
        assert command("keys", "revoke", "me", "--data-dir", str(tmp_path)).returncode == 0

        async def refused() -> bool:
            async with http.get(f"{url}/v1/models") as answer:
                return answer.status == 401

        await until(refused, timeout=3)


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


def test_run_takes_the_next_port_and_can_do_without(tmp_path: Path) -> None:
    environment = {**os.environ, "QMESH_DATA_DIR": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is taken already, which does as well
            stack.enter_context(closing(socket.create_server(("127.0.0.1", 9471))))
        port = int(_first_gateway(environment).rpartition(":")[2])
    assert 9471 < port < 9571
    assert _first_gateway(environment, "--no-gateway") is None


def _first_gateway(environment: dict[str, str], *extra: str) -> Any:
    run = [*COMMAND, "run", "--json", "--no-mdns", "--listen", "127.0.0.1:0", *extra]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "ready":
                    return event["gateway"]
        finally:
            process.terminate()
            process.wait(seconds(20))
    raise AssertionError("the node did not become ready")
