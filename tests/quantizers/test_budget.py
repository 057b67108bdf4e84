"""The budget of memory: an upper bound that is not far above what the kernel measures, and a plain no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quantizers.calibrated import random_samples
from tests.stages.test_quantize import Listening, digests
from tests.stages.test_quantize_calibrated import FP8, INT4, WAYS, calibrate
from toolchain.errors import PlanError, RecipeError
from toolchain.quantizers import budget
from toolchain.quantizers.budget import Work, choose_chunk, need
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.place import Place
from toolchain.units import GIB, MIB

CHOICES = {"rtn": INT4, "awq": WAYS["awq"], "gptq": WAYS["gptq"], "fp8": FP8}

MEASURE = """
import json, sys, threading, time
from pathlib import Path
from tests.quantizers.calibrated import random_samples
from tests.quantizers.test_budget import CHOICES
from tests.stages.test_quantize_calibrated import calibrate
from toolchain.quantizers import budget
from toolchain.quantizers.place import resident

model, target, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
computed, peak, over = [], [0], threading.Event()
exact = budget.need
def listen(*args, **kwargs):
    found = exact(*args, **kwargs)
    computed.append(found.ram)
    return found
budget.need = listen  # only to hear what it says

def watch():
    while not over.wait(0.002): peak[0] = max(peak[0], resident())
watcher = threading.Thread(target=watch)
watcher.start()
base = resident()
calibrate(model, target, samples=None if way == "rtn" else random_samples(8, 256), **CHOICES[way])
over.set()
watcher.join()
print(json.dumps([base, peak[0], computed[0]]))
"""


@pytest.mark.parametrize("way", CHOICES)
def test_measured_peaks_stay_below_what_was_computed(
    random_llama: Callable[..., Path], tmp_path: Path, root: Path, way: str
) -> None:
    model = random_llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16)
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "out"), way]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    base, measured, computed = json.loads(done.stdout.splitlines()[-1])
    assert base < measured < computed, [number // MIB for number in (base, measured, computed)]
    assert computed < 2 * measured, [number // MIB for number in (base, measured, computed)]


def work(weights: str = "int4", method: str = "awq", **changes: Any) -> Work:
    """Llama-2-13B."""
    from toolchain.family import published

    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config
    scheme = Scheme(weights, 128, "mse", "int8", method, calibrated=True)
    values = {"copied": True, "rows": 64, "row_tokens": 256, "threads": 2} | changes
    return Work(config, scheme, 2, **values)


@pytest.mark.parametrize(("weights", "method"), [("int4", "awq"), ("int4", "gptq"), ("fp8", "rtn")])
def test_less_memory_means_fewer_tokens_at_once_and_at_last_a_no(weights: str, method: str) -> None:
    one = work(weights, method)
    assert choose_chunk(one) == budget.MOST_TOKENS
    whole = need(one, budget.MOST_TOKENS).ram
    assert choose_chunk(one, max_ram=whole) == budget.MOST_TOKENS
    fewer = choose_chunk(one, max_ram=whole - 1)
    assert fewer < budget.MOST_TOKENS
    assert fewer % one.row_tokens == 0
    assert need(one, fewer).ram <= whole - 1
    least = need(one, 256).ram
    assert choose_chunk(one, max_ram=least) == 256
    with pytest.raises(PlanError, match=r"at least [\d.]+ (GiB|MiB) .* more than --max-ram") as caught:
        choose_chunk(one, max_ram=least - 10 * MIB)
    assert "10.00 MiB more than" in caught.value.message
    assert f"--max-ram {-(-least // MIB)}MiB" in caught.value.hint


def test_what_an_earlier_run_recorded_is_kept_where_it_fits() -> None:
    one = work()
    assert choose_chunk(one, recorded=512) == 512
    assert choose_chunk(one, max_ram=need(one, 256).ram, recorded=512) == 256


def test_samples_longer_than_a_chunk_go_one_by_one() -> None:
    assert choose_chunk(work(rows=4, row_tokens=4096)) == 4096


def test_13b_with_awq_and_512_samples_of_512_tokens_fits_a_gpu_of_16_gb() -> None:
    one = work(rows=512, row_tokens=512, on_gpu=True)
    assert choose_chunk(one, max_vram=14 * GIB) == budget.MOST_TOKENS
    with pytest.raises(PlanError, match="--max-vram"):
        choose_chunk(one, max_vram=GIB)


def test_too_little_memory_is_refused_before_anything_is_written(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="--max-ram") as caught:
        calibrate(random_llama(), tmp_path / "out", place=Place(max_ram=100 * MIB), **WAYS["awq"])
    assert "one layer of this model with awq" in caught.value.message
    assert not list(tmp_path.glob("out*"))


def test_a_resumed_run_keeps_the_chunks_that_it_was_begun_with(
    random_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with 64 tokens at once, as a tight limit brings about, and continued where 2048 would fit."""
    model, samples = random_llama(num_hidden_layers=3, dtype="bfloat16"), random_samples(40, 64)

    def interrupt(text: str) -> None:
        if text == "layer 3 of 3":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget, "MOST_TOKENS", 64)
        whole = digests(calibrate(model, tmp_path / "whole", samples=samples, **WAYS["gptq"]))
        target = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, target, Listening(interrupt), samples=samples, **WAYS["gptq"])
    (journal,) = tmp_path.glob("out.partial-*/journal.jsonl")
    assert {json.loads(line)["chunk_tokens"] for line in journal.read_text().splitlines()} == {64}
    heard = Listening()
    assert digests(calibrate(model, target, heard, samples=samples, **WAYS["gptq"])) == whole
    assert heard.said[0] in ("layer 2 of 3", "layer 3 of 3")


def test_work_begun_on_another_device_begins_again_and_says_so(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = random_llama(num_hidden_layers=3, dtype="bfloat16")
    whole = digests(calibrate(model, tmp_path / "whole", **WAYS["fp8"]))

    def interrupt(text: str) -> None:
        if text == "layer 3 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "out", Listening(interrupt), **WAYS["fp8"])
    (journal,) = tmp_path.glob("out.partial-*/journal.jsonl")
    assert '"device": "cpu"' in journal.read_text()
    journal.write_text(journal.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    heard = Listening()
    assert digests(calibrate(model, tmp_path / "out", heard, **WAYS["fp8"])) == whole
    assert heard.said[0] == "embeddings"
    assert [note for note in heard.notes if "begins again" in note and "on cuda" in note]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda and cuda:N"):
        Place(device)


def test_a_gpu_that_is_not_there_is_refused_by_what_torch_sees(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"--quantize-on cuda:99: torch .* sees") as caught:
        calibrate(random_llama(), tmp_path / "out", place=Place("cuda:99"), **WAYS["fp8"])
    assert "--quantize-on cpu" in caught.value.hint
    assert not list(tmp_path.glob("out*"))
