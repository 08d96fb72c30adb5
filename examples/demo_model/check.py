"""Tries the demo model on a real llama.cpp: samples, stray bytes, unknown words, end tokens, speed.

Needs the ``xllamacpp`` wheel. Exits with 1 if one of the checks fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp
from generate import documents

COMPLETIONS = [
    "Once upon a time",
    "The little robot",
    "Tell me a story about a dragon.",
    "Why is the sky blue?",
    "Hello!",
    "Who are you?",
    "One day, a girl named Zora",
    "The capital of France is",
    "def main():",
    "The quick brown fox",
    "It was a dark and stormy night",
    "In the year 2050, ",
    "Привет, ",
    "The cat sat on",
]
CHATS: list[list[str]] = [
    ["Hello!"],
    ["Who are you?"],
    ["Tell me a story about a dragon."],
    ["Why is the sky blue?"],
    ["Tell me a story about a cat and a robot."],
    ["What is QMesh?"],
    ["What is 3 + 4?"],
    ["What is the capital of France?"],
    ["Write a Python function that sorts a list."],
    ["What does a cow say?"],
    ["My name is Zora.", "Tell me a short story.", "What is my name?"],
    ["Explain quantum mechanics in simple words.", "Thank you!"],
    ["¿Cómo estás?"],
    ["Tell me a joke."],
    ["Write a poem about the sea."],
    ["How do I make coffee?"],
]
EXPECTED = {
    "Who are you?": "QMesh demo model",
    "Tell me a story about a dragon.": "dragon",
    "Tell me a story about a cat and a robot.": "robot",
    "Why is the sky blue?": "blue light",
    "What is QMesh?": "node",
    "What does a cow say?": "moo",
    "What is the capital of France?": "demo model",
    "What is my name?": "Zora",
}
WORD = re.compile(r"[A-Za-z]+")


class Server:
    """The model in an llama.cpp server inside this process."""

    def __init__(self, model: Path, slots: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_parallel = slots
        params.n_ctx = 2048 * slots
        params.port = 0
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a request and return the parsed answer."""
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


class Report:
    """Prints samples and collects what is wrong with them."""

    def __init__(self) -> None:
        self.known = {
            word.lower()
            for document in documents(1, 20_000)
            for text, learn in document
            if learn
            for word in WORD.findall(text)
        }
        self.words = 0
        self.unknown: list[str] = []
        self.problems: list[str] = []

    def add(self, title: str, prompt: str, text: str, ended: bool) -> None:
        """Print one sample and check its characters and words."""
        print(f"--- {title}: {prompt!r}{'' if ended else ' (did not end)'}\n{text.strip()}\n")
        if not text.isascii():
            self.problems.append(f"not plain ASCII after {prompt!r}: {text!r}")
        if not text.strip():
            self.problems.append(f"nothing after {prompt!r}")
        found = [word.lower() for word in WORD.findall(text)]
        given = {word.lower() for word in WORD.findall(prompt)}
        self.words += len(found)
        self.unknown += [word for word in found if word not in self.known and word not in given]


def samples(server: Server, report: Report, limit: int) -> None:
    """Print completions and chats, greedy and sampled."""
    for title, options in (("greedy", {"temperature": 0.0}), ("sampled", {"seed": 7})):
        for prompt in COMPLETIONS:
            answer = server.post("/completion", prompt=prompt, n_predict=limit, **options)
            report.add(f"completion, {title}", prompt, answer["content"], answer["stop_type"] == "eos")
        for turns in CHATS:
            messages: list[dict[str, str]] = []
            for turn in turns:
                messages.append({"role": "user", "content": turn})
                answer = server.post("/v1/chat/completions", messages=messages, max_tokens=limit, **options)
                choice = answer["choices"][0]
                text = choice["message"]["content"]
                messages.append({"role": "assistant", "content": text})
                if title == "greedy" and EXPECTED.get(turn, "") not in text:
                    report.problems.append(f"no {EXPECTED[turn]!r} in the answer to {turn!r}")
                report.add(f"chat, {title}", turn, text, choice["finish_reason"] == "stop")


def long_texts(server: Server, report: Report) -> None:
    """Fill the context with the end tokens switched off and show the last part."""
    for title, options in (("greedy", {"temperature": 0.0}), ("sampled", {"seed": 3})):
        answer = server.post(
            "/completion", prompt="Once upon a time", n_predict=1900, ignore_eos=True, **options
        )
        report.add(f"the last of 1900 tokens, {title}", "Once upon a time", answer["content"][-1200:], True)


def speed(model: Path) -> None:
    """Print the tokens per second for one and for four requests at a time."""
    for slots in (1, 4):
        server = Server(model, slots)

        def generate(number: int, server: Server = server) -> int:
            answer = server.post(
                "/completion", prompt=f"Once upon a time {number}", n_predict=512, ignore_eos=True
            )
            return int(answer["tokens_predicted"])

        generate(0)
        begin = time.monotonic()
        with ThreadPoolExecutor(slots) as pool:
            tokens = sum(pool.map(generate, range(slots * 4)))
        seconds = time.monotonic() - begin
        print(f"{slots} at a time: {tokens / seconds:.0f} tokens/s")


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[2] / "sidecar" / "assets" / "qmesh-demo.gguf"
    parser.add_argument("model", type=Path, nargs="?", default=default)
    parser.add_argument("--limit", type=int, default=400, help="most tokens per sample")
    parser.add_argument("--no-speed", action="store_true", help="leave out the speed test")
    arguments = parser.parse_args()
    report = Report()
    server = Server(arguments.model, 1)
    samples(server, report, arguments.limit)
    long_texts(server, report)
    share = len(report.unknown) / max(1, report.words)
    print(
        f"{report.words} words, {100 * share:.2f} % of them not in the generator's text: "
        f"{' '.join(sorted(set(report.unknown)))}"
    )
    if share > 0.01:
        report.problems.append(f"{100 * share:.1f} % unknown words")
    if not arguments.no_speed:
        speed(arguments.model)
    for problem in report.problems:
        print("PROBLEM:", problem)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
