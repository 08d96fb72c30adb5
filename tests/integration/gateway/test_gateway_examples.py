"""The examples do what they say, against a real node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.support import seconds

EXAMPLES = Path(__file__).parents[3] / "examples" / "gateway"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([sys.executable, "openai_chat.py", "Hello"], "answered by"),
        ([sys.executable, "anthropic_messages.py", "Hello"], "tokens to read"),
        ([sys.executable, "agent.py", "Hello"], ""),
        (["sh", "requests.sh"], "data: [DONE]"),
    ],
)
def test_examples(url: str, command: list[str], expected: str) -> None:
    done = subprocess.run(
        command,
        cwd=EXAMPLES,
        env={**os.environ, "GATEWAY_URL": url},
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout
    assert len(done.stdout) > 10


async def test_the_dashboard_shows_what_there_is(url: str, http: aiohttp.ClientSession) -> None:
    dashboard = (EXAMPLES / "grafana.json").read_text("utf-8")
    assert len(json.loads(dashboard)["panels"]) == 12
    async with http.post(
        f"{url}/v1/completions", json={"prompt": "A", "max_tokens": 4, "stream": True}
    ) as answer:
        assert answer.status == 200
        await answer.read()
    async with http.get(f"{url}/metrics") as answer:
        there = set(re.findall(r"^# HELP (\w+)", await answer.text(), re.MULTILINE))
    asked = set(re.findall(r"\b(?:qmesh|process)_\w+", dashboard))
    names = {re.sub(r"_bucket$", "", name) for name in asked}
    assert not names - there
