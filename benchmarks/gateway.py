"""What the gateway costs: llama.cpp direct, behind nginx, behind LiteLLM, behind gateways of meshes of one and three.

    python -m benchmarks.gateway [--rounds 7] [--tokens 128]

Every path is taken in turn within each round, with the same requests to `/v1/completions`; only ratios of
one run mean anything. nginx and LiteLLM are measured where they are installed. In the mesh of one the
gateway belongs to the node whose llama.cpp the other paths lead to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.hop import (
    LEVELS,
    MODEL,
    SLOTS,
    Hop,
    http,
    litellm,
    nginx,
    server_of,
    spread,
    take_turn,
)
from node.cluster import Cluster, Member

PATH = "/v1/completions"


async def compare(rounds: int, tokens: int) -> list[Hop]:
    """All paths, `rounds` times after one that is not counted."""
    with tempfile.TemporaryDirectory(prefix="qmesh-gateway-") as folder:
        one, three = (Cluster(Path(folder) / name, attached=True) for name in ("one", "three"))
        try:
            extra = ["--gateway", "127.0.0.1:0", "--slots", str(SLOTS)]
            (node,) = await one.up(1, extra)
            members = await three.up(3, extra)
            url, key = server_of(node)
            connector = aiohttp.TCPConnector(force_close=True, limit=0)
            async with (
                aiohttp.ClientSession(
                    connector=connector, headers={"Authorization": f"Bearer {key}"}, read_bufsize=1 << 18
                ) as session,
                nginx(url) as proxy,
                litellm(url, key) as lite,
            ):
                paths = [Hop("direct", http(session, url + PATH, {}))]
                if proxy is not None:
                    paths.append(Hop("nginx", http(session, proxy[0] + PATH, {}), proxy[1]))
                if lite is not None:
                    paths.append(Hop("litellm", http(session, lite[0] + PATH, {"model": MODEL}), lite[1]))
                paths.append(_gateway(session, "mesh of 1", node))
                paths.append(_gateway(session, "mesh of 3", members[0]))
                for number in range(rounds + 1):
                    for path in paths[number % len(paths) :] + paths[: number % len(paths)]:
                        await take_turn(path, tokens, keep=number > 0)
                    print(f"round {number} of {rounds}", file=sys.stderr)
                return paths
        finally:
            await one.down()
            await three.down()


def _gateway(session: aiohttp.ClientSession, name: str, node: Member) -> Hop:
    return Hop(name, http(session, str(node.ready["gateway"]) + PATH, {}), [node.pid])


def report(paths: list[Hop], tokens: int) -> None:
    """The table, and the ratios that the goals are about."""
    print(f"\nmedian (quartiles); {tokens} tokens a request; first token: requests for 1 token, one by one\n")
    print(f"{'path':11}{'first token ms':>22}" + "".join(f"{f'chunks/s at {level}':>24}" for level in LEVELS))
    for path in paths:
        if path.failed is not None:
            print(f"{path.name:11} failed: {path.failed}")
            continue
        row = f"{path.name:11}{spread(path.first, 1e3, 2):>22}"
        print(row + "".join(f"{spread(path.rates[level], 1, 0):>24}" for level in LEVELS))
    known = {path.name: path for path in paths if path.failed is None}
    print()
    for name in ("mesh of 1", "mesh of 3"):
        if name not in known:
            continue
        for other in ("nginx", "litellm"):
            if other in known:
                print(_against(known[name], known[other], known["direct"]))
    for other in ("nginx", "litellm"):
        if other not in known:
            print(f"{other}: not measured (not installed or failed)")


def _against(path: Hop, other: Hop, direct: Hop) -> str:
    added, theirs = (
        (statistics.median(one.first) - statistics.median(direct.first)) * 1e3 for one in (path, other)
    )
    rates = ", ".join(
        f"{level}: {statistics.median(path.rates[level]) / statistics.median(other.rates[level]):.2f}"
        for level in LEVELS
    )
    return (
        f"{path.name} / {other.name}: first token +{added:.2f} ms against +{theirs:.2f} ms "
        f"({added - theirs:+.2f}), chunks/s at {rates}"
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    report(uvloop.run(compare(arguments.rounds, arguments.tokens)), arguments.tokens)


if __name__ == "__main__":
    main()
