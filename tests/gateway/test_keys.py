"""Promises about API keys, and about the places at the engines."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest

from toolchain.errors import ArtifactError, RecipeError
from toolchain.gateway import keys
from toolchain.gateway.admission import Admission
from toolchain.gateway.failures import ApiError
from toolchain.gateway.keys import Doorkeeper


def status(keeper: Doorkeeper, authorization: str | None) -> int:
    try:
        keeper.admit(authorization)
    except ApiError as error:
        return error.status
    return 200


def test_the_file_holds_no_key_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.json"
    secret = keys.add(file, "alice", requests_per_minute=5)
    assert secret not in file.read_text()
    assert secret.removeprefix("sk-scalellm-") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [key.name for key in keys.read(file)] == ["alice"]
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


def test_every_key_is_another_and_a_name_is_taken_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert len({keys.add(file, str(number)) for number in range(5)}) == 5
    with pytest.raises(RecipeError, match="there is a key named '3'"):
        keys.add(file, "3")
    with pytest.raises(RecipeError, match="no key named 'x'"):
        keys.remove(file, "x")


def test_only_a_known_key_comes_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = keys.add(file, "alice")
    keeper = Doorkeeper(file)
    known = keeper.admit(f"Bearer {secret}")
    assert known is not None
    assert known.name == "alice"
    assert status(keeper, f"bearer  {secret} ") == 200
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        secret,
        f"Basic {secret}",
        f"Bearer {secret}x",
        "Bearer ü",
        "Bearer " + known.sha256,
    ):
        assert status(keeper, wrong) == 401


def test_a_removed_key_is_refused_at_once_and_the_last_one_does_not_open_the_door(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first, second = keys.add(file, "a"), keys.add(file, "b")
    keeper = Doorkeeper(file)
    keys.remove(file, "a")
    assert (status(keeper, f"Bearer {first}"), status(keeper, f"Bearer {second}")) == (401, 200)
    keys.remove(file, "b")
    assert (status(keeper, f"Bearer {second}"), status(keeper, None)) == (401, 401)
    assert status(keeper, f"Bearer {keys.add(file, 'c')}") == 200
    file.unlink()
    assert status(keeper, None) == 401


def test_a_damaged_file_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = keys.add(file, "a")
    keeper = Doorkeeper(file)
    file.write_text('{"name": ')
    assert (status(keeper, f"Bearer {secret}"), status(keeper, None)) == (401, 401)
    with pytest.raises(ArtifactError, match="not a file of keys"):
        keys.read(file)


def test_without_keys_nobody_is_asked_for_one(tmp_path: Path) -> None:
    assert status(Doorkeeper(None), None) == 200
    keeper = Doorkeeper(tmp_path / "keys.json")
    assert status(keeper, None) == 200
    keys.add(tmp_path / "keys.json", "first")
    assert status(keeper, None) == 401


def test_a_rate_is_kept_by_key_and_says_when_to_come_again(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    slow, free = keys.add(file, "slow", requests_per_minute=2), keys.add(file, "free")
    keeper = Doorkeeper(file)
    assert [status(keeper, f"Bearer {slow}") for _ in range(3)] == [200, 200, 429]
    with pytest.raises(ApiError) as caught:
        keeper.admit(f"Bearer {slow}")
    assert 1 <= int(caught.value.headers()["Retry-After"]) <= 30
    assert [status(keeper, f"Bearer {free}") for _ in range(20)] == [200] * 20


def test_requests_at_work_are_counted_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = keys.add(file, "a", concurrent=1)
    keeper = Doorkeeper(file)
    key = keeper.admit(f"Bearer {secret}")
    keeper.enter(key)
    with pytest.raises(ApiError) as caught:
        keeper.enter(key)
    assert caught.value.status == 429
    keeper.leave(key)
    keeper.enter(key)


def test_no_more_than_the_places_are_at_work_the_queue_waits_in_turn_and_the_rest_is_told_to_go() -> None:
    async def run() -> None:
        admission = Admission(lambda: 2, queue=lambda: 3, wait_s=30)
        order: list[int] = []

        async def come(number: int) -> None:
            await admission.enter()
            order.append(number)

        await come(0)
        await come(1)
        waiting = [asyncio.create_task(come(number)) for number in (2, 3, 4)]
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (2, 3)
        with pytest.raises(ApiError) as caught:
            await admission.enter()
        assert caught.value.status == 429
        assert "Retry-After" in caught.value.headers()
        waiting[0].cancel()  # its client has gone
        await asyncio.gather(waiting[0], return_exceptions=True)
        for _ in range(2):
            admission.leave()
        await asyncio.gather(*waiting[1:])
        assert order == [0, 1, 3, 4]
        for _ in range(2):
            admission.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_who_waits_comes_in_when_there_are_more_places_though_nobody_leaves() -> None:
    async def run() -> None:
        places = [1]
        admission = Admission(lambda: places[0], queue=lambda: 3, wait_s=30)
        await admission.enter()
        waiting = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 1)
        places[0] = 2
        await asyncio.wait_for(waiting, 10)
        assert (admission.running, admission.waiting) == (2, 0)

    asyncio.run(run())


def test_who_waits_too_long_is_told_so_and_holds_no_place() -> None:
    async def run() -> None:
        admission = Admission(lambda: 1, queue=lambda: 3, wait_s=0.01)
        await admission.enter()
        with pytest.raises(ApiError) as caught:
            await admission.enter()
        assert caught.value.status == 429
        admission.leave()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_a_turn_that_comes_while_its_client_goes_is_given_to_the_next() -> None:
    async def run() -> None:
        admission = Admission(lambda: 1, queue=lambda: 3, wait_s=30)
        await admission.enter()
        first, second = (asyncio.create_task(admission.enter()) for _ in range(2))
        await asyncio.sleep(0)
        admission.leave()  # the first one's turn has come
        first.cancel()  # and goes unused
        await asyncio.gather(first, return_exceptions=True)
        await second
        assert (admission.running, admission.waiting) == (1, 0)

    asyncio.run(run())


def test_keys_are_made_listed_and_removed_on_the_command_line(scalellm, tmp_path: Path) -> None:
    def run(*argv: str) -> str:
        done = scalellm("gateway", "keys", *argv, "--work", tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    secret = run("add", "alice", "--concurrent", "8").strip()
    assert secret.startswith("sk-scalellm-")
    listed = run("list")
    assert "alice" in listed
    assert secret not in listed
    assert json.loads(run("list", "--json"))[0]["concurrent"] == 8
    assert status(Doorkeeper(tmp_path / "gateway-keys.json"), f"Bearer {secret}") == 200
    run("remove", "alice")
    assert "no keys" in run("list")
