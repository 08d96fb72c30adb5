"""The blocking client does what the asynchronous one does; closing it ends what other threads wait for."""

from __future__ import annotations

import inspect
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from client_sdk import MeshClient, RouteEvent, SyncMeshClient
from mesh.errors import BadRequest, QMeshError
from node.cluster import Member
from tests.mesh_support import MODEL, PROMPT
from tests.support import seconds

pytestmark = pytest.mark.xdist_group("mesh")

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


def _public(cls: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def test_it_has_every_method() -> None:
    assert _public(MeshClient) <= _public(SyncMeshClient)


def test_every_method_works(members: list[Member]) -> None:
    events: list[RouteEvent] = []
    with SyncMeshClient(members[0].address, on_event=events.append) as mesh:
        assert mesh.status()["worker_id"] == members[0].worker_id
        assert {worker.id for worker in mesh.workers()} >= {member.worker_id for member in members}
        assert mesh.generate_stream(PROMPT, max_tokens=4, **GREEDY).read().usage["completion_tokens"] == 4

        talk = mesh.conversation(system="Be kind.", max_tokens=6, temperature=0, model=MODEL)
        first = talk.say("Hello")
        assert first
        assert "".join(token.text for token in talk.stream("And now?"))
        assert [message["role"] for message in talk.messages] == [
            "system", "user", "assistant", "user", "assistant",
        ]  # fmt: skip
        assert talk.messages[2]["content"] == first
        assert talk.last is not None
        assert talk.last.explain.worker
        assert talk.last.timings["predicted_n"] > 0

        body = {"prompt": PROMPT, "n_predict": 4, "temperature": 0, "ignore_eos": True}
        with mesh.request("/completion", body, model=MODEL) as answer:
            assert answer.status == 200
            assert json.loads(answer.read())["tokens_predicted"] == 4
            assert answer.explain.worker
            assert (answer.trailer or {})["timings"]["predicted_n"] == 4
        with mesh.request("/completion", {**body, "stream": True}, model=MODEL) as answer:
            assert answer.content_type.startswith("text/event-stream")
            assert b"".join(answer).count(b"data: ") >= 4
        with pytest.raises(QMeshError), mesh.request("/slots", {}, model=MODEL):
            pass
        with pytest.raises(BadRequest):
            mesh.embed(["text"], model=MODEL)  # the demo model makes none
        with mesh.request("/completion", {**body, "stream": True, "n_predict": 1900}, model=MODEL) as answer:
            next(iter(answer))  # and leave it
        with pytest.raises(RuntimeError, match="use `with`"):
            mesh.request("/completion", body).read()
    assert mesh.closed
    assert not [event for event in events if event.kind == "splice"]


def test_closing_ends_what_other_threads_wait_for(members: list[Member]) -> None:
    mesh = SyncMeshClient(members[0].address)
    mesh.generate(PROMPT, max_tokens=2, **GREEDY)
    begun = threading.Barrier(5)

    def ask(number: int) -> str:
        begun.wait(seconds(5))
        try:
            for _ in range(1000):
                mesh.generate(f"{PROMPT} {number}", max_tokens=1500, **GREEDY)
        except (QMeshError, RuntimeError) as error:
            return str(error)
        return "went on"

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask, number) for number in range(4)]
        begun.wait(seconds(5))
        time.sleep(0.05)
        mesh.close()
        ends = [one.result(seconds(10)) for one in asked]
    assert all("the client is closed" in end for end in ends), ends
    mesh.close()
