#!/usr/bin/env -S python3 -IS
"""A llama-server that misbehaves on request: for faults that a real one cannot be made to show.

An executable of its own, standard library only, quick to start. It takes llama-server's arguments that
the supervisor uses (others are ignored with their value) and the fault flags of `FAULTS`. It speaks
enough of the API to be supervised and to stream: token n is the text ` tn`.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time

FAULTS = {
    "--die-after-tokens": "exit in mid-stream after N tokens",
    "--die-code": "exit code of a death; negative: by that signal",
    "--die-while-loading": "exit with that code (negative: by that signal) while loading",
    "--die-after-ready": "exit that many seconds after becoming ready",
    "--load-seconds": "answer 503 for that long before becoming ready",
    "--load-silently": "sleep while loading, without log lines, work or I/O (1)",
    "--oom-above": "exit 1 with an out-of-memory message when --ctx-size is over N",
    "--hang-stream-after": "stop sending after N tokens, everything else works",
    "--hang-health-after": "after N generations accept connections but answer none",
    "--hang-metrics": "/metrics never answers (1)",
    "--freeze-work": "generations never produce a token, /health and /metrics work (1)",
    "--ignore-term": "ignore SIGTERM (1)",
    "--fork-grandchild": "leave a child process of its own that ignores SIGTERM and holds the log pipe (1)",
    "--flood-log": "write N bytes to the log per token",
    "--drop-first": "close the first N generation connections before answering",
    "--error-after": "send an error event after N tokens",
    "--cut-after": "close the connection in mid-stream after N tokens",
    "--wrong-key": "accept no key (1): a foreign server on our port",
    "--any-key": "accept every key (1): a foreign server on our port",
    "--token-delay": "seconds between tokens",
    "--only-first": "FILE:N: the faults apply to the first N starts only, counted in FILE",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--alias", default="fake")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads")
    parser.add_argument("--n-gpu-layers")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--embeddings", action="store_true")
    for flag, text in FAULTS.items():
        parser.add_argument(flag, help=text, type=str if flag == "--only-first" else float, default=None)
    args = parser.parse_args()
    if args.only_first:
        path, _, limit = args.only_first.rpartition(":")
        with open(path, "a+") as file:  # noqa: PTH123 - pathlib would double the start-up time
            starts = file.tell()
            file.write("x")
        if starts >= int(limit):
            for flag in FAULTS:
                setattr(args, flag.removeprefix("--").replace("-", "_"), None)
    return args


def die(code: float) -> None:
    sys.stdout.flush()
    if code < 0:
        os.kill(os.getpid(), -int(code))
        time.sleep(60)
    os._exit(int(code))


class Server:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.key = os.environ.get("LLAMA_API_KEY", "")
        self.loaded = False
        self.tokens = self.processing = self.generations = self.dropped = 0
        self.lock = threading.Lock()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((args.host, args.port))
        except OSError:
            print(f"srv start: couldn't bind HTTP server socket, hostname: {args.host}, port: {args.port}")
            die(1)
        self.listener.listen(128)

    def load(self) -> None:
        args = self.args
        print(f"srv load_model: loading model '{args.model}'", flush=True)
        if args.oom_above is not None and args.ctx_size > args.oom_above:
            print(
                f"ggml_backend_alloc: failed to allocate buffer for a context of {args.ctx_size}", flush=True
            )
            die(1)
        end = time.monotonic() + (args.load_seconds or 0)
        while time.monotonic() < end:
            time.sleep(min(0.05, max(0.0, end - time.monotonic())))
            if not args.load_silently:
                print("srv load_model: .", flush=True)
        if args.die_while_loading is not None:
            print("srv load_model: failed to load model", flush=True)
            die(args.die_while_loading)
        self.loaded = True
        print("srv init: model loaded", flush=True)

    def run(self) -> None:
        threading.Thread(target=self.load, daemon=True).start()
        if self.args.die_after_ready is not None:
            threading.Thread(target=self.die_later, daemon=True).start()
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def die_later(self) -> None:
        while not self.loaded:
            time.sleep(0.005)
        time.sleep(self.args.die_after_ready)
        die(self.args.die_code or 0)

    def serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.answer(connection)
            except (ConnectionError, ValueError):
                return

    def answer(self, connection: socket.socket) -> None:
        file = connection.makefile("rb")
        method, path, _ = file.readline().decode().split(" ", 2)
        headers = {}
        while (line := file.readline().strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(file.read(int(headers.get("content-length", 0))) or b"{}")
        args, path = self.args, path.partition("?")[0]
        if args.hang_health_after is not None and self.generations >= args.hang_health_after:
            time.sleep(3600)
        if path == "/health":
            status = 200 if self.loaded else 503
            return self.reply(
                connection, status, {"status": "ok"} if self.loaded else error(503, "unavailable_error")
            )
        denied = headers.get("authorization") != f"Bearer {self.key}"
        if (denied and not args.any_key) or args.wrong_key:
            return self.reply(connection, 401, error(401, "authentication_error"))
        if not self.loaded:
            return self.reply(connection, 503, error(503, "unavailable_error"))
        if path == "/props":
            settings = {"n_ctx": args.ctx_size // args.parallel}
            props = {
                "default_generation_settings": settings,
                "total_slots": args.parallel,
                "build_info": "fake",
            }
            return self.reply(connection, 200, props)
        if path == "/metrics":
            if args.hang_metrics:
                time.sleep(3600)
            lines = [
                f"llamacpp:tokens_predicted_total {self.tokens}",
                f"llamacpp:requests_processing {self.processing}",
            ]
            return self.reply(connection, 200, "\n".join(lines) + "\n")
        if path in ("/completion", "/v1/chat/completions") and method == "POST":
            return self.generate(connection, path, body)
        if path == "/echo":  # what arrived, for tests of what the client sends
            return self.reply(connection, 200, {"headers": headers, "body": body})
        return self.reply(connection, 404, error(404, "not_found_error"))

    def reply(self, connection: socket.socket, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        kind = "text/plain" if isinstance(body, str) else "application/json"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)

    def generate(self, connection: socket.socket, path: str, body: dict) -> None:  # type: ignore[type-arg]
        args = self.args
        with self.lock:
            self.generations += 1
            self.processing += 1
            drop = args.drop_first is not None and self.dropped < args.drop_first
            self.dropped += drop
        try:
            if drop:
                return
            if args.freeze_work:
                time.sleep(3600)
            count = int(body.get("n_predict", body.get("max_tokens", 16)))
            if body.get("stream"):
                self.stream(connection, path, count)
            else:
                self.whole(connection, path, count)
        finally:
            with self.lock:
                self.processing -= 1

    def whole(self, connection: socket.socket, path: str, count: int) -> None:
        text = "".join(f" t{n}" for n in range(count))
        self.tokens += count
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
        self.reply(
            connection,
            200,
            {"content": text, "stop": True} if path == "/completion" else {"choices": [choice]},
        )

    def stream(self, connection: socket.socket, path: str, count: int) -> None:
        args, chat = self.args, path != "/completion"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        for n in range(count):
            if args.die_after_tokens is not None and n >= args.die_after_tokens:
                die(args.die_code if args.die_code is not None else 3)
            if args.hang_stream_after is not None and n >= args.hang_stream_after:
                time.sleep(3600)
            if args.error_after is not None and n >= args.error_after:
                return self.chunk(connection, error(500, "server_error"))
            if args.cut_after is not None and n >= args.cut_after:
                return None
            if args.flood_log:
                flood(int(args.flood_log))
            if args.token_delay:
                time.sleep(args.token_delay)
            self.tokens += 1
            text = f" t{n}"
            self.chunk(
                connection,
                {"choices": [{"index": 0, "delta": {"content": text}}]}
                if chat
                else {"content": text, "stop": False},
            )
        timings = {"predicted_n": count, "predicted_per_second": 1000.0}
        if chat:
            self.chunk(
                connection,
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "timings": timings},
            )
            send_chunk(connection, b"data: [DONE]\n\n")
        else:
            self.chunk(connection, {"content": "", "stop": True, "timings": timings})
        connection.sendall(b"0\r\n\r\n")
        return None

    def chunk(self, connection: socket.socket, data: object) -> None:
        send_chunk(connection, b"data: " + json.dumps(data).encode() + b"\n\n")


def send_chunk(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))


def error(code: int, kind: str) -> dict[str, object]:
    return {"error": {"code": code, "message": f"fake {kind}", "type": kind}}


def flood(size: int) -> None:
    line = b"x" * 1023 + b"\n"
    while size > 0:
        size -= os.write(1, line[:size] if size < len(line) else line * min(64, size // len(line)))


def main() -> None:
    args = arguments()
    if args.version:
        print("version: 9999 (fake)")
        return
    if args.list_devices:
        print("Available devices:\n  CPU: fake")
        return
    if args.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.fork_grandchild:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
        import subprocess  # slow to import, rarely needed

        child = subprocess.Popen([sys.executable, "-IS", "-c", code])
        print(f"grandchild {child.pid}", flush=True)
    Server(args).run()


if __name__ == "__main__":
    main()
