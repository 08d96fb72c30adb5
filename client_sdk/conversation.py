"""A conversation that keeps its own history."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from client_sdk.types import Completion, Token

if TYPE_CHECKING:
    from client_sdk.client import MeshClient


class Conversation:
    """Turns with a model. `options` (model, max_tokens, temperature …) hold for every turn.

    `messages` is the history in OpenAI's form; it may be read, saved and given to another conversation.
    A turn that fails or is left early changes nothing in it.
    """

    def __init__(
        self,
        client: MeshClient,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        self._client = client
        self._options = options
        self.messages: list[Mapping[str, Any]] = list(messages)
        if system is not None:
            self.messages.insert(0, {"role": "system", "content": system})
        self.last: Completion | None = None
        """The last answer, with its explanation."""

    async def stream(self, text: str) -> AsyncGenerator[Token, None]:
        """Say something; the answer streams. Raises what `MeshClient.chat_stream` raises."""
        turn = [*self.messages, {"role": "user", "content": text}]
        answer = self._client.chat_stream(turn, **self._options)
        async with aclosing(aiter(answer)) as tokens:
            async for token in tokens:
                yield token
        self.last = answer.completion()
        self.messages = [*turn, self.last.message or {"role": "assistant", "content": self.last.text}]

    async def say(self, text: str) -> str:
        """Say something and wait for the whole answer."""
        async with aclosing(self.stream(text)) as tokens:
            return "".join([token.text async for token in tokens])
