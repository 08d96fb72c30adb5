"""A batch job over the mesh with a progress bar: python examples/batch.py HOST:PORT < prompts.txt > answers.jsonl.

One prompt per line; answers come as JSON lines in the order in which they are done. Every worker of the
mesh is kept busy, and a worker that dies costs nothing but time.
"""

import asyncio
import json
import sys

from rich.console import Console
from rich.progress import Progress

from client_sdk import MeshClient

AT_ONCE = 32


async def main(join: str, prompts: list[str]) -> None:
    """Answer every prompt."""
    places = asyncio.Semaphore(AT_ONCE)
    async with MeshClient(join=join) as mesh:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("answers", total=len(prompts))

            async def answer(prompt: str) -> None:
                async with places:
                    done = await mesh.generate(prompt, max_tokens=100, priority=-1)
                print(json.dumps({"prompt": prompt, "answer": done.text, "worker": done.explain.worker}))
                bar.advance(task)

            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    group.create_task(answer(prompt))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [line.strip() for line in sys.stdin if line.strip()]))
