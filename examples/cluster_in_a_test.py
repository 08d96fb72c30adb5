"""A mesh of real nodes in a test of your own: pytest examples/cluster_in_a_test.py."""

from pathlib import Path

from client_sdk import MeshClient
from node.cluster import Cluster


async def test_two_nodes_answer(tmp_path: Path) -> None:
    """Both workers are found, and one of them answers."""
    cluster = Cluster(tmp_path, attached=True)
    nodes = await cluster.up(2, ["--no-gateway"])
    try:
        async with MeshClient(join=nodes[0].address) as mesh:
            assert {worker.id for worker in await mesh.workers()} <= {node.worker_id for node in nodes}
            answer = await mesh.generate("Once upon a time", max_tokens=16, temperature=0)
            assert answer.text
            assert answer.usage["completion_tokens"] == 16
    finally:
        await cluster.down()
