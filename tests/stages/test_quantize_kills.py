"""kill -9 and Ctrl-C at random moments of quantize: what a resumed run makes is what an undisturbed one makes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SCALELLM
from toolchain import workspace

# One process imports torch and forks for each run, so that 24 runs fit into a minute. It kills each child a random
# while after its journal has reached a given length, so the kills spread over the whole work on a busy machine too.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from tests.quantizers.calibrated import random_samples
from tests.stages.test_quantize_calibrated import INT4, WAYS, calibrate
from toolchain.quantizers import calibration, convert

model, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ways = {way: {**WAYS[way], "samples": random_samples(8, 32)} for way in ("awq", "gptq", "fp8")}
ways["int4"] = {**INT4, "samples": None}

def start(target, way):
    child = os.fork()
    if child: return child
    try:
        calibrate(model, target, **ways[way])
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def ended(child):
    pid, status = os.waitpid(child, os.WNOHANG)
    assert not pid or os.waitstatus_to_exitcode(status) == 0, status
    return bool(pid)

def length(target):
    return sum(file.read_bytes().count(b"\\n") for file in target.parent.glob(f"{target.name}.partial-*/journal.jsonl"))

dice, hits = random.Random(20), []
for way in ways:
    began = time.monotonic()
    child = start(folder / f"{way}-whole", way)
    while not ended(child): time.sleep(0.002)
    unit_s = (time.monotonic() - began) / 8
    target = folder / way
    for place in range(kills):
        least, wait = place * 8 // kills, dice.uniform(0, unit_s)
        child = start(target, way)
        over = False
        while not over and length(target) < least:
            over = ended(child)
            time.sleep(0.001)
        if not over:
            time.sleep(wait)
            over = ended(child)
        if not over:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert not target.exists() or (target / "stamp.json").exists()
        hits.append(not over)
    child = start(target, way)
    while not ended(child): time.sleep(0.002)
print(json.dumps(hits))
"""


def digests(folder: Path) -> dict[str, str]:
    """Of the files as they are, which are those of the stamp."""
    stamp = workspace.require(folder, "quantize")
    found = {name: workspace.sha256_of(folder / name) for name in stamp.files}
    assert found == {name: record.sha256 for name, record in stamp.files.items()}
    return found


@pytest.mark.timeout(600)  # a minute where nothing else runs
def test_kill_9_at_twenty_random_moments_changes_no_byte(
    random_llama: Callable[..., Path], tmp_path: Path, root: Path
) -> None:
    model = random_llama(num_hidden_layers=6)
    command = [sys.executable, "-c", KILLER, str(model), str(tmp_path), "5"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert len(hits) == 20
    assert sum(hits) >= 15, hits
    for way in ("awq", "gptq", "fp8", "int4"):
        assert digests(tmp_path / way) == digests(tmp_path / f"{way}-whole")
    assert not list(tmp_path.glob("*.partial-*"))


RECIPE = """\
name: small
device: cpu
model: unused/unused
quantization: {weights: int4, group_size: 64, method: awq}
calibration: {samples: 16, tokens: 64}
kv_cache: {dtype: int8}
limits: {max_batch_size: 4, max_seq_len: 256}
"""


@pytest.mark.timeout(600)
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    random_llama: Callable[..., Path], tmp_path: Path, root: Path
) -> None:
    model = random_llama(num_hidden_layers=24, hidden_size=512, intermediate_size=1536, num_attention_heads=8)
    recipe = tmp_path / "small recipe.yaml"
    recipe.write_text(RECIPE)
    work = tmp_path / "work"
    argv = ["quantize", "--recipe", str(recipe), "--model", str(model), "--work", str(work), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "300", "HF_HUB_OFFLINE": "1"}
    victim = subprocess.Popen(
        [SCALELLM, *argv],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        deadline = time.monotonic() + 120
        while sum(file.read_bytes().count(b"\n") for file in work.glob("small/*.partial-*/journal.jsonl")) < 2:
            assert victim.poll() is None, victim.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        victim.send_signal(signal.SIGINT)
        _, said = victim.communicate(timeout=240)
    finally:
        victim.kill()
        victim.communicate()
    assert victim.returncode == 130, said
    assert "Traceback" not in said
    assert "finished work is kept" in said
    stopped = re.search(r"interrupted at layer (\d+) of 24", said)
    assert stopped, said
    (typed,) = [line.strip() for line in said.splitlines() if line.strip().startswith("scalellm quantize")]
    assert shlex.split(typed) == ["scalellm", *argv]
    assert not (work / "small" / "checkpoint").exists()

    again = subprocess.run(
        [SCALELLM, *shlex.split(typed)[1:]], env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed at layer {stopped[1]} of 24" in again.stderr + again.stdout
    workspace.require(work / "small" / "checkpoint", "checkpoint")
