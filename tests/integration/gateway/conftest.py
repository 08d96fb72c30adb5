"""One mesh for all tests of the gateway that do no harm to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from node.cluster import Member
from tests.gateway_support import DATA, EMBED, RANK, SOLO, TOOLS, cluster, with_models


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """Two nodes: one with models for every endpoint, one with the demo model alone."""
    folder = tmp_path_factory.mktemp("mesh")
    template = (DATA / "tools.jinja").read_text(encoding="utf-8")
    with_models(
        folder / "node-1",
        [
            {"slots": 2},
            {"alias": SOLO, "slots": 1, "context": 16384},
            {"alias": EMBED, "slots": 2, "extra_args": ["--embeddings", "--pooling", "mean"]},
            {"alias": RANK, "slots": 1, "extra_args": ["--reranking"]},
            {"alias": TOOLS, "slots": 1, "extra_args": ["--chat-template", template]},
        ],
    )
    with cluster(folder, 2) as members:
        yield members


@pytest.fixture
def url(nodes: list[Member]) -> str:
    """The gateway of the first node."""
    return str(nodes[0].ready["gateway"])


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with aiohttp.ClientSession() as session:
        yield session
