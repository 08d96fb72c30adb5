"""anthropic-python on the mesh: `python examples/gateway/anthropic_messages.py [QUESTION]`."""

import os
import sys

from anthropic import Anthropic
from anthropic.types import MessageParam

client = Anthropic(
    base_url=os.environ.get("GATEWAY_URL", "http://127.0.0.1:9471"),
    api_key=os.environ.get("GATEWAY_KEY", "none"),
)
question = " ".join(sys.argv[1:]) or "Tell me a story about a fox."
messages: list[MessageParam] = [{"role": "user", "content": question}]

count = client.messages.count_tokens(model="default", messages=messages)
print(f"({count.input_tokens} tokens to read)")
with client.messages.stream(model="default", max_tokens=200, messages=messages) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
