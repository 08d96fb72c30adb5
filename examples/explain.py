"""Why this worker, and what happened on the way: python examples/explain.py HOST:PORT.

Try it on `qmesh-node cluster up --kill-every 3`.
"""

import asyncio
import contextlib
import sys

from client_sdk import MeshClient, RouteEvent


def note(event: RouteEvent) -> None:
    """Say what happens as it happens."""
    print(f"\n[{event.kind}: {event.worker[:12]}, {event.detail}]", file=sys.stderr)


async def main(join: str) -> None:
    """One answer after the other until Ctrl-C."""
    async with MeshClient(join=join, on_event=note) as mesh:
        for worker in await mesh.workers():
            print(
                f"{worker.id[:12]} health {worker.health}, expected {worker.expected:.2f} s, load {worker.load:.1f}"
            )
        while True:
            stream = mesh.generate_stream("Once upon a time", max_tokens=1500, temperature=0, ignore_eos=True)
            async for token in stream:
                print(token.text, end="", flush=True)
                await asyncio.sleep(0.005)
            why = stream.explain
            print(f"\n\n{why.reason}: {(why.worker or '')[:12]} ({why.path}), {why.splices} splices")
            for attempt in why.attempts:
                print(f"  {attempt.worker[:12]} {attempt.way}: {attempt.error or 'finished it'}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
