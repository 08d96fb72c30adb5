"""Depths, signposts and samples of popular models; pages of large keys."""

from __future__ import annotations

from dataclasses import replace

from mesh.dht.datagrams import Tokens
from mesh.dht.gather import Gathering
from mesh.dht.limits import TOKEN_ROTATION
from mesh.dht.lookups import within_one_answer
from mesh.dht.shards import MERGE_AT, SETTLE, SPLIT_AT, Depth, depth_flags, flagged_depth, sibling
from mesh.errors import MalformedMessage
from mesh.frames import End, encode
from mesh.limits import MAX_PLAINTEXT
from mesh.records import MAX_DEPTH, shard_prefix
from tests.unit.test_records import make_record


def test_a_full_shard_splits_and_a_sparse_pair_merges_after_a_while() -> None:
    depth = Depth(2, since=0.0, count=SPLIT_AT - 1)
    assert not depth.should_split()
    depth.count = SPLIT_AT
    assert depth.should_split()
    depth.move(3, now=10.0)
    assert (depth.depth, depth.count) == (3, 1)
    assert not depth.may_merge(10.0 + SETTLE)
    assert depth.may_merge(10.1 + SETTLE)
    depth.count = MERGE_AT
    assert not depth.may_merge(1e9)
    assert not Depth(0, 0.0).may_merge(1e9)
    assert not Depth(MAX_DEPTH, 0.0, count=64).should_split()


def test_signposts_stay_few_at_every_depth() -> None:
    depth = Depth(6, 0.0, count=40)
    for shallower, probability in depth.signposts():
        workers_below = depth.count << (depth.depth - shallower)
        alive = 3 * workers_below * probability
        assert 18 <= alive <= 36 < SPLIT_AT


def test_flags_tell_the_depth_and_lies_are_outvoted() -> None:
    record = make_record()
    assert depth_flags(record, 0) == record.flags
    deep = replace(record, flags=depth_flags(record, 3))
    assert "depth:3" in deep.flags
    assert depth_flags(deep, 5) == record.flags | {"depth:5"}
    liar = replace(record, flags=frozenset({"depth:99999999999"}))
    odd = replace(record, flags=frozenset({"depth:-1", "depth:x", "depth:"}))
    assert flagged_depth([]) == flagged_depth([record, odd]) == 0
    assert flagged_depth([deep, deep, liar]) == 3
    assert flagged_depth([liar]) == MAX_DEPTH


def test_siblings_differ_in_the_last_bit() -> None:
    node_id = make_record().node_id
    for depth in (1, 7, 8, 9, 16):
        prefix = shard_prefix(node_id, depth)
        other = sibling(prefix, depth)
        assert int.from_bytes(prefix) ^ int.from_bytes(other) == 1 << (8 * len(prefix) - depth)
        assert sibling(other, depth) == prefix


def test_a_flood_of_models_fits_into_one_message_and_the_popular_stay() -> None:
    long = {f"{number:04}" + "\U0001f999" * 100: 1 for number in range(5000)}
    for flood in (long, {str(number): 2**32 for number in range(5000)}):
        kept = within_one_answer(flood | {"popular": 2**32 + 1, "a": 2**32 + 2})
        assert {"popular", "a"} < kept.keys()
        assert list(kept) == sorted(kept)
        assert len(encode(End(1, {"models": kept}))) > MAX_PLAINTEXT / 3
    assert len(kept) > 1024


def make_gathering(want: int = 3) -> Gathering[int]:
    def open_blob(blob: bytes) -> tuple[bytes, int, int]:
        if blob == b"bad":
            raise MalformedMessage("bad")
        return blob[:1], blob[1], blob[1]

    return Gathering(open_blob, bool, want, b"salt")


def test_the_newest_record_of_each_worker_is_gathered() -> None:
    gathering = make_gathering()
    assert gathering.take([b"id", b"token", b"", 2, [b"a\x01", b"a\x03", b"a\x02", b"bad", 7, None]]) == 3
    assert not gathering.enough
    assert gathering.values() == [3]
    assert gathering.count == 2
    assert not gathering.complete
    gathering.take([b"id", b"token", b"", 2, [b"b\x00"]])
    assert gathering.values() == [3], "not useful"
    assert gathering.complete
    gathering.take([b"id", b"token", b"", 9, [b"c\x01", b"d\x01"]])
    assert gathering.enough


def test_answers_of_other_shapes_are_left_out() -> None:
    gathering = make_gathering()
    shapes: list[list[object]] = [[], [b"id", b"token"], [1, 2, 3, "4", 5], [b"", b"", b"", -1, [b"a\x01"]]]
    for reply in shapes:
        assert gathering.take(reply) == 0
    assert gathering.values() == []


def test_one_liar_does_not_decide_the_count() -> None:
    gathering = make_gathering()
    for count in (3, 3, 10**9, 0, 0):
        gathering.take([b"", b"", b"", count, []])
    assert gathering.count == 3


def test_each_request_asks_for_another_page() -> None:
    gathering = make_gathering()
    pages = [gathering.arguments() for _ in range(3)]
    assert [page[0] for page in pages] == [b"salt"] * 3
    assert len({page[1] for page in pages}) == 3


def test_tokens_are_bound_to_host_and_time() -> None:
    tokens = Tokens(b"s" * 32)
    token = tokens.issue("192.0.2.1", 1000.0)
    assert tokens.valid(token, "192.0.2.1", 1000.0 + TOKEN_ROTATION)
    assert not tokens.valid(token, "192.0.2.1", 1000.0 + 2 * TOKEN_ROTATION)
    assert not tokens.valid(token, "192.0.2.2", 1000.0)
    assert not Tokens(b"t" * 32).valid(token, "192.0.2.1", 1000.0)
    assert not tokens.valid(b"", "192.0.2.1", 1000.0)
