"""A chat with history, without asyncio: python examples/chat.py HOST:PORT."""

import sys

from client_sdk import SyncMeshClient


def main(join: str) -> None:
    """Talk until an empty line."""
    history: list[dict[str, object]] = []
    with SyncMeshClient(join=join) as mesh:
        while said := input("> "):
            history.append({"role": "user", "content": said})
            stream = mesh.chat_stream(history, max_tokens=200)
            for token in stream:
                print(token.text, end="", flush=True)
            print()
            history.append(dict(stream.completion().message or {}))


if __name__ == "__main__":
    main(sys.argv[1])
