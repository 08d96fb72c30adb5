"""`cluster up --kill-every`: nodes die and come back at their address until Ctrl-C, which ends them all."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.mesh_support import Home
from tests.support import seconds


def test_nodes_are_killed_and_come_back_until_ctrl_c(tmp_path: Path) -> None:
    home, folder = Home(tmp_path / "home"), tmp_path / "cluster"
    arguments = ["cluster", "up", "-n", "2", "--kill-every", "0.2", "--data-dir", str(folder), "--json"]
    try:
        with home.running(*arguments) as process:
            assert process.stdout is not None
            events = []
            for line in process.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "back":
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(seconds(40)) == 130
        assert [event["event"] for event in events] == ["ready", "ready", "killed", "back"]
        killed, back = events[-2:]
        assert killed["worker_id"] == back["worker_id"] in {event["worker_id"] for event in events[:2]}
        (before,) = (event for event in events[:2] if event["worker_id"] == back["worker_id"])
        for name in ("address", "gateway"):
            assert before[name]
            assert before[name] == killed[name] == back[name]
        assert home.marked.gone(10) == []
        assert not (folder / "cluster.json").exists()
    finally:
        home.marked.kill()
