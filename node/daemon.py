"""The composition root: builds a node from its configuration, runs it, and takes it down in order.

Down means: withdraw the announcement → stop accepting, GOAWAY, drain within the grace, cancel what is
left → stop the models (their upstream connections first) → stop the DHT. A second signal skips the
drain. No process is left behind, whichever step fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from mesh.address import format_address
from mesh.dht import Dht, Role
from mesh.errors import ConfigurationError
from mesh.identity import Identity
from mesh.keystore import EXIT_IDENTITY, load_identity
from mesh.network import Network
from mesh.transport import Listener, serve
from node.__about__ import USER_AGENT
from node.announcer import Announcer
from node.config import Loaded
from node.folder import DataFolder
from node.inference import Inference
from node.invitations import Invitations
from node.logs import log_file
from node.membership import resolve
from node.models import EXIT_MODEL, choose_server, model_pool, named_models
from node.monitor import INTERVAL, machine
from node.reachability import Reachability
from node.served import ServedModel
from node.service import Service
from node.sockets import advertised, bind, local_address
from node.state import NodeState
from sidecar.changes import Change
from sidecar.errors import SidecarError
from sidecar.pool import ModelPool

if TYPE_CHECKING:
    from mesh.lan import Lan
    from node.gateway.server import Gateway

log = logging.getLogger("qmesh.node")

ANNOUNCE_PATIENCE = 2.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Emit = Callable[[Mapping[str, Any]], None]


class Node:
    """One node. `emit` is told what happens, as the events of `qmesh-node run --json`."""

    def __init__(self, loaded: Loaded, emit: Emit) -> None:
        self.loaded = loaded
        self.config = loaded.config
        self._emit = emit
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._changed = asyncio.Event()
        self._state: NodeState | None = None
        self._pool: ModelPool | None = None
        self._dht: Dht | None = None
        self._listener: Listener | None = None
        self._inference: Inference | None = None
        self._announcer: Announcer | None = None
        self._gateway: Gateway | None = None

    def stop(self) -> None:
        """Ask the node to stop; asked again, it does not wait for running answers."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def run(self) -> None:
        """Run until `stop` or a signal.

        Raises ConfigurationError for whatever the user has to mend.
        """
        folder = DataFolder.hold(self.config.data_dir, or_next=not self.loaded.explicit("data_dir"))
        try:
            self.config = self.config.model_copy(update={"data_dir": folder.path})
            with log_file(folder.path, "node.log"), _signals(self.stop):
                async with asyncio.TaskGroup() as group:
                    background: list[asyncio.Task[None]] = []
                    try:
                        await self._start(folder, group, background)
                        await self._stop.wait()
                        self._emit({"event": "stopping"})
                    finally:
                        for task in background:
                            task.cancel()
                        await self._shutdown()
        except* ConfigurationError as errors:
            raise errors.exceptions[0] from None
        finally:
            folder.close()

    async def _start(
        self, folder: DataFolder, group: asyncio.TaskGroup, background: list[asyncio.Task[None]]
    ) -> None:
        """Everything up to `ready`; returns early when asked to stop meanwhile."""
        config = self.config
        identity = load_identity(folder.path)
        mesh = await resolve(
            folder.path,
            join=config.join,
            network=config.network if self.loaded.explicit("network") else None,
        )
        network, seeds = mesh.network, mesh.seeds
        settings = await named_models(config)
        server = await asyncio.to_thread(choose_server, config, settings)
        tcp, udp = bind(config.listen, or_next=not self.loaded.explicit("listen"))
        address, worker_id = local_address(tcp), identity.id.hex()
        self._state = state = NodeState(identity.id, network.name, advertised(tcp, config.advertise))
        self._pool = pool = model_pool(config, settings, server, self._on_change)
        await pool.__aenter__()
        for name, one in settings.items():
            state.models[name] = ServedModel(one, name, config, pool)
        self._dht = Dht(identity, network, state_path=folder.path / "peers.msgpack", role=Role.NEWCOMER)
        await self._dht.start("", 0, sock=udp)
        reachability = Reachability(identity, network, self._dht, tcp.getsockname()[1])
        self._inference = Inference(identity.id, config.peers, state.load)
        service = Service(
            identity.id,
            state.models,
            self._dht,
            reachability,
            self._inference,
            status=state.status,
        )
        self._listener = await serve(
            "",
            0,
            sock=tcp,
            identity=identity,
            network=network,
            user_agent=USER_AGENT,
            on_stream=service.handle,
            load=state.load,
            policy=config.peers.policy(identity.id),
            invited=Invitations(folder.path).good,
        )
        # A bug in a handler ends the node, rather than only the request that met it.
        background.append(group.create_task(self._listener.wait_closed(), name="listener"))
        background.append(group.create_task(self._dht.wait(), name="dht"))
        self._dht.join(seeds)
        background.append(group.create_task(reachability.run(), name="reachability"))
        self._emit(
            {
                "event": "starting",
                "worker_id": worker_id,
                "address": address,
                "advertised": list(state.addresses),
                "machine": machine(),
                "server": f"{server.version}: {server.reason}" if server else "none: others run it",
                "models": list(state.models),
            }
        )
        if config.gateway is not None:
            self._gateway = self._open_gateway(config.gateway, f"{worker_id}@{address}", identity, network)
            await self._gateway.start()
        url = self._gateway.url if self._gateway is not None else None
        host, port = tcp.getsockname()[:2]
        if config.mdns and not ip_address(host).is_loopback:
            state.lan = _lan(network, self._dht)
            background.append(group.create_task(state.lan.run(host, port), name="mdns"))
        folder.publish(
            {
                "pid": os.getpid(),
                "worker_id": worker_id,
                "address": address,
                "network": network.name,
                "secret": network.secret.hex() if network.secret else None,
                "gateway": url,
            }
        )
        await self._start_models()
        if self._stop.is_set():
            return
        self._announcer = Announcer(self._dht, state.describers)
        background.append(group.create_task(self._announcer.run(), name="announcer"))
        background.append(group.create_task(self._watch(state, tcp, reachability), name="monitor"))
        background.append(group.create_task(self._twin(self._dht), name="twin"))
        with contextlib.suppress(TimeoutError):
            # Whoever waits for "ready" may look it up at once.
            async with asyncio.timeout(ANNOUNCE_PATIENCE):
                await self._announcer.told.wait()
        ready = [name for name, model in state.models.items() if model.ready]
        self._emit(
            {"event": "ready", "worker_id": worker_id, "address": address, "gateway": url, "models": ready}
        )
        for where, reason in self._dht.unreached.items():
            if where in seeds:
                self._emit({"event": "unreached", "address": format_address(*where), "error": reason})

    def _open_gateway(self, address: str, entry: str, identity: Identity, network: Network) -> Gateway:
        """The OpenAI API of this node; it enters the mesh through the node itself. Raises ConfigurationError."""
        from node.gateway.server import Gateway, mesh_client  # noqa: PLC0415 - aiohttp loads while the wire listens

        assert self._state is not None
        assert self._listener is not None
        return Gateway(
            address,
            mesh_client(entry, network, identity, self._listener.connect_within),
            self.config.data_dir,
            settings=self.config.api,
            or_next=not self.loaded.explicit("gateway"),
            status=self._state.status,
        )

    async def _twin(self, dht: Dht) -> None:
        """Stop if another running node has this identity and was there before; else tell of it.

        Raises ConfigurationError.
        """
        twin = await dht.duplicate()
        where = format_address(*twin.address)
        if twin.later:
            raise ConfigurationError(
                f"the node at {where} runs with the identity of this one",
                "Two nodes need two identities: delete identity.key in the data folder of the copied one.",
                exit_code=EXIT_IDENTITY,
            )
        log.error("a node at %s was started with the identity of this one; it has been told to stop", where)

    def _on_change(self, name: str, change: Change) -> None:
        """A model's server changed its state."""
        assert self._state is not None
        self._state.models[name].changed(change)
        self._changed.set()

    async def _start_models(self) -> None:
        """Start every model; returns when all can answer or never will, or when asked to stop.

        Raises ConfigurationError where none ever will.
        """
        assert self._state is not None
        models = self._state.models
        async with asyncio.TaskGroup() as group:
            stop = group.create_task(self._stop.wait())
            starting = {group.create_task(self._start_model(model)) for model in models.values()}
            pending: set[asyncio.Task[Any]] = set(starting)
            while pending and not stop.done():
                _, pending = await asyncio.wait({*pending, stop}, return_when=asyncio.FIRST_COMPLETED)
                pending.discard(stop)
            for task in (stop, *pending):
                task.cancel()
        problems = [task.result() for task in starting if not task.cancelled()]
        if len(problems) == len(models) and all(problems):
            raise ConfigurationError(
                str(problems[0]), "Check the model file and the server's arguments.", exit_code=EXIT_MODEL
            )

    async def _start_model(self, model: ServedModel) -> str | None:
        try:
            if model.settings.autostart:
                await model.load()
            else:
                await model.identify()
        except (SidecarError, OSError) as error:
            self._emit({"event": "model_failed", "model": model.name, "error": str(error)})
            return f"{model.name} cannot be started: {error}"
        return None

    async def _watch(self, state: NodeState, sock: socket.socket, reachability: Reachability) -> None:
        """Look at the machine now and then, and tell the announcer when something may have changed."""
        assert self._announcer is not None
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if loop.time() >= due:
                await state.sample()
                state.addresses = advertised(sock, self.config.advertise, reachability.outside)
                due = loop.time() + INTERVAL
            self._changed.clear()
            self._announcer.changed()
            try:
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _shutdown(self) -> None:
        """Every step of going down, each tried even where one before it failed."""
        errors = []
        for step in (self._withdraw, self._drain, self._stop_models, self._stop_dht):
            try:
                await step()
            except Exception as error:  # noqa: BLE001 - raised below, after the other steps
                errors.append(error)
        if errors:
            raise ExceptionGroup("the node did not stop cleanly", errors)

    async def _withdraw(self) -> None:
        if self._announcer is not None:
            await self._announcer.withdraw()

    async def _drain(self) -> None:
        if self._listener is None:
            return
        async with asyncio.TaskGroup() as group:
            hurry = group.create_task(self._hurry.wait())
            drained = group.create_task(self._close_doors(self.config.drain_seconds))
            await asyncio.wait({hurry, drained}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not drained.done():
                await self._close_doors(0)

    async def _close_doors(self, grace: float) -> None:
        """Accept nothing more and let what runs end: requests of peers and of the gateway together."""
        assert self._listener is not None
        async with asyncio.TaskGroup() as group:
            if self._gateway is not None:
                group.create_task(self._gateway.close(grace))
            group.create_task(self._listener.close(grace))

    async def _stop_models(self) -> None:
        if self._inference is not None:
            await self._inference.close()
        if self._pool is not None:
            await self._pool.__aexit__(None, None, None)

    async def _stop_dht(self) -> None:
        if self._dht is not None:
            await self._dht.stop()


def _lan(network: Network, dht: Dht) -> Lan:
    """What looks for peers on the local network."""
    from mesh.lan import Lan  # noqa: PLC0415 - zeroconf costs memory that a node without mDNS saves

    return Lan(network, lambda addresses: dht.join(addresses, found="lan"))


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for every signal that asks the process to end."""
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
