"""llama.cpp from the xllamacpp wheel behind llama-server's command line: `python -m sidecar.embedded`.

Runs as a child process of the supervisor, never inside the node. It takes the arguments of llama-server
that QMesh uses, the API key from LLAMA_API_KEY, and exits as llama-server does: 1 for wrong arguments or
a wrong model. SIGTERM keeps its default action, so that it ends at once, also while loading and with
requests in flight. xllamacpp is the only heavy import.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from importlib.metadata import version
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}\n")  # llama-server's exit code for wrong arguments


def parser() -> argparse.ArgumentParser:
    """The command line; names and meanings are llama-server's."""
    p = _Parser(prog="python -m sidecar.embedded", allow_abbrev=False)
    p.add_argument("--version", action="store_true", help="print the version and exit")
    p.add_argument("--list-devices", action="store_true", help="print the devices and exit")
    p.add_argument("-m", "--model", help="GGUF file")
    p.add_argument("-a", "--alias", help="the model's name in answers")
    p.add_argument("--mmproj", help="projector GGUF for images and audio")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8080)
    p.add_argument("-c", "--ctx-size", type=int, default=0, help="tokens for all slots together")
    p.add_argument("-np", "--parallel", type=int, default=1, help="slots")
    p.add_argument("-ngl", "--n-gpu-layers", "--gpu-layers", type=int, default=-1)
    p.add_argument("-t", "--threads", type=int, default=-1)
    p.add_argument("-tb", "--threads-batch", type=int, default=-1)
    p.add_argument("--threads-http", type=int, default=-1)
    p.add_argument("-b", "--batch-size", type=int, default=2048)
    p.add_argument("-ub", "--ubatch-size", type=int, default=512)
    p.add_argument("-n", "--predict", "--n-predict", type=int, default=-1)
    p.add_argument("-s", "--seed", type=int, default=-1)
    p.add_argument("--metrics", action="store_true")
    p.add_argument("--props", action="store_true")
    p.add_argument("--slots", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--embedding", "--embeddings", action="store_true", dest="embedding")
    p.add_argument("--pooling", choices=["none", "mean", "cls", "last", "rank"])
    p.add_argument("--rerank", "--reranking", action="store_true", dest="rerank")
    p.add_argument("--jinja", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--chat-template", default="")
    p.add_argument("--kv-unified", action="store_true")
    p.add_argument("--no-warmup", action="store_true")
    p.add_argument("--no-mmap", action="store_true")
    p.add_argument("--fit", choices=["on", "off"], default="on")
    p.add_argument("--cache-ram", type=int, default=8192, help="MiB kept of earlier prompts")
    p.add_argument("-lv", "--verbosity", type=int, default=3)
    return p


def build_params(args: argparse.Namespace, api_key: str) -> Any:
    """xllamacpp's parameters for parsed arguments."""
    import xllamacpp as x  # noqa: PLC0415 - 100 MB; only for a real start

    params = x.CommonParams()
    params.model.path = args.model
    params.hostnames = [args.host]
    params.port = args.port
    params.api_keys = [api_key] if api_key else []
    params.n_ctx = args.ctx_size
    params.n_parallel = args.parallel
    params.n_gpu_layers = args.n_gpu_layers
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads if args.threads_batch < 0 else args.threads_batch
    params.n_threads_http = args.threads_http
    params.n_batch, params.n_ubatch = args.batch_size, args.ubatch_size
    params.n_predict = args.predict
    params.endpoint_metrics, params.endpoint_props = args.metrics, args.props
    params.endpoint_slots = args.slots
    params.use_jinja, params.chat_template = args.jinja, args.chat_template
    params.kv_unified = args.kv_unified
    params.warmup = not args.no_warmup
    params.fit_params = args.fit == "on"
    params.cache_ram_mib = args.cache_ram
    params.verbosity = args.verbosity
    params.ui = False
    if args.seed >= 0:
        params.sampling.seed = args.seed
    if args.alias:
        params.model_alias = {args.alias}
    if args.mmproj:
        params.mmproj.path = args.mmproj
    if args.no_mmap:
        params.load_mode = x.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.embedding = args.embedding or args.rerank
    pooling = "rank" if args.rerank else args.pooling
    if pooling:
        params.pooling_type = getattr(x.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    return params


def main(argv: list[str]) -> int:
    """Serve until killed; returns an exit code only for --version, --list-devices or an error."""
    args = parser().parse_args(argv)
    if args.version:
        print(f"version: xllamacpp {version('xllamacpp')}")  # noqa: T201 - that is what it is for
        return 0
    import xllamacpp as x  # noqa: PLC0415

    if args.list_devices:
        print("Available devices:")  # noqa: T201
        for device in x.get_device_info():
            print(f"  {device['name']}: {device['description']}")  # noqa: T201
        return 0
    if not args.model:
        print("error: --model is required", file=sys.stderr)  # noqa: T201
        return 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = x.Server(build_params(args, os.environ.get("LLAMA_API_KEY", "")))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        os._exit(1)  # llama.cpp's threads may still run; a normal exit could wait for them
    while server:
        signal.pause() if hasattr(signal, "pause") else time.sleep(3600)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
