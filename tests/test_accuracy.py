"""Which engines must be verified before they serve, and the verdict that lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.accuracy import digest_of, file_of, read_verdict, write_verdict
from toolchain.errors import ArtifactError
from toolchain.family import published
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import available, load_recipe, parse_recipe
from toolchain.workspace import FileRecord

LLAMA = published("meta-llama/Llama-2-13b-chat-hf")
T4 = "device: t4\nlimits: {max_seq_len: 512, max_batch_size: 1}\n"


def plan_of(text: str) -> Plan:
    assert LLAMA is not None
    return make_plan(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), LLAMA)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        (T4 + "quantization: {weights: int4}", "required"),
        (T4 + "quantization: {weights: int8}\nparallel: {tp: 2}", "required"),
        (T4 + "parallel: {tp: 4}", None),
        (T4 + "parallel: {tp: 4}\nkv_cache: {dtype: int8}", "advised"),
        ("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}", "advised"),
        ("device: a100\nquantization: {weights: int4}", None),
        ("device: cpu\nquantization: {weights: int4}\nkv_cache: {dtype: int8}", None),
    ],
)
def test_the_plan_says_whether_an_engine_must_be_verified(text: str, gate: str | None) -> None:
    plan = plan_of(text)
    assert plan.gate == plan.to_json()["gate"] == gate
    told = {one.name: one for one in plan.decisions}
    assert ("gate" in told) == (gate is not None)
    if gate:
        assert told["gate"].value == gate
        assert "issue" in told["gate"].source


@pytest.mark.parametrize("name", sorted(available()))
def test_every_shipped_recipe_has_the_gate_that_its_engine_deserves(name: str) -> None:
    assert LLAMA is not None
    plan = make_plan(load_recipe(name), LLAMA)
    wanted = {"t4": "required", "a100": "advised", "a100-x3": "advised"}
    if name in wanted or plan.device.is_cpu:
        assert plan.gate == wanted.get(name)


def test_the_plan_of_a_t4_prints_the_command_of_the_wheel_once() -> None:
    plan = plan_of(T4 + "quantization: {weights: int4}")
    wheel = "python3 scripts/build_wheel.py --clean --cuda_architectures 75-real --trt_root /usr/local/tensorrt"
    assert sum(wheel in warning for warning in plan.warnings) == 1
    assert sum("75-real" in warning for warning in plan.warnings) == 1


FILES = {"rank0.engine": FileRecord(5, "aa", 1), "config.json": FileRecord(6, "bb", 2)}


class TestVerdict:
    """The side file."""

    def test_nobody_has_verified_a_new_engine(self, tmp_path: Path) -> None:
        assert read_verdict(tmp_path / "engine", digest_of(FILES)) is None

    @pytest.mark.parametrize("folder", ["engine", "repository"])
    def test_engine_and_repository_find_the_same_one(self, tmp_path: Path, folder: str) -> None:
        linked = {f"tensorrt_llm/1/engine/{name}": one for name, one in FILES.items()}
        linked |= {"tensorrt_llm/config.pbtxt": FileRecord(1, "cc", 3)}
        digest = digest_of(linked, "tensorrt_llm/1/engine/")
        assert digest == digest_of(FILES)
        made = write_verdict(tmp_path / "engine", digest, passed=True, summary="99 % equal", measured={"equal": 0.99})
        found = read_verdict(tmp_path / folder, digest)
        assert found == made
        assert found is not None
        assert found.passed
        assert found.measured == {"equal": 0.99}

    def test_a_rebuilt_engine_has_none(self, tmp_path: Path) -> None:
        write_verdict(tmp_path / "engine", digest_of(FILES), passed=True, summary="equal")
        again = digest_of(FILES | {"rank0.engine": FileRecord(5, "ab", 9)})
        assert read_verdict(tmp_path / "engine", again) is None

    def test_a_copy_with_other_time_stamps_keeps_its_verdict(self) -> None:
        assert digest_of({name: FileRecord(one.size, one.sha256, 77) for name, one in FILES.items()}) == digest_of(
            FILES
        )

    def test_a_later_verdict_replaces_an_earlier_one(self, tmp_path: Path) -> None:
        digest = digest_of(FILES)
        write_verdict(tmp_path / "engine", digest, passed=True, summary="equal")
        write_verdict(tmp_path / "engine", digest, passed=False, summary="garbage")
        found = read_verdict(tmp_path / "engine", digest)
        assert found is not None
        assert not found.passed

    @pytest.mark.parametrize("change", [{"passed": True}, {"engine": "f" * 64}, {"extra": 1}])
    def test_an_edited_verdict_is_refused(self, tmp_path: Path, change: dict[str, object]) -> None:
        digest = digest_of(FILES)
        write_verdict(tmp_path / "engine", digest, passed=False, summary="garbage")
        file = file_of(tmp_path / "engine", digest)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ArtifactError, match=r"accuracy-.*verdict"):
            read_verdict(tmp_path / "engine", digest)

    def test_the_folder_of_the_engine_is_left_as_it_was_stamped(self, tmp_path: Path) -> None:
        target = tmp_path / "engine"
        with workspace.draft(target, "engine", {"a": 1}) as draft:
            (draft.path / "rank0.engine").write_bytes(b"plan")
            stamp = draft.commit(versions={}, recipe="")
        before = sorted(file.name for file in target.iterdir())
        write_verdict(target, digest_of(stamp.files), passed=True, summary="equal")
        assert sorted(file.name for file in target.iterdir()) == before
        assert workspace.require(target, "engine") == stamp
