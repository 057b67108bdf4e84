"""Pickled weights are taken out without running them, and everything else in a pickle is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers

from tests.backends.quantized_folder import random_llama
from tests.quantizers.foreign.adopted import adopt, assert_same, tensors_of
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers import foreign


def pickled(folder: Path, *, dtype: torch.dtype = torch.float16, **model: object) -> dict[str, torch.Tensor]:
    """A random Llama as transformers 4 saved it: pytorch_model.bin. -> its tensors."""
    llama = random_llama(**model).to(dtype)
    llama.config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": str(dtype).removeprefix("torch.")}
    raw.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_tensors_come_out_bit_for_bit(tmp_path, dtype):
    tensors = pickled(tmp_path / "model", dtype=dtype)
    target = adopt(tmp_path / "model", tmp_path / "out")
    assert_same(tensors_of(target), tensors)
    assert Checkpoint.open(target).quantization is None
    again = transformers.LlamaForCausalLM.from_pretrained(target, dtype=dtype)
    assert_same(again.state_dict(), tensors)


def test_several_files_with_an_index_are_one_model(tmp_path):
    folder = tmp_path / "model"
    tensors = pickled(folder)
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, some in parts.items():
        torch.save({name: tensors[name] for name in some}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, some in parts.items() for name in some}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(tensors_of(adopt(folder, tmp_path / "out")), tensors)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ArtifactError, match=r"00002-of-00002\.bin: no such file"):
        adopt(folder, tmp_path / "again")


def test_a_head_that_is_tied_is_left_out_and_old_rotary_tables_too(tmp_path):
    tensors = pickled(tmp_path / "model", tied=True)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    found = tensors_of(adopt(tmp_path / "model", tmp_path / "out"))
    assert set(tensors) - set(found) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


class Program:
    """What an attacker pickles: reading it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("where", ["beside the tensors", "alone", "not in a zip"])
def test_a_program_in_a_pickle_is_not_run(tmp_path, where):
    folder, made = tmp_path / "model", tmp_path / "made-by-the-program"
    tensors = pickled(folder)
    bad = {**tensors, "model.extra": Program(made)} if where == "beside the tensors" else Program(made)
    if where == "not in a zip":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bad))
    else:
        torch.save(bad, folder / "pytorch_model.bin")
    with pytest.raises(
        ArtifactError, match=r"pytorch_model\.bin: (holds more than tensors|not readable as the weights)"
    ):
        adopt(folder, tmp_path / "out")
    assert foreign.identify(folder).use == "refused"
    assert not made.exists()
    assert not list(tmp_path.glob("*out*"))
    with (folder / "pytorch_model.bin").open("rb") as stream:  # it would run if it were read as a pickle
        if where == "not in a zip":
            pickle.load(stream)
            assert made.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": {"a": torch.ones(2)}}, "other things than tensors"),
        ([torch.ones(2)], "holds a list"),
        ({"model.norm.weight": 3}, "other things than tensors"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(tmp_path, content, reason):
    pickled(tmp_path / "model")
    torch.save(content, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=reason):
        adopt(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("wrong", ["missing", "shape", "dtype", "NaN", "strange", "cut"])
def test_a_damaged_model_is_named_and_nothing_is_written(tmp_path, wrong):
    tensors, file = pickled(tmp_path / "model"), tmp_path / "model" / "pytorch_model.bin"
    name = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "shape": tensors[name][:5].clone(),
        "dtype": tensors[name].to(torch.int8),
        "NaN": tensors[name].index_fill(0, torch.tensor([3]), float("nan")),
    }
    tensors[name] = changes.get(wrong, tensors[name])
    if wrong == "missing":
        del tensors[name]
    if wrong == "strange":
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64)
    torch.save(tensors, file)
    if wrong == "cut":
        file.write_bytes(file.read_bytes()[:-999])
    words = {"missing": "missing: model.layers.1", "strange": "q_norm", "cut": "not readable", "NaN": "up_proj.*NaN"}
    with pytest.raises((ArtifactError, PlanError), match=words.get(wrong, r"up_proj\.weight is torch")):
        adopt(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_refuses_and_names_the_way(tmp_path):
    pickled(tmp_path / "model")
    with pytest.raises(ArtifactError, match="pickled") as caught:
        Checkpoint.open(tmp_path / "model")
    assert "scalellm import" in caught.value.hint
