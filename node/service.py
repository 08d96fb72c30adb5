"""What peers may ask of a node: `infer`, `status`, `find`, `models`. One task per stream runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh.dht import Dht
from mesh.errors import BackendFailed, BadRequest, ModelNotFound, Unauthorized
from mesh.identity import NodeId
from mesh.transport import Stream
from node.contacts import contacts
from node.inference import Inference
from node.reachability import Reachability
from node.served import ServedModel
from sidecar.errors import SidecarError

MAX_WANT = 64
MAX_NAME = 255


class Service:
    """Answers the streams that peers open. `status` gives the node's state."""

    def __init__(
        self,
        own_id: NodeId,
        models: Mapping[str, ServedModel],
        dht: Dht,
        reachability: Reachability,
        inference: Inference,
        *,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._own_id = own_id
        self._models = models
        self._dht = dht
        self._reachability = reachability
        self._inference = inference
        self._status = status

    async def handle(self, stream: Stream) -> None:
        """Serve one stream. A RemoteError that leaves here becomes the stream's RESET."""
        match stream.method:
            case "infer":
                await self._inference.answer(stream, self._model(stream.meta))
            case "status":
                await stream.end(self._told(stream.peer_id))
            case "find":
                await self._find(stream)
            case "models":
                await stream.end({"models": await self._dht.models()})
            case "dial_back":
                await self._reachability.answer(stream)
            case "load" | "unload":
                await self._manage(stream)
            case _:
                raise BadRequest(f"there is no method {stream.method[:40]!r}")

    def _told(self, peer: NodeId) -> Mapping[str, Any]:
        """The node's status; who its peers are is told to nobody but the holder of its own key."""
        status = {**self._status(), "peers": len(self._dht.peers)}
        if peer == self._own_id:
            status["contacts"] = contacts(self._dht)
            status["reachability"] = self._reachability.describe()
        return status

    async def _manage(self, stream: Stream) -> None:
        """Load or unload a model: only for the holder of the node's own key."""
        if stream.peer_id != self._own_id:
            raise Unauthorized("only this machine's user may do that")
        model = self._model(stream.meta)
        try:
            await (model.load() if stream.method == "load" else model.unload())
        except SidecarError as error:
            raise BackendFailed(error.message[:500]) from error
        await stream.end(self._status())

    async def _find(self, stream: Stream) -> None:
        model, want = stream.meta.get("model"), stream.meta.get("want", 16)
        if not isinstance(model, str) or not 0 < len(model) <= MAX_NAME or not isinstance(want, int):
            raise BadRequest("find needs a model's name, and a number as `want`")
        found = await self._dht.lookup(model, want=min(max(1, want), MAX_WANT))
        await stream.end({"records": [[one.key, one.blob] for one in found]})

    def _model(self, meta: Mapping[str, Any]) -> ServedModel:
        name = meta.get("model")
        model = self._models.get(name) if isinstance(name, str) else None
        if model is None:
            raise ModelNotFound(f"this worker does not serve {str(name)[:80]!r}")
        return model
