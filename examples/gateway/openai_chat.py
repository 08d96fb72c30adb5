"""openai-python on the mesh: `python examples/gateway/openai_chat.py [QUESTION]`."""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("GATEWAY_URL", "http://127.0.0.1:9471") + "/v1",
    api_key=os.environ.get("GATEWAY_KEY", "none"),
)
question = " ".join(sys.argv[1:]) or "Tell me a story about a fox."

print("models:", ", ".join(model.id for model in client.models.list()))

raw = client.chat.completions.with_raw_response.create(
    model="default",  # the model that most workers have
    messages=[{"role": "user", "content": question}],
    max_tokens=200,
    stream=True,
)
for chunk in raw.parse():
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print(f"\n\nanswered by {raw.headers['X-QMesh-Worker'][:12]} ({raw.headers['X-QMesh-Path']})")
