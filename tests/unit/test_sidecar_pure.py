"""Exit codes, server-sent events, GGUF headers, modes and command lines: bytes and numbers only."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sidecar.config import SidecarConfig, server_arguments
from sidecar.errors import (
    BackendError,
    ContextExceeded,
    InvalidRequest,
    ModelLoadFailed,
    ServerBusy,
    SidecarCrashed,
    backend_error,
)
from sidecar.exits import Cause, judge
from sidecar.gguf import GgufHeader, Value, read_header
from sidecar.modes import Mode, Settings, settle
from sidecar.sse import MAX_EVENT_BYTES, Event, EventParser, EventTooLarge
from sidecar.states import Plan
from tests.sidecar_support import DEMO

# ── exits ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "tail", "was_ready", "memory_kill", "cause"),
    [
        (1, ["error: invalid argument: --bad"], False, False, Cause.FATAL),
        (1, ["failed to load model"], False, None, Cause.FATAL),
        (1, ["couldn't bind HTTP server socket"], False, False, Cause.PORT),
        (1, ["ggml: failed to allocate buffer"], False, False, Cause.MEMORY),
        (-6, ["cudaMalloc failed: out of memory"], True, False, Cause.MEMORY),
        (-9, [], False, True, Cause.MEMORY),
        (-9, [], True, True, Cause.MEMORY),
        (-9, [], False, None, Cause.MEMORY),  # nobody else kills a loading server
        (-9, [], False, False, Cause.CRASH),
        (-9, [], True, None, Cause.CRASH),
        (1, ["some error"], True, False, Cause.CRASH),
        (0, [], True, False, Cause.CRASH),
        (-11, [], False, False, Cause.CRASH),
        (-4, [], False, False, Cause.FATAL),
        (127, ["cannot execute"], False, False, Cause.FATAL),
    ],
)
def test_exits_are_judged(
    code: int, tail: list[str], was_ready: bool, memory_kill: bool | None, cause: Cause
) -> None:
    verdict = judge(code, tail, was_ready=was_ready, memory_kill=memory_kill, port_taken=False)
    assert verdict.cause is cause
    assert verdict.message


def test_a_taken_port_needs_no_words() -> None:
    """A server's last lines may be lost with it."""
    for tail, was_ready, cause in (
        (["error: Failed to init server"], False, Cause.PORT),
        ([], False, Cause.PORT),
        (["error"], True, Cause.CRASH),
        (["out of memory"], False, Cause.MEMORY),
    ):
        assert judge(1, tail, was_ready=was_ready, memory_kill=False, port_taken=True).cause is cause


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


def test_error_bodies_become_exceptions() -> None:
    error = backend_error(
        400, {"type": "exceed_context_size_error", "message": "m", "n_prompt_tokens": 9, "n_ctx": 8}
    )
    assert isinstance(error, ContextExceeded)
    assert (error.prompt_tokens, error.context, error.message) == (9, 8, "m")
    assert type(backend_error(400, {"message": "bad"})) is InvalidRequest
    assert type(backend_error(503, "busy")) is ServerBusy
    assert type(backend_error(500, None)) is BackendError
    assert backend_error(502, None).message == "HTTP 502"


def test_a_copied_error_keeps_everything_but_the_traceback() -> None:
    error = backend_error(400, {"type": "exceed_context_size_error", "n_ctx": 8})
    twin = error.copy()
    assert twin is not error
    assert type(twin) is ContextExceeded
    assert (twin.status, twin.context, str(twin)) == (400, 8, str(error))
    crashed = SidecarCrashed("it crashed", log_tail=["one", "two"])
    assert str(crashed.copy()) == str(crashed)
    assert "| two" in str(crashed)


# ── server-sent events ──────────────────────────────────────────────────────────────────────────

STREAM = (
    b'\xef\xbb\xbfdata: {"a":1}\n\n'
    b":\n\n"
    b": ping\r\n\r\n"
    b"event: response.completed\r\ndata: one\r\ndata:two\r\n\r\n"
    b"data\rdata: \xc3\xa9\r\r"
    b"id: 7\nretry: 10\ndata:  spaced\n\n"
    b"event: nothing\n\n"
    b"data: never finished"
)
EVENTS = [
    Event(b'{"a":1}'),
    Event(b"one\ntwo", "response.completed"),
    Event(b"\n\xc3\xa9"),
    Event(b" spaced"),
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    parser, events, at = EventParser(), list[Event](), 0
    for cut in [*sorted(cuts), len(STREAM)]:
        events += parser.feed(STREAM[at:cut])
        at = cut
    assert events == EVENTS


def test_events_byte_by_byte() -> None:
    parser = EventParser()
    assert [event for i in range(len(STREAM)) for event in parser.feed(STREAM[i : i + 1])] == EVENTS


@pytest.mark.parametrize("piece", [b"x" * (1 << 20), b"data: " + b"x" * (1 << 20) + b"\n"])
def test_an_endless_event_is_refused(piece: bytes) -> None:
    parser = EventParser()
    with pytest.raises(EventTooLarge):
        for _ in range(MAX_EVENT_BYTES // len(piece) + 2):
            parser.feed(piece)


@given(st.binary())
def test_any_bytes_are_parsed_without_another_error(data: bytes) -> None:
    EventParser().feed(data)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────


def gguf(pairs: dict[str, tuple[int, bytes]], *, version: int = 3, count: int | None = None) -> bytes:
    data = b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs) if count is None else count)
    for key, (kind, value) in pairs.items():
        data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    return data


def text(value: str) -> tuple[int, bytes]:
    return 8, struct.pack("<Q", len(value)) + value.encode()


def number(value: int) -> tuple[int, bytes]:
    return 4, struct.pack("<I", value)


def strings(values: list[str]) -> tuple[int, bytes]:
    items = b"".join(text(value)[1] for value in values)
    return 9, struct.pack("<IQ", 8, len(values)) + items


PAIRS = {
    "general.architecture": text("llama"),
    "tokenizer.ggml.tokens": strings([f"t{i}" for i in range(5000)]),
    "llama.context_length": number(8192),
    "llama.block_count": number(32),
    "llama.embedding_length": number(4096),
    "llama.attention.head_count": number(32),
    "llama.attention.head_count_kv": number(8),
}


def header(tmp_path: Path, data: bytes) -> GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_header(path)


def test_header_of_a_known_shape(tmp_path: Path) -> None:
    model = header(tmp_path, gguf(PAIRS))
    assert (model.architecture, model.name, model.layers, model.train_context) == ("llama", "model", 32, 8192)
    # Llama-3-8B: 128 KiB of cache a token in f16
    assert model.cache_bytes_per_token == 128 * 1024
    assert model.memory(8192) > 1 << 30


def test_header_of_the_demo_model() -> None:
    model = read_header(DEMO)
    assert model.architecture == "llama"
    assert model.train_context >= 2048
    assert model.layers > 0
    assert model.file_bytes == DEMO.stat().st_size


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "only 0 bytes"),
        (b"<html>" + b" " * 40, "not GGUF"),
        (gguf(PAIRS, version=1), "version 1"),
        (gguf(PAIRS)[:200], "cut off"),
        (gguf({"a": (99, b"")}), "unknown value type 99"),
        (gguf({}, count=1 << 40), "metadata entries"),
        (gguf({"a": (9, struct.pack("<IQ", 8, 1 << 60))}), "cut off"),
        (gguf({"a": (9, struct.pack("<IQ", 9, 1))}), "nested"),
    ],
)
def test_broken_headers_say_what_and_what_to_do(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(ModelLoadFailed, match=says) as caught:
        header(tmp_path, data)
    assert "Download it again" in str(caught.value)


def test_a_missing_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="No such file"):
        read_header(tmp_path / "none.gguf")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_mutated_headers_raise_only_the_documented_error(noise: bytes, at: int) -> None:
    import tempfile

    small = {k: v for k, v in PAIRS.items() if "tokens" not in k}
    data = bytearray(gguf(small))
    data[at : at + len(noise)] = noise
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            model = read_header(Path(file.name))
        except ModelLoadFailed:
            return
        assert model.memory(100) >= 0


# ── modes ───────────────────────────────────────────────────────────────────────────────────────

GIB = 1 << 30


def model_of(size: int) -> GgufHeader:
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.context_length": 32768,
        "llama.block_count": 32,
        "llama.embedding_length": 4096,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
    }
    return GgufHeader(Path("m.gguf"), size, metadata)


@pytest.mark.parametrize(
    ("mode", "threads", "nice", "plan"),
    [
        (Mode.EFFICIENCY, 2, 10, Plan(4096, 2, None, 32)),
        (Mode.BALANCED, 4, 5, Plan(8192, 4, None, 32)),
        (Mode.PERFORMANCE, 8, 0, Plan(16384, 8, None, 32)),
    ],
)
def test_modes(mode: Mode, threads: int, nice: int, plan: Plan) -> None:
    settings = settle(mode, model_of(4 * GIB), cores=8, memory=256 * GIB)
    assert (settings.threads, settings.nice, settings.plan) == (threads, nice, plan)


def test_the_memory_share_bounds_slots_then_context() -> None:
    model = model_of(4 * GIB)
    tight = settle(Mode.BALANCED, model, cores=8, memory=12 * GIB).plan
    assert (tight.slots, tight.context) == (1, 8192)
    tighter = settle(Mode.BALANCED, model, cores=8, memory=10 * GIB).plan
    assert (tighter.slots, tighter.context) == (1, 2048)
    assert settle(Mode.BALANCED, model, cores=8, memory=GIB).plan == Plan(512, 1, None, 32)


def test_explicit_words_win_and_small_models_take_one_thread() -> None:
    model = model_of(4 * GIB)
    said = settle(Mode.EFFICIENCY, model, cores=8, memory=GIB, context=9000, slots=3, gpu_layers=5, threads=7)
    assert (said.plan, said.threads) == (Plan(9000, 3, 5, 32), 7)
    assert settle(Mode.PERFORMANCE, model_of(3 << 20), cores=8, memory=GIB).threads == 1


@given(st.sampled_from(Mode), st.integers(1, 256), st.integers(1 << 28, 1 << 42), st.integers(1, 1 << 40))
def test_more_memory_never_means_less(mode: Mode, cores: int, memory: int, size: int) -> None:
    model = model_of(size)
    less = settle(mode, model, cores=cores, memory=memory).plan
    more = settle(mode, model, cores=cores, memory=memory * 2).plan
    assert more.slots >= less.slots
    assert more.context >= less.context


# ── configuration ───────────────────────────────────────────────────────────────────────────────


def test_arguments_of_the_server() -> None:
    config = SidecarConfig(
        model=Path("/m/a b.gguf"), log_dir=Path("/l"), embeddings=True, extra_args=("--seed", "1")
    )
    arguments = server_arguments(config, Plan(2048, 4, 7), Settings(Plan(1, 1), 3, 0, "mean"), port=1234)
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--model"] == "/m/a b.gguf"
    assert (pairs["--ctx-size"], pairs["--parallel"]) == ("8192", "4")
    assert (pairs["--host"], pairs["--port"], pairs["--n-gpu-layers"]) == ("127.0.0.1", "1234", "7")
    assert arguments[-5:] == ["--embeddings", "--pooling", "mean", "--seed", "1"]
    assert not any("key" in argument for argument in arguments)
    assert config.file_name == "a_b"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "m", "backend_url": "http://x"},
        {"model": "m", "slots": 0},
        {"model": "m", "unknown": 1},
        {"backend_url": "ftp://x"},
    ],
)
def test_wrong_configurations_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SidecarConfig.model_validate({"log_dir": "/l"} | settings)
