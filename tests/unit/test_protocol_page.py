"""docs/protocol.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from mesh import limits
from mesh.errors import RETRYABLE_CODES, ErrorCode
from tests.protocol_example import block

PAGE = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()


def test_the_worked_example_is_what_the_code_makes() -> None:
    example = PAGE[PAGE.index("```\n# network name: example") :].strip()
    assert example == block(), "python -m tests.protocol_example prints what belongs there"


def test_the_error_codes_are_those_of_the_code() -> None:
    rows = re.findall(r"\| (\d+) \| `(\w+)` \| .* \| (yes|no) \|", PAGE)
    told = {int(code): (name, retry == "yes") for code, name, retry in rows}
    assert told == {code: (code.name.lower(), code in RETRYABLE_CODES) for code in ErrorCode}


def test_the_limits_are_those_of_the_code() -> None:
    for name, text in {
        "MAX_HANDSHAKE_MESSAGE": "each at most 1024 bytes",
        "HANDSHAKE_TIMEOUT": "has 5 s from",
        "MAX_FRAME": "17 to 65,535 bytes",
        "MAX_PLAINTEXT": "1 to 65,519 bytes",
        "REKEY_AFTER_FRAMES": "every 2^20 frames",
        "MAX_DATA": "at most 16,384 bytes",
        "MAX_TEXT": "at most 256 characters",
        "MAX_TOKEN": "at most 32 bytes",
        "MAX_META_DEPTH": "16 levels deep",
        "MAX_META_ITEMS": "4096 items",
        "MAX_STREAMS": "1024 where it is missing",
        "INITIAL_CREDIT": "65,536 where it is missing",
        "CREDIT_DEADLINE": "waited 30 s for credit",
        "PING_AFTER_IDLE": "no byte for 15 s",
        "DEAD_AFTER_IDLE": "after 45 s without",
        "MAX_PENDING_PONGS": "more than 16 that wait",
        "RESET_BURST": "a bucket of 100",
        "RESETS_PER_SECOND": "refilled with 10 a second",
        "MAX_HALF_OPEN_PER_NETWORK": "capped at 16 per",
        "MAX_HALF_OPEN": "at 256 in all",
        "MAX_CONNECTIONS_PER_PEER": "8 connections per node id",
        "MAX_CONNECTIONS": "4096 in all",
        "MESSAGES_PER_TURN": "at most 32 messages",
        "DEFAULT_PORT": "port 9470",
    }.items():
        assert text in PAGE
        value = int(getattr(limits, name))
        said = text.replace(",", "").replace("2^20", str(1 << 20))
        assert str(value) in re.findall(r"\d+", said), name
