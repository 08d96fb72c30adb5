"""A worker inside a program of your own: what `qmesh-node run` does, until Ctrl-C.

python examples/worker.py [MODEL.gguf] [--join HOST:PORT]
"""

import asyncio
import sys

from node.config import Loaded
from node.daemon import Node


async def main(arguments: list[str]) -> None:
    """Serve a model to the mesh."""
    join = [arguments[arguments.index("--join") + 1]] if "--join" in arguments else []
    model = next((argument for argument in arguments if argument.endswith(".gguf")), None)
    flags = {
        "listen": "127.0.0.1:0",
        "join": join or None,
        "models": [{"path": model, "slots": 2}] if model else None,
    }
    await Node(Loaded.of(flags, file=None), emit=print).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
