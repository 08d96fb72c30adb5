"""An agent with tools: it asks the model, runs the tools that the model calls, and asks again.

    python examples/gateway/agent.py [QUESTION]

Use a model that was trained to call tools (`GATEWAY_MODEL`); the demo model answers without.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from openai import OpenAI

MOST_TURNS = 8

client = OpenAI(
    base_url=os.environ.get("GATEWAY_URL", "http://127.0.0.1:9471") + "/v1",
    api_key=os.environ.get("GATEWAY_KEY", "none"),
)


def now() -> str:
    """The time here."""
    return datetime.now().astimezone().isoformat(timespec="minutes")


def add(numbers: list[float]) -> float:
    """The sum of numbers."""
    return sum(numbers)


TOOLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "now": (now, {"type": "object", "properties": {}}),
    "add": (
        add,
        {
            "type": "object",
            "properties": {"numbers": {"type": "array", "items": {"type": "number"}}},
            "required": ["numbers"],
        },
    ),
}


def call(name: str, arguments: str) -> str:
    """Run a tool; what goes wrong is told to the model, which may try again."""
    try:
        function, _ = TOOLS[name]
        return json.dumps(function(**json.loads(arguments or "{}")))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error}"


def answer(question: str) -> str:
    """Go on until the model calls no more tools."""
    messages: list[Any] = [{"role": "user", "content": question}]
    tools: list[Any] = [
        {
            "type": "function",
            "function": {"name": name, "description": function.__doc__, "parameters": parameters},
        }
        for name, (function, parameters) in TOOLS.items()
    ]
    for _ in range(MOST_TURNS):
        reply = client.chat.completions.create(
            model=os.environ.get("GATEWAY_MODEL", "default"), messages=messages, tools=tools, max_tokens=500
        )
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for asked in message.tool_calls:
            if asked.type != "function":
                continue
            result = call(asked.function.name, asked.function.arguments)
            print(f"{asked.function.name}({asked.function.arguments}) = {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": asked.id, "content": result})
    return f"no answer after {MOST_TURNS} turns"


print(answer(" ".join(sys.argv[1:]) or "What is 17 + 25.5, and what time is it?"))
