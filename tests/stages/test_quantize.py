"""quantize, on real small checkpoints: what it writes, and what it does when it is killed, starved or fed damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain import family, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.planning.memory import weight_bytes
from toolchain.progress import Silent, Task
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import int4
from toolchain.stages.quantize import REPORT, quantize

DOCUMENTS = {"config.json", "hf_quant_config.json", REPORT, "generation_config.json", "stamp.json"}
VARIANTS = {
    "gqa-fp16": {},
    "mha-bf16": {"num_key_value_heads": 4, "dtype": "bfloat16"},
    "tied-fp32": {"tie_word_embeddings": True, "dtype": "float32"},
}


class Listening(Silent):
    """Remembers what the stage says; ``at(text)`` is called as each piece of work begins."""

    def __init__(self, at: Callable[[str], None] = lambda _text: None) -> None:
        self.at = at
        self.notes: list[str] = []
        self.said: list[str] = []
        self.totals: dict[str, int] = {}
        self.advanced: dict[str, int] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def task(self, label: str, total: int, unit: str) -> Task:
        listener, silent = self, super().task(label, total, unit)
        self.totals[label], self.advanced[label] = total, 0

        class Heard:
            def advance(self, amount: int) -> None:
                listener.advanced[label] += amount

            def describe(self, text: str) -> None:
                listener.said.append(text)
                listener.at(text)

            def __enter__(self) -> Any:
                silent.__enter__()
                return self

            def __exit__(self, *trouble: Any) -> None:
                silent.__exit__(*trouble)

        return Heard()


def run(model: Path, target: Path, progress: Listening | None = None, **choices: Any) -> Path:
    values = {"weights": "int4", "group_size": 128, "scales": "mse", "kv": "fp16"} | choices
    with workspace.draft(target, "quantize", {"model": str(model), **values}) as draft:
        quantize(Checkpoint.open(model), draft, progress=progress or Silent(), **values)
        draft.commit(versions={}, recipe="")
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    stamp = workspace.require(folder, "quantize")
    assert {name: workspace.sha256_of(folder / name) for name in stamp.files} == {
        name: record.sha256 for name, record in stamp.files.items()
    }
    return {name: record.sha256 for name, record in stamp.files.items()}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest, random_llama: Callable[..., Path]) -> Path:
    return random_llama(**request.param)


@pytest.fixture
def four_layers(random_llama: Callable[..., Path]) -> Path:
    return random_llama(num_hidden_layers=4)


# --- what it writes --------------------------------------------------------------------------------------------------


def test_int8_is_the_formula_bit_for_bit_and_takes_no_text(model: Path, tmp_path: Path) -> None:
    source, made = tensors_of(model), run(model, tmp_path / "out", weights="int8")
    written, config = tensors_of(made), Checkpoint.open(made).config
    report = json.loads((made / REPORT).read_text())
    for layer, linear in family.layer_linears(config):
        name = family.linear_name(layer, linear)
        weight = source.pop(f"{name}.weight").float()
        scale, codes = written.pop(f"{name}.weight_scale"), written.pop(f"{name}.weight")
        assert torch.equal(scale, weight.abs().amax(1) / 127)
        assert torch.equal(codes, torch.round(weight / scale[:, None]).to(torch.int8))
        error = float((codes.double() * scale.double()[:, None] - weight).norm() / weight.double().norm())
        assert report["relative_error"][name] == pytest.approx(error, rel=1e-4)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())
    quantization = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    excluded = ["lm_head", "model.embed_tokens"]
    assert quantization == {"quant_algo": "W8A16", "kv_cache_quant_algo": None, "exclude_modules": excluded}
    inside = json.loads((made / "config.json").read_text())["quantization_config"]
    inside.pop("producer")
    assert inside == {"ignore": excluded, "quant_algo": "W8A16", "quant_method": "modelopt"}
    assert "calibration" not in report


@pytest.mark.parametrize("group_size", [64, 128])
def test_int4_dequantizes_to_the_model_within_its_reported_error(model: Path, tmp_path: Path, group_size: int) -> None:
    source, made = tensors_of(model), run(model, tmp_path / "out", group_size=group_size)
    written, config = tensors_of(made), Checkpoint.open(made).config
    report = json.loads((made / REPORT).read_text())["relative_error"]
    assert len(report) == 7 * config.num_layers
    for layer, linear in family.layer_linears(config):
        name = family.linear_name(layer, linear)
        weight, scale = source[f"{name}.weight"].double(), written[f"{name}.weight_scale"]
        assert scale.shape == (weight.shape[0], weight.shape[1] // group_size)
        restored = int4.dequantize(written[f"{name}.weight"], scale).double()
        error = float((restored - weight).norm() / weight.norm())
        assert error == pytest.approx(report[name], rel=1e-3)
        assert error < 0.125


def test_fp8_bits_equal_torchs_cast_with_scales_shared_by_input(model: Path, tmp_path: Path) -> None:
    source, made = tensors_of(model), run(model, tmp_path / "out", weights="fp8")
    written, config = tensors_of(made), Checkpoint.open(made).config
    for layer in range(config.num_layers):
        for group in family.SHARED_INPUT:
            names = [family.linear_name(layer, linear) for linear in group]
            scale = torch.stack([source[f"{name}.weight"].float().abs().max() for name in names]).max() / 448
            for name in names:
                assert torch.equal(written[f"{name}.weight_scale"], scale)
                expected = (source[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
                assert torch.equal(written[f"{name}.weight"].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_embeddings_norms_and_head_keep_their_bytes(model: Path, tmp_path: Path, weights: str) -> None:
    source, made = tensors_of(model), run(model, tmp_path / "out", weights=weights)
    written = tensors_of(made)
    linears = {f"{family.linear_name(*pair)}.weight" for pair in family.layer_linears(Checkpoint.open(made).config)}
    for name in set(source) - linears:
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name].view(torch.uint8), source[name].view(torch.uint8))
    tied = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in written) is not tied


def test_a_head_stored_beside_tied_embeddings_is_left_out(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(random_llama(**VARIANTS["tied-fp32"]), tmp_path / "model")
    values = tensors_of(model)
    for old in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        old.unlink()
    save_file(values | {"lm_head.weight": values["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    assert "lm_head.weight" not in tensors_of(run(model, tmp_path / "out"))


def test_mse_errors_are_below_modelopts_on_every_matrix(model: Path, tmp_path: Path) -> None:
    def errors(scales: str) -> dict[str, float]:
        made = run(model, tmp_path / scales, scales=scales)
        return dict(json.loads((made / REPORT).read_text())["relative_error"])

    searched, plain = errors("mse"), errors("modelopt")
    assert searched.keys() == plain.keys()
    assert all(searched[name] < plain[name] for name in plain)


@pytest.mark.parametrize(
    ("weights", "kv", "expected"),
    [
        (
            "int4",
            "int8",
            {
                "quant_algo": "W4A16_AWQ",
                "kv_cache_quant_algo": None,
                "group_size": 128,
                "has_zero_point": False,
                "pre_quant_scale": False,
                "exclude_modules": ["lm_head", "model.embed_tokens"],
            },
        ),
        (
            "fp8",
            "fp8",
            {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8",
                "exclude_modules": ["lm_head", "model.embed_tokens"],
            },
        ),
    ],
)
def test_documents_are_modelopts(
    random_llama: Callable[..., Path], tmp_path: Path, weights: str, kv: str, expected: dict[str, Any]
) -> None:
    model = random_llama()
    made = run(model, tmp_path / "out", weights=weights, kv=kv)
    document = json.loads((made / "hf_quant_config.json").read_text())
    assert document["quantization"] == expected
    assert list(document["quantization"]) == list(expected)
    assert document["producer"]["name"] == "scalellm"
    config = json.loads((made / "config.json").read_text())
    inside = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert (inside["quant_method"], inside["quant_algo"]) == ("modelopt", expected["quant_algo"])
    assert inside["ignore"] == expected["exclude_modules"]
    assert inside.get("kv_cache_scheme") == (
        {"dynamic": False, "num_bits": 8, "type": "float"} if kv == "fp8" else None
    )
    scales = {name: tensor for name, tensor in tensors_of(made).items() if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == (4 if kv == "fp8" else 0)
    assert all(tensor.dtype == torch.float32 and tensor.shape == () and tensor == 1 for tensor in scales.values())


def test_tokenizer_files_travel_along_and_others_do_not(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(random_llama(), tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"x")
    made = run(model, tmp_path / "out")
    assert {path.name for path in made.iterdir()} - {"model.safetensors"} == DOCUMENTS | {
        path.name for path in model.glob("tokenizer*")
    }
    assert (made / "tokenizer.json").read_text() == "{}"


def test_small_shards_get_an_index_that_transformers_follows(four_layers: Path, tmp_path: Path) -> None:
    made = run(four_layers, tmp_path / "out", weights="fp8", max_shard_bytes=400_000)
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for name, file in index.items():
        assert name in load_file(made / file)
    assert set(Checkpoint.open(made).tensors) == set(index)


def test_unaligned_tensors_are_read_right(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Some writers do not pad the header, so every tensor may start at an odd address."""
    model = shutil.copytree(random_llama(), tmp_path / "model")
    for file in model.glob("*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].rstrip() + b" "
        header += b" " * (1 - len(header) % 2)
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
        assert len(header) % 2 == 1
    straight, odd = run(random_llama(), tmp_path / "straight"), run(model, tmp_path / "odd")
    weights = "model.safetensors"
    assert digests(straight)[weights] == digests(odd)[weights]


# --- weights that stay as they are -----------------------------------------------------------------------------------


def test_none_links_the_shards(model: Path, tmp_path: Path) -> None:
    made = run(model, tmp_path / "out", weights="none")
    files = sorted(made.glob("*.safetensors"))
    assert len(files) == len(list(model.glob("*.safetensors"))) > 1
    assert all(file.samefile(model / file.name) for file in files)
    assert not (made / "hf_quant_config.json").exists()
    assert Checkpoint.open(made).quantization is None
    digests(made)


def test_none_follows_the_symbolic_links_of_huggingfaces_cache(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model, snapshot = random_llama(), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    made = run(snapshot, tmp_path / "out", weights="none")
    assert not any(file.is_symlink() for file in made.iterdir())
    assert len(tensors_of(made)) == len(tensors_of(model))


def test_none_with_fp8_cache_adds_the_scales_in_a_shard_of_their_own(model: Path, tmp_path: Path) -> None:
    made = run(model, tmp_path / "out", weights="none", kv="fp8")
    opened = Checkpoint.open(made)
    assert opened.quantization is not None
    assert (opened.quantization.quant_algo, opened.quantization.kv_cache_quant_algo) == (None, "FP8")
    written = tensors_of(made)
    assert written.keys() - tensors_of(model).keys() == {
        f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale" for layer in range(2) for which in "kv"
    }
    assert set(json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]) == set(written)


@pytest.mark.parametrize("weights", ["none", "fp8"])
def test_a_checkpoint_with_an_fp8_cache_becomes_one_with_a_plain_cache(
    random_llama: Callable[..., Path], tmp_path: Path, weights: str
) -> None:
    """Its scales go where they stand in a shard of their own, and are explained where they stand among the weights."""
    model = random_llama()
    with_cache = run(model, tmp_path / "fp8", weights=weights, kv="fp8")
    plain = run(with_cache, tmp_path / "plain", weights=weights, kv="fp16")
    opened = Checkpoint.open(plain)
    assert not (opened.quantization and opened.quantization.kv_cache_quant_algo)
    scales = {name for name in tensors_of(with_cache) if name.endswith(("k_scale", "v_scale"))}
    assert scales & opened.tensors.keys() == (set() if weights == "none" else scales)
    single = tmp_path / "single"
    shutil.copytree(with_cache, single)
    whole = tensors_of(with_cache)
    for file in [*single.glob("*.safetensors"), *single.glob("*.index.json")]:
        file.unlink()
    save_file(whole, single / "model.safetensors")
    again = run(single, tmp_path / "again", weights=weights, kv="fp16")
    assert not Checkpoint.open(again).quantization.kv_cache_quant_algo  # type: ignore[union-attr]
    assert tensors_of(again).keys() == whole.keys()
    assert "kv_cache_scheme" not in (again / "config.json").read_text()


def test_a_checkpoint_that_is_quantized_so_already_is_kept_and_another_is_refused(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    first = run(random_llama(), tmp_path / "first", weights="fp8")
    again = run(first, tmp_path / "again", weights="fp8", kv="fp8")
    kept = tensors_of(first)
    assert all(
        torch.equal(kept[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in tensors_of(again).items()
        if name in kept and tensor.shape
    )
    assert json.loads((again / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    with pytest.raises(PlanError, match="FP8 already and cannot become int4"):
        run(first, tmp_path / "no", weights="int4")
    assert not (tmp_path / "no").exists()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_input_width_that_groups_do_not_divide_is_refused_by_name(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = random_llama(intermediate_size=192)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.down_proj\.weight is \[256, 192\]") as caught:
        run(model, tmp_path / "out")
    assert "group_size: 64" in caught.value.hint
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.lock"]
    run(model, tmp_path / "out", group_size=64)


@pytest.mark.parametrize("choice", [{"group_size": 48}, {"scales": "best"}])
def test_unknown_group_sizes_and_scales_are_refused(
    random_llama: Callable[..., Path], tmp_path: Path, choice: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=next(iter(choice))):
        run(random_llama(), tmp_path / "out", **choice)


@pytest.mark.parametrize("weights", ["int4", "fp8"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_nan_in_the_weights_names_the_tensor_and_the_file(
    random_llama: Callable[..., Path], tmp_path: Path, weights: str, name: str
) -> None:
    model = shutil.copytree(random_llama(), tmp_path / "model")
    file = Checkpoint.open(model).tensors[name].file
    values = load_file(file)
    values[name].view(-1)[-1] = float("nan")
    save_file(values, file)
    with pytest.raises(ArtifactError) as caught:
        run(model, tmp_path / "out", weights=weights)
    assert name in caught.value.message
    assert str(file) in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_truncated_input_names_the_file(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(random_llama(), tmp_path / "model")
    victim = sorted(model.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 100)
    with pytest.raises(ArtifactError, match="truncated") as caught:
        run(model, tmp_path / "out")
    assert str(victim) in caught.value.message
    assert not (tmp_path / "out").exists()


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_progress_counts_every_input_byte_and_names_the_layers(four_layers: Path, tmp_path: Path) -> None:
    heard = Listening()
    run(four_layers, tmp_path / "out", heard)
    assert heard.totals == heard.advanced == {"quantize": Checkpoint.open(four_layers).nbytes}
    assert heard.said == ["embeddings", *(f"layer {number} of 4" for number in range(1, 5)), "head"]
    assert heard.notes == []


@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_an_interruption_before_any_layer_resumes_to_the_same_bytes(
    four_layers: Path, tmp_path: Path, weights: str
) -> None:
    whole = digests(run(four_layers, tmp_path / "whole", weights=weights))
    steps = ["embeddings", *(f"layer {number} of 4" for number in range(1, 5)), "head"]
    for step in steps:

        def interrupt(text: str, step: str = step) -> None:
            if text == step:
                raise KeyboardInterrupt

        target = tmp_path / step.replace(" ", "-")
        with pytest.raises(KeyboardInterrupt):
            run(four_layers, target, Listening(interrupt), weights=weights)
        assert not target.exists()
        heard = Listening()
        assert digests(run(four_layers, target, heard, weights=weights)) == whole
        assert heard.said[-1] == "head"
        assert heard.advanced["quantize"] == heard.totals["quantize"]


CHILD = """
import json, sys, time
from pathlib import Path
from tests.stages.test_quantize import Listening, run
model, target, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
heard = Listening(lambda text: time.sleep(wait))
run(model, target, heard, max_shard_bytes=1)
print(json.dumps([heard.notes, heard.said]))
"""


@pytest.fixture
def child(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(*argv: object, code: str = CHILD, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*before, sys.executable, "-c", code, *map(str, argv)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=root, env=env, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_kill_9_loses_only_the_layer_in_hand(
    four_layers: Path, tmp_path: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    whole = digests(run(four_layers, tmp_path / "whole", max_shard_bytes=1))
    target = tmp_path / "killed"
    slow = child(four_layers, target, 1.0)
    deadline = time.monotonic() + 90
    journal: list[dict[str, Any]] = []
    while len(journal) < 3:
        assert slow.poll() is None, slow.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        for file in tmp_path.glob("killed.partial-*/journal.jsonl"):
            journal = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    (partial,) = tmp_path.glob("killed.partial-*")
    assert not target.exists()
    before = {entry["file"]: (partial / entry["file"]).stat().st_mtime_ns for entry in journal}
    heard = Listening()
    assert digests(run(four_layers, target, heard, max_shard_bytes=1)) == whole
    assert heard.notes == [f"quantize: resumed at layer {len(journal)} of 4"]
    assert heard.said[0] == f"layer {len(journal)} of 4"
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    assert not list(tmp_path.glob("killed.partial-*"))


FULL_DISK = """
import os, shutil, subprocess, sys
from pathlib import Path
from tests.stages.test_quantize import Listening, digests, run
from toolchain.errors import ArtifactError
model, whole, disk, when = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
filler = disk / "filler"
def fill(text, leave=0):
    if text != when: return
    with filler.open("wb", buffering=0) as stream:
        try:
            while shutil.disk_usage(disk).free > leave: stream.write(bytes(65536))
        except OSError: pass
fill("start", leave=2**20)
try:
    run(model, disk / "out", Listening(fill))
    sys.exit("it should have failed")
except ArtifactError as error:
    print(error.message, "|", error.hint)
assert not (disk / "out").exists()
filler.unlink()
heard = Listening()
assert digests(run(model, disk / "out", heard)) == digests(whole)
print(heard.said[0])
"""


@pytest.mark.parametrize(("when", "message"), [("layer 4 of 4", "No space left on device"), ("start", "are free")])
def test_a_full_disk_is_said_plainly_and_work_goes_on_after_room_is_made(
    four_layers: Path, tmp_path: Path, child: Callable[..., subprocess.Popen[str]], when: str, message: str
) -> None:
    alone = ("unshare", "-rm")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs needs `unshare -rm`, which this machine does not allow")
    whole, disk = run(four_layers, tmp_path / "whole"), tmp_path / "disk"
    disk.mkdir()
    process = child(four_layers, whole, disk, when, code=FULL_DISK, before=alone)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said, first = out.splitlines()
    assert message in said
    assert "Make room" in said
    assert first.startswith("embeddings" if when == "start" else "layer")


def test_peak_memory_is_bounded_by_matrices_not_by_the_model(
    random_llama: Callable[..., Path], tmp_path: Path, child: Callable[..., subprocess.Popen[str]]
) -> None:
    """Four times the layers, the same peak but for noise."""
    code = CHILD + "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    models = [random_llama(num_hidden_layers=layers, **shape) for layers in (2, 8)]
    running = [child(model, tmp_path / str(place), 0, code=code) for place, model in enumerate(models)]
    peaks = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert out, err
        peaks.append(int(out.splitlines()[-1]) * 1024)
    layer_bytes = 2 * (1024 * 1024 + 2 * 1024 * 256 + 1024 * 1024 + 3 * 1024 * 2048)
    assert peaks[1] - peaks[0] < 2 * layer_bytes < 6 * layer_bytes


@pytest.mark.parametrize("weights", ["none", "fp8", "int8", "int4"])
@pytest.mark.parametrize("variant", ["gqa-fp16", "tied-fp32"])
def test_the_memory_plan_counts_the_bytes_of_the_checkpoint_exactly(
    random_llama: Callable[..., Path], tmp_path: Path, weights: str, variant: str
) -> None:
    model = random_llama(**VARIANTS[variant])
    config = Checkpoint.open(model).config
    written = run(model, tmp_path / "made", weights=weights, group_size=64)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(written).values())
    counted = weight_bytes(config, WEIGHTS[weights], 64, bytes_per_scale=4, dtype_bytes=config.dtype_bytes)
    assert counted == nbytes
