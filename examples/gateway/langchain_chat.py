"""LangChain on the mesh: `python examples/gateway/langchain_chat.py [QUESTION]`."""

import os
import sys

from langchain_openai import ChatOpenAI
from pydantic import SecretStr

model = ChatOpenAI(
    base_url=os.environ.get("GATEWAY_URL", "http://127.0.0.1:9471") + "/v1",
    api_key=SecretStr(os.environ.get("GATEWAY_KEY", "none")),
    model="default",
    max_completion_tokens=200,
)
for chunk in model.stream(" ".join(sys.argv[1:]) or "Tell me a story about a fox."):
    print(chunk.text, end="", flush=True)
print()
