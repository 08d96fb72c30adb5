"""A streaming client: python examples/stream.py HOST:PORT "Once upon a time"."""

import asyncio
import sys

from client_sdk import MeshClient


async def main(join: str, prompt: str) -> None:
    """Print an answer as it is written, and who wrote it."""
    async with MeshClient(join=join) as mesh:
        stream = mesh.generate_stream(prompt, max_tokens=200)
        print(prompt, end="")
        async for token in stream:
            print(token.text, end="", flush=True)
        print(f"\n\nanswered by {stream.explain.worker} over {stream.explain.path}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
