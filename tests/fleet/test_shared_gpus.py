"""The controller over nodes whose GPUs are shared by services, and versions that share them otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fleet.test_control import ONE, PAIR, THREE, TWO, World, promises, wish
from toolchain.fleet.control.seats import Machine, Offers, Share


def gpu_world(most: int, gpus: int = 1, shares: dict[int, Share] | None = None, **changes: Any) -> World:
    """One node with so many GPUs, and version 1 of two services on each."""
    offers: dict[int, Offers] = {version: (("h100", share),) for version, share in (shares or {1: TWO}).items()}
    asked = wish(most, most, offers=offers, **changes)
    return World(asked, nodes={"a": (2.0, 9)}, machines={"a": Machine("h100", gpus)})


def test_a_gpu_holds_as_many_replicas_as_its_recipe_has_services() -> None:
    world = gpu_world(3)
    world.settle()
    assert world.running() == [("a", 1)] * 2
    assert sorted(one.gpus for one in world.seats.values()) == [(0,), (0,)]
    assert any("no node has room" in event.text for event in world.events if event.kind == "waits")


def test_services_are_spread_over_the_gpus_of_a_node() -> None:
    world = gpu_world(3, gpus=2)
    world.settle()
    assert sorted(one.gpus for one in world.seats.values()) == [(0,), (0,), (1,)]


def test_an_engine_of_two_gpus_takes_two_that_are_free() -> None:
    world = gpu_world(4, gpus=5, shares={1: PAIR})
    world.settle()
    assert sorted(one.gpus for one in world.seats.values()) == [(0, 1), (2, 3)]


@pytest.mark.parametrize(("old", "new", "held"), [(ONE, THREE, 3), (THREE, ONE, 1), (TWO, THREE, 3)])
def test_a_version_that_shares_a_gpu_otherwise_waits_for_the_part_that_it_needs(
    old: Share, new: Share, held: int
) -> None:
    """Nothing of the new one starts beside so much of the old one that the GPU has not enough left."""
    world = gpu_world(old.services, shares={1: old, 2: new}, max_unavailable=old.services)
    world.checks.append(promises)
    world.settle()
    assert len(world.running()) == old.services
    world.wish = replace(world.wish, next=2, scale=replace(world.wish.scale, min=held, max=held), max_unavailable=held)
    world.settle(40)
    assert world.running() == [("a", 2)] * held
    assert world.wish.current == 2


def test_for_a_version_that_fits_nowhere_nothing_is_taken_down() -> None:
    world = gpu_world(1, shares={1: ONE, 2: PAIR}, max_unavailable=1)
    world.settle()
    world.wish = replace(world.wish, next=2)
    world.settle()
    assert world.running() == [("a", 1)]
    assert any("no node has room for another replica of version 2" in event.text for event in world.events)


def test_recipes_that_share_a_machine_otherwise_take_turns_where_they_fit() -> None:
    world = gpu_world(3, gpus=2)
    world.machines["a"] = Machine("h100", 2, limit=9, turns=True)
    world.wish = replace(world.wish, offers={1: (("h100", TWO), ("h100", ONE))})
    world.settle()
    assert sorted((name, one.gpus, one.of) for (_, name), one in world.seats.items()) == [
        ("r1", (0,), 2),
        ("r2", (1,), 1),
        ("r3", (0,), 2),
    ]


def test_of_an_unknown_version_a_node_holds_as_many_as_it_says() -> None:
    world = World(wish(4), nodes={"a": (0.1, 2)}, machines={"a": Machine("h100", 1, limit=2)})
    world.settle()
    assert world.running() == [("a", 1)] * 2
