"""How many replicas a node holds: by its GPUs, the recipe's services and what its operator says. And who is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fleet.endpoint import until
from tests.machines import bare, nvidia_smi, program
from toolchain.errors import RecipeError
from toolchain.fleet.control.seats import Machine, Seat, Share, offers_of
from toolchain.fleet.deployment import MOST, Deployment, Replicas
from toolchain.fleet.node import alone
from toolchain.fleet.node.agent import Maker
from toolchain.fleet.node.replica import Offer, Replica
from toolchain.progress import Silent

GPUS = "\n".join(
    f"{index}, {name}, GPU-{index}, 8.9, 550.54.15, 24564, 23000"
    for index, name in enumerate(("NVIDIA GeForce RTX 4090", "NVIDIA L4", "NVIDIA GeForce RTX 4090"))
)


def version(*shares: tuple[str, int, int]) -> dict[str, Any]:
    return {"shares": [{"device": device, "gpus": gpus, "services": services} for device, gpus, services in shares]}


@pytest.mark.parametrize(
    ("gpus", "limit", "share", "room"),
    [
        (1, None, Share(1, 1), 1),
        (1, None, Share(1, 3), 3),
        (4, None, Share(1, 3), 12),
        (4, None, Share(2, 1), 2),
        (5, None, Share(2, 3), 6),
        (1, None, Share(2, 1), 0),
        (0, None, Share(1, 1), 0),
        (4, 5, Share(1, 3), 5),
        (0, None, Share(0, 2), 2),
        (0, MOST, Share(0, 2), 2),
        (0, 1, Share(0, 2), 1),
        (0, None, Share(), 1),
        (0, 3, Share(), 3),
        (0, MOST, Share(), MOST),
        (0, 1000, Share(), MOST),
    ],
)
def test_a_node_has_room_for_the_services_of_each_gpu(gpus: int, limit: int | None, share: Share, room: int) -> None:
    assert Machine("h100", gpus, limit).room((("h100", share),)) == room


def test_of_recipes_for_several_devices_a_node_holds_what_its_own_says() -> None:
    offers = offers_of(version(("h100", 1, 4), ("l4", 1, 2)))
    assert (Machine("h100", 2).room(offers), Machine("l4", 2).room(offers)) == (8, 4)
    assert Machine("l4", 2, own=Share(1, 3)).room(offers) == 6, "it builds by a recipe of its own"


def test_recipes_that_take_turns_have_the_room_that_is_there_whichever_comes_first() -> None:
    whole_and_half = offers_of(version(("l4", 1, 2), ("l4", 1, 1)))
    assert Machine("l4", 1, turns=True).room(whole_and_half) == 1
    assert Machine("l4", 2, turns=True).room(whole_and_half) == 3


@given(
    st.integers(0, 6),
    st.one_of(st.none(), st.integers(0, 20)),
    st.lists(st.builds(Share, st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=30),
)
def test_of_no_gpu_more_is_taken_than_it_has(gpus: int, limit: int | None, shares: list[Share]) -> None:
    machine, taken = Machine("h100", gpus, limit), list[Seat]()
    for share in shares:
        if seat := machine.seat(share, taken):
            taken.append(seat)
            assert len(seat.gpus) == share.gpus
    assert all(sum(60 // one.of for one in taken if gpu in one.gpus) <= 60 for gpu in range(gpus))
    assert {gpu for one in taken for gpu in one.gpus} <= set(range(gpus))
    assert limit is None or len(taken) <= limit


@pytest.mark.parametrize(
    "told", [{"gpus": -1}, {"gpus": "2"}, {"room": True}, {"own": {"gpus": 1}}, {"own": {"gpus": 1, "services": 0}}]
)
def test_a_machine_that_talks_nonsense_is_refused(told: Mapping[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Machine.read({"device": "x", "gpus": 1, "room": None, **told})


@pytest.mark.parametrize("told", [{"gpus": [0, 0]}, {"gpus": [-1]}, {"gpus": 1}, {"of": 0}, {"of": "2"}])
def test_a_place_that_cannot_be_is_refused(told: Mapping[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Seat.read(told)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two RTX 4090 and an L4, and the folder of its programs."""
    folder = bare(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia_smi(folder, GPUS)
    return folder


def check(most: int, wanted: dict[str, Any]) -> None:
    asked = Deployment(endpoint="e", recipes=("r",), replicas=Replicas(min=1, max=most))
    alone.must_have_room(asked, wanted, alone.machine_of(wanted))


def test_a_machine_that_is_all_of_an_endpoint_must_hold_what_is_asked(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(4, version(("rtx4090", 1, 2)))
    with pytest.raises(RecipeError, match=r"replicas.max: 5, and this machine, 2 GPUs, has room for 4") as found:
        check(5, version(("rtx4090", 1, 2)))
    assert "replicas: {max: 4}" in found.value.hint
    with pytest.raises(RecipeError, match=r"1 GPU, has room for 0: the recipe says services: 1 on 2 GPUs"):
        check(1, version(("l4", 2, 1)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(RecipeError, match="1 GPU, has room for 2"):
        check(3, version(("rtx4090", 1, 2)))


def test_where_no_gpu_can_be_seen_the_visible_ones_are_taken_and_the_server_says_what_is_wrong(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "nvidia-smi").unlink()
    assert alone.gpus_of(version(("l4", 2, 1))) == ("l4", ("0", "1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1, 2")
    assert alone.gpus_of(version(("cpu", 0, 1), ("l4", 2, 1))) == ("l4", ("3", "1"))
    assert alone.gpus_of(version(("cpu", 0, 1))) == ("cpu", ())


def test_a_cpu_holds_its_services_and_where_none_are_named_what_the_deployment_asks() -> None:
    check(MOST, version(("cpu", 0, 1)))
    check(2, version(("cpu", 0, 2)))
    with pytest.raises(RecipeError, match="this machine has room for 2: the recipe says services: 2"):
        check(3, version(("cpu", 0, 2)))


def test_a_replica_sees_the_gpus_of_its_place_and_no_others(machine: Path, tmp_path: Path) -> None:
    program(machine, "tritonserver", f'echo "$CUDA_DEVICE_ORDER $CUDA_VISIBLE_DEVICES" > {tmp_path}/seen; exit 1')
    repository = tmp_path / "repository"
    (repository / "tensorrt_llm" / "1").mkdir(parents=True)
    (repository / "tensorrt_llm" / "config.pbtxt").write_text('backend: "tensorrtllm"\n')
    offer = Offer("lane", str(tmp_path), "", 1.0)
    replica = Replica("r1", lambda: repository, tmp_path / "r1", offer, progress=Silent(), gpus=("0", "2"))
    replica.start()
    until(lambda: replica.failure is not None)
    replica.kill()
    assert (tmp_path / "seen").read_text() == "PCI_BUS_ID 0,2\n"


def test_a_gpu_that_is_no_longer_there_is_named(tmp_path: Path) -> None:
    numbers = {"drain_seconds": 1, "start_seconds": 9}
    wanted = {"lane": "l", "identity": "", "conformance": False, "trial": False, "gpus": (1,), **numbers}
    replica = Maker(tmp_path, "", lambda _version, _name: tmp_path, progress=Silent(), gpus=("0",))("r1", wanted)
    replica.start()
    until(lambda: replica.failure is not None)
    assert replica.state()["why"] == "r1 is to run on GPU 1, and there are 1 here"
