"""A model on this machine, without a mesh: `python examples/engine.py [MODEL.gguf]`."""

import asyncio
import sys

from sidecar.engine import InferenceEngine


async def main() -> None:
    async with InferenceEngine(*sys.argv[1:2]) as engine:
        async for text in engine.generate_stream("Once upon a time", max_tokens=64):
            print(text, end="", flush=True)
        print()


asyncio.run(main())
