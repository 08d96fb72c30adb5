"""The gateway's HTTP server: accepts, checks, routes, answers, accounts, and stops in order."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from client_sdk import MeshClient, Timeouts
from mesh.identity import Identity
from mesh.network import Network
from mesh.transport import Connection
from node.gateway import binding
from node.gateway.call import Call
from node.gateway.catalogue import Catalogue
from node.gateway.endpoints import BY_PATH
from node.gateway.errors import ApiError
from node.gateway.intake import Budget, Intake
from node.gateway.keys import KeyFile, Keys
from node.gateway.limits import Allowances
from node.gateway.origins import Origins, names_this_machine
from node.gateway.outlet import ClientGone, Outlet
from node.gateway.pages import Pages
from node.gateway.proxy import Proxy
from node.gateway.settings import GatewaySettings
from node.gateway.waiting import Waiting
from node.metrics import Metrics

log = logging.getLogger("qmesh.gateway")

MOST_CONNECTIONS = 2048
IDLE_SECONDS = 75.0
"""A connection without a request, or with one whose head does not come to an end, is closed after this."""
HANDSHAKE_SECONDS = 10.0
MAX_LINE = 8190
MAX_HEADERS = 100
CANCEL_SECONDS = 2.0
CLIENT_CLOSED = 499
JSON = "application/json"
TIMEOUTS = Timeouts(first_token=600.0, between_tokens=120.0)
"""Of HTTP clients the impatient hang up by themselves; large prompts on small machines take minutes."""

NodeStatus = Callable[[], Mapping[str, Any]]
"""The status of the node that the gateway belongs to; an empty map where there is none."""


class Gateway:
    """One listening gateway: an asynchronous context manager around `mesh`, which it closes too.

    `folder` is the data folder with the API keys. `or_next` allows the next free port.
    Constructing raises ConfigurationError for whatever the user has to mend; nothing is accepted
    before `start`.
    """

    def __init__(
        self,
        address: str,
        mesh: MeshClient,
        folder: Path,
        *,
        settings: GatewaySettings = GatewaySettings(),  # noqa: B008 - frozen
        or_next: bool = False,
        status: NodeStatus = dict,
    ) -> None:
        keys = KeyFile(folder)
        self._tls: ssl.SSLContext | None = binding.tls_context(settings)
        self._sock = binding.bind(address, or_next=or_next, has_keys=bool(keys.read()))
        self._loopback = binding.is_loopback(self._sock.getsockname()[0])
        self.url = binding.url(self._sock, tls=self._tls is not None)
        self._keys = Keys(keys, required=not self._loopback, now=time.monotonic())
        self._mesh = mesh
        self._origins = Origins(settings.cors_origins)
        self._allowances = Allowances()
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        budget = Budget()
        catalogue = Catalogue(mesh, settings, lambda: _states(status()))
        self._waiting = waiting = Waiting(mesh, catalogue, settings.wait_seconds)
        self.metrics = Metrics(status, lambda: waiting.count, lambda: len(self._running))
        intake = Intake(settings.max_body_mb << 20, budget)
        self._proxy = Proxy(mesh, catalogue, waiting, intake, budget, self.metrics)
        self._pages = Pages(catalogue, self.metrics)
        self._http: web.Server | None = None
        self._listening: asyncio.Server | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(0)

    async def start(self) -> None:
        """Accept requests from now on."""
        self._http = web.Server(
            self._handle,
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_HEADERS,
            access_log=None,
            logger=log,
        )
        self._listening = await asyncio.get_running_loop().create_server(
            self._accept,
            sock=self._sock,
            backlog=binding.BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls is not None else None,
        )

    async def close(self, grace: float) -> None:
        """Accept nothing more, let running requests end for `grace` seconds, cancel the rest, leave the
        mesh. Idempotent.
        """
        self._stopping = True
        self._waiting.close()
        if self._listening is not None:
            self._listening.close()
        else:
            self._sock.close()
        if self._http is not None:
            self._http.pre_shutdown()
            await self._drained(grace)
            for task in self._running:
                task.cancel()
            await self._drained(CANCEL_SECONDS)
            await self._http.shutdown(0.1)
        await self._mesh.close()

    async def _drained(self, limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                await self._idle.wait()
        except TimeoutError:
            return

    def _accept(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection; one that only refuses where there are too many."""
        assert self._http is not None
        if len(self._http.connections) >= MOST_CONNECTIONS:
            return _Full()
        return self._http()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; whatever happens, it is accounted for."""
        endpoint = BY_PATH.get(request.path)
        call = Call(request, endpoint.path if endpoint else self._pages.name(request.path), endpoint)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        try:
            return await self._answer(call)
        except ApiError as error:
            return self._refused(call, error)
        except (asyncio.CancelledError, ClientGone):
            call.status = CLIENT_CLOSED
            raise
        except Exception:
            log.exception("answering %s failed", call.name)
            return self._refused(call, ApiError(500, "the gateway met a fault of its own; its log says more"))
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()
            # Later: the end of the answer is still to leave in this turn of the loop.
            asyncio.get_running_loop().call_soon(self._account, call, time.monotonic())

    async def _answer(self, call: Call) -> web.StreamResponse:
        request = call.request
        self._check_origin(call)
        if request.method == "OPTIONS":
            headers = self._origins.preflight(
                request.headers.get("Origin"), request.headers.get("Access-Control-Request-Headers")
            )
            return web.Response(status=204, headers={**call.headers, **headers})
        if self._stopping:
            raise ApiError(503, "the gateway is stopping", retry_after=5.0)
        if not self._pages.is_public(request.path):
            self._authenticate(call)
        if call.endpoint is None:
            return await self._pages.answer(call)
        if request.method != "POST":
            raise ApiError(405, f"{request.path} takes POST", code="method_not_allowed", allow="POST")
        return await self._proxy.answer(call, call.endpoint)

    def _check_origin(self, call: Call) -> None:
        """Raises ApiError (403) for web pages that may not use the gateway."""
        origin, host = call.request.headers.get("Origin"), call.request.headers.get("Host")
        call.headers |= self._origins.headers(origin)
        if not self._origins.permits(origin, host):
            raise ApiError(
                403, f"web pages of {origin!r} may not use this gateway; see cors_origins", code="origin"
            )
        if self._loopback and not self._keys.required(time.monotonic()) and not names_this_machine(host):
            raise ApiError(
                403,
                f"{host!r} is no name of this machine; behind a proxy make a key with `qmesh-node keys add`",
                code="host",
            )

    def _authenticate(self, call: Call) -> None:
        """Raises ApiError (401) for a request without a valid key where one is needed."""
        now = time.monotonic()
        if not self._keys.required(now):
            return
        headers = call.request.headers
        scheme, _, bearer = headers.get("Authorization", "").partition(" ")
        secret = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        call.key = self._keys.find(secret, now) if secret else None
        if call.key is None:
            raise ApiError(
                401,
                "the API key is not valid" if secret else "an API key is needed: Authorization: Bearer qm-…",
                code="invalid_api_key",
            )
        limits = call.key.requests_per_minute, call.key.tokens_per_minute
        call.allowance = self._allowances.of(call.key.id, *limits, now)

    def _refused(self, call: Call, error: ApiError) -> web.StreamResponse:
        call.error = error.code
        return Outlet(call).whole(error.status, JSON, error.body(call.form, call.id), error.headers)

    def _account(self, call: Call, now: float) -> None:
        """Settle the key's allowance; tell metrics and log. Nothing of what was said is in either."""
        seconds = now - call.began
        explain = call.explain
        if call.allowance is not None and call.estimate:
            call.allowance.settle(call.estimate, call.used, now)
        self.metrics.request(call.name, call.model if explain else None, call.status, seconds)
        facts: dict[str, Any] = {
            "request": call.id,
            "trace": call.trace,
            "endpoint": call.name,
            "status": call.status,
            "ms": round(seconds * 1000, 2),
            "key": call.key.name if call.key else None,
            "error": call.error,
        }
        if explain is not None and explain.worker is not None and call.first_byte is not None:
            self.metrics.answer(
                call.model or "",
                explain.worker,
                prompt_tokens=call.prompt_tokens,
                answer_tokens=call.answer_tokens,
                first_byte=call.first_byte,
                queue=explain.queue,
                attempts=explain.asked,
                splices=explain.splices,
                hedges=explain.hedged,
            )
            facts |= {
                "model": call.model,
                "worker": explain.worker,
                "path": explain.path,
                "first_token_ms": round(call.first_byte * 1000, 2),
                "queue_ms": None if explain.queue is None else round(explain.queue * 1000, 2),
                "attempts": explain.asked,
                "splices": explain.splices,
                "prompt_tokens": call.prompt_tokens,
                "answer_tokens": call.answer_tokens,
            }
        log.info("%s %d", call.name, call.status, extra={"facts": facts})


def mesh_client(
    join: str | Sequence[str],
    network: str | Network,
    identity: Identity | None,
    own_node: Callable[[], Connection] | None = None,
) -> MeshClient:
    """The client that a gateway stands on, in a node or alone. It connects with the first request."""
    return MeshClient(join, network=network, identity=identity, timeouts=TIMEOUTS, own_node=own_node)


class _Full(asyncio.Protocol):
    """Turns a connection away."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say why and hang up."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
            b"Content-Length: 0\r\n\r\n"
        )
        transport.close()


def _states(status: Mapping[str, Any]) -> dict[str, str]:
    """The models that a node serves or is about to serve, from its status."""
    return {model["name"]: model["state"] for model in status.get("models", ()) if model["state"] != "failed"}
