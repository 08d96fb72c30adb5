"""A mesh of three real nodes for all tests that do it no harm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from client_sdk import MeshClient
from node.cluster import Cluster, Member


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """Three nodes that die with this process, however it ends. Tests leave them as they were."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), attached=True)
    try:
        yield asyncio.run(cluster.up(3, ["--no-gateway", "--slots", "2"]))
        assert all(member.process() for member in cluster.members), "a test has killed a node of all tests"
    finally:
        asyncio.run(cluster.down())


@pytest.fixture
async def mesh(members: list[Member]) -> AsyncIterator[MeshClient]:
    """A client that knows the first node's address."""
    async with MeshClient(members[0].address) as client:
        yield client
