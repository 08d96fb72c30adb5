"""A pair of transports in memory keeps a socket's promises, whatever its ends do."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.transport.memory import MemoryTransport, link

ENDS = st.sampled_from(["left", "right"])
STEPS = st.one_of(
    st.tuples(st.just("write"), ENDS, st.integers(0, 400)),
    st.tuples(st.just("turns"), ENDS, st.integers(1, 8)),
    st.tuples(st.sampled_from(["pause", "resume", "close", "abort"]), ENDS, st.just(0)),
)
ROOM = 97
"""Bytes that an end reads at once."""
HIGH, LOW = 200, 100


class End(asyncio.BufferedProtocol):
    """Keeps what it read, and in which order it was told what."""

    def __init__(self) -> None:
        self.buffer = bytearray(ROOM)
        self.read = bytearray()
        self.written = b""
        self.paused = False
        self.told: list[str] = []
        self.dropped = False
        """The other end was aborted: nothing more is read."""
        self.transport: MemoryTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.transport = transport
        transport.set_write_buffer_limits(HIGH, LOW)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= ROOM
        assert not self.told, "nothing is read behind the end"
        assert not self.dropped
        assert self.transport.is_reading()
        self.read += self.buffer[:nbytes]

    def eof_received(self) -> bool:
        assert not self.told
        self.told.append("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        assert "lost" not in self.told
        self.told.append("lost")

    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False


async def turn() -> None:
    """One turn of the event loop."""
    await asyncio.sleep(0)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_the_ends_behave_as_a_sockets(steps: list[tuple[str, str, int]]) -> None:
    asyncio.run(play(steps), debug=True)


async def play(steps: list[tuple[str, str, int]]) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    ends = {"left": End(), "right": End()}
    left, right = ends.values()
    link(left, right)
    for what, name, size in steps:
        end = ends[name]
        other = right if end is left else left
        transport, before = end.transport, bytes(other.read)
        match what:
            case "write":
                data = bytes((len(end.written) + n) % 251 for n in range(size))
                if not transport.is_closing() and not other.transport.is_closing():
                    end.written += data
                transport.write(data)
            case "pause":
                transport.pause_reading()
            case "resume":
                transport.resume_reading()
            case "close":
                transport.close()
            case "abort":
                other.dropped |= "lost" not in end.told
                transport.abort()
            case "turns":
                for _ in range(size):
                    await turn()
        if what != "turns":
            assert bytes(other.read) == before, "nothing is read in the turn it was written in"
        for one, its_other in ((left, right), (right, left)):
            assert one.written.startswith(its_other.read), "in order, once, and nothing else"
            unread = one.transport.get_write_buffer_size()
            if not one.transport.is_closing():
                assert one.paused or unread <= HIGH
                assert not one.paused or unread > LOW or its_other.transport.is_closing()
    await finish(left, right)
    assert not problems


async def finish(left: End, right: End) -> None:
    """What was written before an orderly end is read; an end of one side is the end of both."""
    first = next((one for one in (left, right) if one.transport.is_closing()), None)
    for end in (left, right):
        end.transport.resume_reading()
    for _ in range(2 + (len(left.written) + len(right.written)) // ROOM * 2):
        await turn()
    if first is None:
        assert not left.told
        assert not right.told
        assert right.read == left.written
        assert left.read == right.written
        left.transport.close()
        first = left
    for _ in range(4):
        await turn()
    second = right if first is left else left
    assert first.told[-1] == second.told[-1] == "lost"
    if not second.dropped and "eof" in second.told:
        assert second.read == first.written
    assert left.transport.get_write_buffer_size() == right.transport.get_write_buffer_size() == 0
