"""Every endpoint of a llama.cpp server as a method. Names and bodies are llama-server's own.

Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md. Anything that is not
here goes through `request` (raw bytes), `call` (decoded JSON) or `stream_events` (decoded events).

Unless a method says otherwise it raises BackendError for an error answer, BackendUnreachable,
SidecarTimeout after `timeout` seconds, and SidecarStopped when the server is being stopped.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from sidecar.transport import HttpClient, Json, Response, error_of

__all__ = ["Response", "SidecarClient"]

Object = dict[str, Any]


class SidecarClient(HttpClient):
    """The API of one server. `stream=True` has a method of its own, `stream_events`, for any endpoint."""

    quiet_until = 0.0
    """Until then, on the clock of `time.monotonic()`, whoever merely watches the server should leave it alone: it
    notices that nobody waits for a whole answer any more once nothing has happened on it for a second."""

    # ── generating ──────────────────────────────────────────────────────────────────────────────

    async def completion(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /completion: llama.cpp's own completion; `prompt` may be text or token ids."""
        return await self._object("POST", "/completion", body, timeout)

    async def chat(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /v1/chat/completions."""
        return await self._object("POST", "/v1/chat/completions", body, timeout)

    async def completions(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /v1/completions."""
        return await self._object("POST", "/v1/completions", body, timeout)

    async def responses(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /v1/responses."""
        return await self._object("POST", "/v1/responses", body, timeout)

    async def messages(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /v1/messages (the Anthropic form)."""
        return await self._object("POST", "/v1/messages", body, timeout)

    async def infill(self, body: Mapping[str, Json], *, timeout: float | None = None) -> Object:
        """POST /infill: text between `input_prefix` and `input_suffix`; NotSupported by most models."""
        return await self._object("POST", "/infill", body, timeout)

    def stream_completion(
        self, body: Mapping[str, Json], *, idle_timeout: float | None = None
    ) -> AsyncGenerator[Json, None]:
        """POST /completion, streamed; the last object has `stop: true`, usage and timings."""
        return self.stream_events("/completion", body, idle_timeout=idle_timeout)

    def stream_chat(
        self, body: Mapping[str, Json], *, idle_timeout: float | None = None
    ) -> AsyncGenerator[Json, None]:
        """POST /v1/chat/completions, streamed."""
        return self.stream_events("/v1/chat/completions", body, idle_timeout=idle_timeout)

    async def transcribe(
        self, audio: bytes, *, filename: str = "audio.wav", timeout: float | None = None
    ) -> Object:
        """POST /v1/audio/transcriptions with the bytes of an audio file."""
        boundary = secrets.token_hex(16)
        name = re.sub(r'["\\\r\n]', "_", filename)
        head = f'Content-Disposition: form-data; name="file"; filename="{name}"'
        body = f"--{boundary}\r\n{head}\r\n\r\n".encode() + audio + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        answer: Object = await self.call("POST", "/v1/audio/transcriptions", body, headers, timeout=timeout)
        return answer

    # ── counting and converting ─────────────────────────────────────────────────────────────────

    async def tokenize(
        self,
        text: str,
        *,
        add_special: bool = False,
        parse_special: bool = True,
        timeout: float | None = None,
    ) -> list[int]:
        """POST /tokenize: the token ids of `text`."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = (await self._object("POST", "/tokenize", body, timeout))["tokens"]
        return tokens

    async def detokenize(self, tokens: Sequence[int], *, timeout: float | None = None) -> str:
        """POST /detokenize: the text of token ids."""
        body = {"tokens": list(tokens)}
        return str((await self._object("POST", "/detokenize", body, timeout))["content"])

    async def apply_template(
        self, messages: Sequence[Mapping[str, Json]], *, timeout: float | None = None, **options: Json
    ) -> str:
        """POST /apply-template: the prompt that the model's chat template makes of `messages`."""
        body = {"messages": list(messages), **options}
        return str((await self._object("POST", "/apply-template", body, timeout))["prompt"])

    async def count_chat_tokens(self, body: Mapping[str, Json], *, timeout: float | None = None) -> int:
        """POST /v1/chat/completions/input_tokens: the prompt tokens of a chat request."""
        answer = await self._object("POST", "/v1/chat/completions/input_tokens", body, timeout)
        return int(answer["input_tokens"])

    async def count_message_tokens(self, body: Mapping[str, Json], *, timeout: float | None = None) -> int:
        """POST /v1/messages/count_tokens."""
        return int((await self._object("POST", "/v1/messages/count_tokens", body, timeout))["input_tokens"])

    async def embeddings(self, texts: Sequence[str], *, timeout: float | None = None) -> list[list[float]]:
        """POST /v1/embeddings: one vector for each text; the server must run with `embeddings`."""
        answer = await self._object("POST", "/v1/embeddings", {"input": list(texts)}, timeout)
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return [list(row["embedding"]) for row in rows]

    async def rerank(
        self, query: str, documents: Sequence[str], *, timeout: float | None = None
    ) -> list[tuple[int, float]]:
        """POST /v1/rerank: (index, score) of every document, best first; needs a reranking model."""
        body = {"query": query, "documents": list(documents)}
        results = (await self._object("POST", "/v1/rerank", body, timeout))["results"]
        scores = [(int(row["index"]), float(row["relevance_score"])) for row in results]
        return sorted(scores, key=lambda pair: -pair[1])

    # ── the server itself ───────────────────────────────────────────────────────────────────────

    async def health(self, *, timeout: float | None = None) -> bool:
        """GET /health: True for 200, False for any other answer (503 while the model loads)."""
        async with await self.request("GET", "/health", timeout=timeout) as response:
            return response.status == 200

    async def models(self, *, timeout: float | None = None) -> list[Object]:
        """GET /v1/models."""
        return list((await self._object("GET", "/v1/models", None, timeout))["data"])

    async def props(self, *, timeout: float | None = None) -> Object:
        """GET /props: context, slots, chat template, build."""
        return await self._object("GET", "/props", None, timeout)

    async def slots(self, *, timeout: float | None = None) -> list[Object]:
        """GET /slots; polling it keeps an idle server awake."""
        return list(await self.call("GET", "/slots", timeout=timeout))

    async def slot_action(
        self, slot: int, action: str, body: Mapping[str, Json] | None = None, *, timeout: float | None = None
    ) -> Object:
        """POST /slots/:id?action=save|restore|erase."""
        return await self._object("POST", f"/slots/{slot}?action={action}", body or {}, timeout)

    async def lora_adapters(self, *, timeout: float | None = None) -> list[Object]:
        """GET /lora-adapters."""
        return list(await self.call("GET", "/lora-adapters", timeout=timeout))

    async def metrics(self, *, timeout: float | None = None) -> dict[str, float]:
        """GET /metrics as name → value, without the `llamacpp:` prefix.

        Its averages are over the time since the last scrape: have only one scraper.
        """
        async with await self.request("GET", "/metrics", timeout=timeout, idle_timeout=timeout) as response:
            data = await response.read()
            if response.status >= 400:
                raise error_of(response.status, data)
        values = {}
        for line in data.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                with contextlib.suppress(ValueError):
                    values[name.removeprefix("llamacpp:")] = float(value)
        return values

    async def _object(
        self, method: str, path: str, body: Mapping[str, Json] | None, timeout: float | None
    ) -> Object:
        answer: Object = await self.call(method, path, body, timeout=timeout)
        return answer
