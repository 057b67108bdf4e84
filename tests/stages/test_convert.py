"""The stage ``convert``: a plan's TensorRT-LLM checkpoint, and nothing half-made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.planning.plan import Plan, make_plan
from toolchain.progress import Silent
from toolchain.recipe import parse_recipe
from toolchain.stages.convert import convert, inputs

T4 = "device: t4\nlimits: {max_input_len: 128, max_seq_len: 256}\n"


def planned(folder: Path, text: str) -> Plan:
    recipe = parse_recipe(f"model: {folder}\n{text}", Path("mine.yaml"))
    return make_plan(recipe, Checkpoint.open(folder).config)


def made(folder: Path, out: Path, text: str) -> Path:
    plan = planned(folder, text)
    with workspace.draft(out, "convert", inputs(plan, "key")) as draft:
        convert(plan, Checkpoint.open(folder), draft, progress=Silent())
        draft.commit(versions={}, recipe="")
    return out


@pytest.mark.parametrize(
    ("stored", "text", "dtype"),
    [
        ("bfloat16", T4, torch.float16),
        ("float32", T4, torch.float16),
        ("float32", "device: l4\n", torch.float16),
        ("bfloat16", "device: l4\n", torch.bfloat16),
        ("float16", "device: l4\nparallel: {tp: 2, pp: 2}\n", torch.float16),
    ],
)
def test_the_checkpoint_is_in_the_dtype_of_the_plan_and_split_as_it_says(
    random_llama: Callable[..., Path], tmp_path: Path, stored: str, text: str, dtype: torch.dtype
) -> None:
    folder = random_llama(dtype=stored)
    plan, out = planned(folder, text), made(folder, tmp_path / "out", text)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], f"torch.{plan.dtype}") == (plan.dtype, str(dtype))
    ranks = plan.tp * plan.pp
    assert config["mapping"] == {"world_size": ranks, "tp_size": plan.tp, "pp_size": plan.pp}
    files = sorted(out.glob("rank*.safetensors"))
    assert len(files) == ranks
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {dtype}


def test_the_stamp_has_the_digests_that_were_made_while_writing(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    out = made(random_llama(), tmp_path / "out", "device: l4\nparallel: {tp: 2}\n")
    stamp = workspace.read_stamp(out)
    assert stamp is not None
    for name in ("rank0.safetensors", "rank1.safetensors", "config.json", "tokenizer.json"):
        assert stamp.files[name].sha256 == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert workspace.damage(out, stamp) is None


def test_what_the_dtype_does_not_reach_leaves_no_checkpoint(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    """It is found while the files are written, the norm last: nothing of it counts as an artifact."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in random_llama(dtype="bfloat16").iterdir():
        if not file.name.startswith("model"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: one
        for file in random_llama(dtype="bfloat16").glob("*.safetensors")
        for name, one in load_file(file).items()
    }
    tensors["model.norm.weight"][7] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight goes up to 999424, and float16 ends at 65504"):
        made(folder, tmp_path / "out", T4)
    assert workspace.current(tmp_path / "out") is None
    assert workspace.current(made(folder, tmp_path / "other", "device: l4\n")) is not None


def test_another_dtype_split_or_cache_is_another_checkpoint(random_llama: Callable[..., Path]) -> None:
    folder = random_llama(dtype="bfloat16")
    plan = planned(folder, "device: l4\n")
    same = inputs(plan, "key")
    assert inputs(replace(plan, services=3), "key") == same
    for other in (replace(plan, dtype="float16"), replace(plan, tp=2), replace(plan, pp=2)):
        assert inputs(other, "key") != same
    assert inputs(planned(folder, "device: l4\nkv_cache: {dtype: fp8}\n"), "key") != same
    assert inputs(plan, "another checkpoint") != same


def test_every_reason_is_told_and_nothing_is_left(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_llama()
    plan = replace(planned(folder, "device: l4\n"), tp=3, pp=3)
    with pytest.raises(PlanError) as caught, workspace.draft(tmp_path / "out", "convert", {}) as draft:
        convert(plan, Checkpoint.open(folder), draft, progress=Silent())
    assert "2 layers do not divide by pp 3" in caught.value.message
    assert "4 attention heads do not divide by tp 3" in caught.value.message
    assert workspace.current(tmp_path / "out") is None
