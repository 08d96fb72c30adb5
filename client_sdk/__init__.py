"""The client of a QMesh network: picks the best worker, streams its answer, survives its loss.

::

    from client_sdk import MeshClient

    async with MeshClient(join="127.0.0.1:9470") as mesh:
        async for token in mesh.generate_stream("Once upon a time", max_tokens=64):
            print(token.text, end="")

`SyncMeshClient` has the same methods without asyncio. Everything that can go wrong is a
`mesh.errors.QMeshError`; its tree is drawn there.
"""

from client_sdk.client import MeshClient
from client_sdk.conversation import Conversation
from client_sdk.generate import TokenStream
from client_sdk.raw import RawAnswer
from client_sdk.sync import SyncConversation, SyncMeshClient, SyncRawAnswer, SyncTokenStream
from client_sdk.types import (
    Attempt,
    Completion,
    Explanation,
    ModelInfo,
    RouteEvent,
    Timeouts,
    Token,
    WorkerInfo,
)

__all__ = [
    "Attempt",
    "Completion",
    "Conversation",
    "Explanation",
    "MeshClient",
    "ModelInfo",
    "RawAnswer",
    "RouteEvent",
    "SyncConversation",
    "SyncMeshClient",
    "SyncRawAnswer",
    "SyncTokenStream",
    "Timeouts",
    "Token",
    "TokenStream",
    "WorkerInfo",
]
