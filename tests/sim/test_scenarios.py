"""The scenarios at sizes that fit into the test suite; `python -m tests.sim` runs the large ones."""

from __future__ import annotations

import asyncio

import pytest

from mesh.dht.shards import SPLIT_AT
from mesh.network import Network
from mesh.records import model_key, open_record, shard_prefix
from tests.sim import hostile, popular, scenarios
from tests.sim.population import Member, Population
from tests.sim.world import World


def test_a_walk_finds_the_nearest_nodes_in_few_hops() -> None:
    world = World(1)
    result = world.run(scenarios.routing(world, 100, lookups=40))
    assert result["nearest_20_found"] >= 0.99
    assert result["requests"] <= 24
    assert result["p50_round_trips"] <= 8.5


def test_lookups_succeed_under_churn_and_loss() -> None:
    world = World(2, loss=0.05)
    result = world.run(scenarios.churn(world, 30, minutes=1.5, life=200))
    assert result["lookups"] >= 200
    assert result["success"] >= 0.99
    assert result["p99_s"] <= 4


def test_lookups_succeed_among_liars() -> None:
    world = World(3)
    result = world.run(hostile.liars(world, 40, share=0.3, lookups=50))
    assert result["success"] >= 0.98
    assert result["p99_s"] <= 4


def test_two_halves_merge_when_they_hear_of_each_other() -> None:
    world = World(4)
    assert world.run(scenarios.halves(world, 24))["merged_after_s"] <= 90


def test_the_mesh_heals_when_its_bootstrap_nodes_come_back() -> None:
    world = World(5)
    assert world.run(scenarios.bootstrap_lost(world, 24))["healed_after_s"] <= 60


def test_the_mesh_heals_after_a_partition() -> None:
    world = World(6)
    assert world.run(scenarios.partition(world, 16))["healed_after_s"] <= 60


def test_a_popular_model_overloads_no_key_and_is_sampled_evenly() -> None:
    world = World(7)
    result = world.run(popular.popular(world, 12, workers=70, samples=150, settle=240))
    assert result["success"] == 1
    assert result["fullest_key"] <= 64
    assert result["stores_per_s_and_key_max"] <= 1
    assert result["workers_met"] >= 50
    assert max(result["depths"]) >= 1
    assert result["uniform_p"] >= 0.001


def test_the_catalogue_of_many_models_is_complete() -> None:
    world = World(15)
    result = world.run(popular.catalogue(world, 72, settle=130, readers=3))
    assert result["listed_least"] == 72
    assert (result["left"], result["left_but_listed"]) == (8, 0)
    assert result["fullest_key"] <= 64


def test_a_newcomer_leaves_nothing_in_the_full_shards_that_it_passes() -> None:
    world = World(14)

    async def scenario() -> None:
        population = Population(world)
        await population.grow(12)
        await asyncio.sleep(20)
        deep: list[popular.Hand] = []
        while len(deep) < 4:  # those who fill the two shards of depth 1 go on with what they stored there
            hand = popular.Hand(population.rng.choice(population.members), population)
            await hand.announce("hot")
            deep += [hand] * (hand.depth.depth == 2)
        node_id = deep[-1].identity.id
        key = model_key(population.network, "hot", 1, shard_prefix(node_id, 1))
        held = population.members[0].protocol.storage.sample(key, b"", 0, world.wall())
        workers = [open_record(blob, population.network, key, world.wall()).node_id for blob in held]
        assert len(workers) >= SPLIT_AT
        assert node_id not in workers
        await population.stop()

    world.run(scenario())


def test_a_node_far_from_a_key_is_no_holder_of_its_own_record() -> None:
    """Met on the way to the key it would tell that there is no worker but itself."""
    world = World(16)

    async def scenario() -> None:
        population = Population(world)
        await population.grow(48)
        await asyncio.sleep(30)
        key = model_key(population.network, "m")

        def distance(member: Member) -> int:
            return int.from_bytes(member.protocol.source_node.id) ^ int.from_bytes(key)

        *_, farthest = ordered = sorted(population.members, key=distance)
        for member in (ordered[0], farthest):
            await member.announce("m")
        holders = [
            sum(1 for _ in member.protocol.storage.sample(key, b"", 0, world.wall())) for member in ordered
        ]
        assert holders[0] == 2
        assert holders[-1] == 0
        for asker in (farthest, ordered[24]):
            assert len(await asker.dht.lookup("m")) == 2
        await population.stop()

    world.run(scenario())


def test_the_same_seed_gives_the_same_run() -> None:
    def once() -> tuple[dict[str, object], int]:
        world = World(8)
        return world.run(scenarios.bootstrap_lost(world, 12)), world.datagrams

    assert once() == once()


def test_a_failure_names_the_seed() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        World(42).run(fail())
    assert "seed: 42" in caught.value.__notes__[0]


def test_a_node_that_slept_comes_back_by_itself() -> None:
    world = World(9)

    async def scenario() -> None:
        population = Population(world)
        await population.grow(12)
        await asyncio.sleep(30)
        sleeper, other = population.members[3], population.members[7]
        await sleeper.announce("m")
        world.reaches = lambda a, b: sleeper.address[0] not in (a, b)
        await asyncio.sleep(600)
        assert await other.dht.lookup("m") == []
        assert all(contact.address != sleeper.address for contact in other.table)
        world.reaches = None
        await asyncio.sleep(40)
        assert await sleeper.announce("m") >= 10
        assert len(await other.dht.lookup("m")) == 1
        await population.stop()

    world.run(scenario())


def test_a_node_that_moved_to_another_address_is_found_there() -> None:
    world = World(13)

    async def scenario() -> None:
        population = Population(world)
        await population.grow(10)
        await asyncio.sleep(60)
        mover = population.members[4]
        old = mover.address
        await mover.dht.stop()
        mover.address = (world.new_host(), old[1])
        await mover.start([population.members[0].address])
        for _ in range(3):
            await asyncio.sleep(60)
            await mover.announce("m")
        others = [member for member in population.members if member is not mover]
        assert sum(any(c.address == mover.address for c in member.table) for member in others) >= 8
        assert not any(c.address == old for member in others for c in member.table)
        await population.stop()

    world.run(scenario())


def test_an_outsider_with_every_address_learns_nothing_of_a_private_mesh() -> None:
    world = World(10)
    private = Network("home", b"s" * 32)

    async def scenario() -> None:
        inside = Population(world, private)
        await inside.grow(8)
        await asyncio.sleep(20)
        await inside.members[2].announce("secret-model")
        assert len(await inside.members[5].dht.lookup("secret-model")) == 1
        addresses = [member.address for member in inside.members]
        for network in (Network(), Network("home"), Network("home", b"x" * 32)):
            outside = Population(world, network)
            [outsider] = await outside.grow(1)
            outsider.dht.join(addresses)
            await asyncio.sleep(30)
            assert outsider.dht.peers == []
            assert await outsider.dht.lookup("secret-model") == []
            assert await outsider.dht.models() == {}
            assert outsider.protocol.transport.received == 0
            await outside.stop()
        await inside.stop()

    world.run(scenario())


def test_the_catalogue_lists_what_is_served_and_forgets_what_is_not() -> None:
    world = World(11)

    async def scenario() -> None:
        population = Population(world)
        await population.grow(10)
        await asyncio.sleep(20)
        first, second, third = population.members[:3]
        await first.announce("a")
        await first.announce("b")
        await second.announce("a")
        assert await third.dht.models() == {"a": 2, "b": 1}
        await first.dht.withdraw(first.record("b"))
        assert await third.dht.models() == {"a": 2}
        assert await third.dht.lookup("b") == []
        await asyncio.sleep(200)
        assert await third.dht.models() == {}
        assert await third.dht.lookup("a") == []
        await population.stop()

    world.run(scenario())
