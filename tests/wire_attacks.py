"""Hostile peers, as a process of their own: `python -m tests.wire_attacks NAME PORT [NODE_ID]`.

Prints "attacking" when the attack has begun and goes on until its input ends. Some attackers know the
network's secret and have valid keys; they break the rules only later. With a node id the target is a
real node of the open network, otherwise `tests.wire_node`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgpack

from mesh.errors import AuthenticationError
from mesh.frames import Data, Message, Open, Ping, Reset, encode, prefix_length
from mesh.handshake import Initiator
from mesh.identity import Identity, NodeId, parse_node_id
from mesh.network import Network
from mesh.noise import CipherState
from tests.wire_support import BOB, OPEN, PRIVATE

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
begun = asyncio.Event()


class Target:
    """Who is attacked."""

    port = 0
    node_id = BOB.id
    network = PRIVATE
    methods = ("tokens", "flood", "swallow")


def aim(port: int, node_id: NodeId | None = None) -> None:
    """Choose the target."""
    Target.port = port
    if node_id is not None:
        Target.node_id, Target.network = node_id, OPEN
        Target.methods = ("status", "status", "status")


@asynccontextmanager
async def socket() -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", Target.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def message_1(network: Network | None = None) -> tuple[Initiator, bytes]:
    initiator = Initiator(
        Identity(),
        network or Target.network,
        Target.node_id,
        ephemeral=secrets.token_bytes(32),
        user_agent="attacker",
    )
    return initiator, initiator.message_1(0)


class Peer:
    """A completed handshake; frames are made by hand."""

    def __init__(self, streams: Streams, cipher: CipherState) -> None:
        self.reader, self.writer = streams
        self.cipher = cipher

    def frame(self, plaintext: bytes) -> bytes:
        return prefix_length(self.cipher.encrypt(plaintext))

    async def send(self, *messages: Message) -> None:
        self.writer.write(self.frame(b"".join(map(encode, messages))))
        await self.writer.drain()
        await asyncio.sleep(0)  # drain() alone lets nobody else run while the socket takes everything

    async def until_closed(self) -> None:
        while await self.reader.read(65_536):
            pass


@asynccontextmanager
async def shaken_hands() -> AsyncIterator[Peer]:
    async with socket() as (reader, writer):
        initiator, message = message_1()
        writer.write(message)
        size = int.from_bytes(await reader.readexactly(2), "big")
        agreed = initiator.message_2(await reader.readexactly(size), 0)
        yield Peer((reader, writer), agreed.send)


async def half_open() -> None:
    """1,000 connections that say nothing."""
    begun.set()
    async with asyncio.TaskGroup() as group:
        for _ in range(1000):
            group.create_task(say_nothing())


async def say_nothing() -> None:
    while True:
        with suppress(OSError):
            async with socket() as (reader, _):
                await reader.read()
        await asyncio.sleep(1)


async def slow_writers() -> None:
    """Handshakes and frames that come byte by byte."""

    async def dribble(peer: Peer | None, writer: asyncio.StreamWriter) -> None:
        whole = message_1()[1] if peer is None else peer.frame(bytes(60_000))
        for byte in whole:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)

    async def one(authentic: bool) -> None:
        if authentic:
            async with shaken_hands() as peer:
                await dribble(peer, peer.writer)
        else:
            async with socket() as (_, writer):
                await dribble(None, writer)

    await forever(*(lambda authentic=bool(n % 2): one(authentic) for n in range(40)))


async def no_credit() -> None:
    """Readers that ask for endless answers and take nothing."""

    async def one() -> None:
        async with shaken_hands() as peer:
            await peer.send(*(Open(2 * n + 1, Target.methods[1], {}) for n in range(100)))
            while True:
                await peer.send(Ping(1))
                await asyncio.sleep(0.05)

    await forever(one, one)


async def length_bombs() -> None:
    """Lengths that promise far more than comes, and than is allowed."""

    async def before() -> None:
        async with socket() as (reader, writer):
            writer.write(b"\xff\xff" + bytes(600))
            await reader.read()

    async def after() -> None:
        async with shaken_hands() as peer:
            peer.writer.write(b"\xff\xff" + bytes(65_000))
            await peer.until_closed()

    async def short() -> None:
        async with shaken_hands() as peer:
            peer.writer.write(b"\x00\x05hello")
            await peer.until_closed()

    await forever(before, after, after, after, short)


async def reset_flood() -> None:
    """Requests that are cancelled at once, for ever."""

    async def one() -> None:
        async with shaken_hands() as peer:
            for sid in range(1, 100_000, 64):
                both = ((Open(n, Target.methods[0], {}), Reset(n, 7)) for n in range(sid, sid + 64, 2))
                await peer.send(*(message for pair in both for message in pair))

    await forever(one, one)


async def replays() -> None:
    """Frames sent twice or out of order, and an old message 1."""
    _, old = message_1()

    async def frames() -> None:
        async with shaken_hands() as peer:
            first, second = peer.frame(encode(Ping(1))), peer.frame(encode(Ping(2)))
            peer.writer.write(secrets.choice([first + first, second + first]))
            await peer.until_closed()

    async def handshake() -> None:
        async with socket() as (reader, writer):
            writer.write(old)
            await reader.read(1000)
            writer.write(prefix_length(bytes(40)))
            await reader.read()

    await forever(frames, handshake)


async def huge_msgpack() -> None:
    """Authentic frames full of depth, items and promises."""
    bombs = [
        b"\x91" * 60_000,
        msgpack.packb([0, 1, "tokens", {"k": [[]] * 30_000}]),
        b"\x94\x00\x01\xa6tokens\x81\xa1k\xdd\xff\xff\xff\xff",
        msgpack.packb([1, 1, bytes(60_000)]),
        msgpack.packb([0, 1, "tokens", {str(n): {} for n in range(8000)}]),
    ]

    async def one() -> None:
        async with shaken_hands() as peer:
            peer.writer.write(peer.frame(secrets.choice(bombs)))
            await peer.until_closed()

    await forever(one, one)


async def unknown_types() -> None:
    """Frames of thousands of messages that mean nothing or little."""
    noise = msgpack.packb([99, "from the future"]) * 3000

    async def one() -> None:
        async with shaken_hands() as peer:
            while True:
                peer.writer.write(peer.frame(noise))
                await peer.send(*(Ping(n) for n in range(1000)))

    await forever(one)


async def swallowed_uploads() -> None:
    """Bodies larger than the handler takes, on many streams at once."""

    async def one() -> None:
        async with shaken_hands() as peer:
            for n in range(200):
                sid = 2 * n + 1
                await peer.send(Open(sid, Target.methods[2], {}))
                await peer.send(*(Data(sid, bytes(16_000)) for _ in range(4)))
            await peer.until_closed()

    await forever(one, one)


async def wrong_secret() -> None:
    """Strangers who do not know the network's secret."""

    async def one() -> None:
        async with socket() as (reader, writer):
            _, message = message_1(Network("another", bytes(32)))
            writer.write(message)
            if await reader.read():
                raise AuthenticationError("a stranger was answered")

    await forever(*([one] * 8))


async def forever(*attacks: Callable[[], Awaitable[None]]) -> None:
    """Each attack again and again, as long as the node shuts it out with the usual errors."""

    async def again(attack: Callable[[], Awaitable[None]]) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await attack()
            await asyncio.sleep(0.005)

    begun.set()
    async with asyncio.TaskGroup() as group:
        for attack in attacks:
            group.create_task(again(attack))


ATTACKS: dict[str, Callable[[], Awaitable[None]]] = {
    one.__name__: one
    for one in (
        half_open,
        slow_writers,
        no_credit,
        length_bombs,
        reset_flood,
        replays,
        huge_msgpack,
        unknown_types,
        swallowed_uploads,
        wrong_secret,
    )
}


async def main(name: str) -> None:
    attack = asyncio.ensure_future(ATTACKS[name]())
    await begun.wait()
    print("attacking", flush=True)
    end = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([attack, end], return_when=asyncio.FIRST_COMPLETED)
    if attack.done():
        attack.result()  # an attack ends only by an error
    attack.cancel()
    await asyncio.wait([attack])


if __name__ == "__main__":
    os.nice(10)  # what is measured is the node, not who gets the machine
    aim(int(sys.argv[2]), parse_node_id(sys.argv[3]) if len(sys.argv) > 3 else None)
    asyncio.run(main(sys.argv[1]))
