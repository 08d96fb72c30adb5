"""Two ends of a connection in memory, listeners, and identities for the wire's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from mesh.admission import AdmissionPolicy
from mesh.connection import ConnectionState
from mesh.events import Event
from mesh.identity import Identity
from mesh.limits import INITIAL_CREDIT, MAX_STREAMS, REKEY_AFTER_FRAMES
from mesh.network import Network
from mesh.noise import CipherState
from mesh.transport import Handler, Listener, Stream, serve

ALICE = Identity(bytes([1]) * 32)
BOB = Identity(bytes([2]) * 32)
OPEN = Network()
PRIVATE = Network("ours", bytes([3]) * 32)


def no_load() -> Mapping[str, Any]:
    return {}


async def echo(stream: Stream) -> None:
    await stream.send_head({"method": stream.method, **stream.meta})
    size = 0
    while (data := await stream.read()) is not None:
        size += len(data)
        await stream.send(data)
    await stream.end({"size": size})


@asynccontextmanager
async def listening(
    handler: Handler = echo, network: Network = OPEN, policy: AdmissionPolicy | None = None, **options: Any
) -> AsyncIterator[Listener]:
    """BOB's listener; closed afterwards, it has let go of everybody."""
    listener = await serve(
        "127.0.0.1", 0, identity=BOB, network=network, on_stream=handler, policy=policy, **options
    )
    try:
        yield listener
    finally:
        await listener.close()
        assert not listener.connections
        assert listener.admission.half_open == listener.admission.established == 0
        listener.admission.validate()


class Link:
    """An initiator and a responder, with the bytes between them in `to_responder` and `to_initiator`.

    Every step validates both ends.
    """

    def __init__(
        self,
        *,
        max_streams: int = MAX_STREAMS,
        rekey_after: int = REKEY_AFTER_FRAMES,
        window: int = INITIAL_CREDIT,
        load: Callable[[], Mapping[str, Any]] = no_load,
        cipher: Callable[[bytes], CipherState] = CipherState,
    ) -> None:
        one, two = bytes([4]) * 32, bytes([5]) * 32
        self.now = 0.0
        self.initiator = ConnectionState(
            initiator=True,
            send=cipher(one),
            receive=cipher(two),
            now=0.0,
            load=no_load,
            peer_max_streams=max_streams,
            peer_window=window,
            rekey_after=rekey_after,
        )
        self.responder = ConnectionState(
            initiator=False,
            send=cipher(two),
            receive=cipher(one),
            now=0.0,
            load=load,
            max_streams=max_streams,
            rekey_after=rekey_after,
        )
        self.to_responder = bytearray()
        self.to_initiator = bytearray()

    def collect(self) -> None:
        """Move what both ends want to send onto the link."""
        self.to_responder += b"".join(self.initiator.outbox.pull(1 << 30))
        self.to_initiator += b"".join(self.responder.outbox.pull(1 << 30))
        self.validate()

    def deliver(self) -> tuple[list[Event], list[Event]]:
        """Hand over everything once: the events at the responder, and those at the initiator."""
        self.collect()
        there, back = bytes(self.to_responder), bytes(self.to_initiator)
        self.to_responder.clear()
        self.to_initiator.clear()
        at_responder = self.responder.receive(there, self.now)
        at_initiator = self.initiator.receive(back, self.now)
        self.validate()
        return at_responder, at_initiator

    def settle(self) -> tuple[list[Event], list[Event]]:
        """Deliver until nobody has anything to say."""
        at_responder: list[Event] = []
        at_initiator: list[Event] = []
        ends = (self.initiator, self.responder)
        while self.to_responder or self.to_initiator or any(end.outbox.waiting for end in ends):
            one, two = self.deliver()
            at_responder += one
            at_initiator += two
        return at_responder, at_initiator

    def validate(self) -> None:
        self.initiator.validate()
        self.responder.validate()
