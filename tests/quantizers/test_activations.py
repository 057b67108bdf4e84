"""Hidden states in files, and what the calibration makes of them after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.quantizers.calibrated import hooked, load, random_samples, samples_of
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.quantizers.activations import Activations
from toolchain.quantizers.calibration import HIDDEN, Calibration, observe_kv
from toolchain.quantizers.source import Source


def store(folder: Path) -> Activations:
    return Activations(folder, (100, 48, 16), torch.bfloat16)


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(100, 48, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_what_is_written_is_read_in_whole_samples(tmp_path: Path) -> None:
    kept, hidden = store(tmp_path), states()
    digest = kept.write(3, (hidden[part] for part in kept.chunks()))
    assert digest == hashlib.sha256(hidden.view(torch.uint8).numpy().tobytes()).hexdigest()
    chunks = list(kept.read(3))
    assert len(chunks) == len(kept.chunks()) > 1
    assert torch.equal(torch.cat(chunks), hidden)
    assert kept.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_damage_is_noticed(tmp_path: Path) -> None:
    kept = store(tmp_path)
    digest = kept.write(0, iter([states()]))
    counted: list[int] = []
    assert kept.holds(0, digest, counted.append)
    assert sum(counted) == kept.nbytes
    assert not kept.holds(0, kept.write(1, iter([states(1)])))
    assert not kept.holds(2, digest)
    (file, _) = sorted(tmp_path.iterdir())
    with file.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff\x00")
    assert not kept.holds(0, digest)
    file.write_bytes(file.read_bytes()[:-1])
    assert not kept.holds(0, digest)


def test_only_what_is_behind_is_dropped(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for place in (8, 9, 10):
        kept.write(place, iter([states(place)]))
    kept.drop_before(10)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-states-00010.bin"]
    kept.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_hidden_states_behind_each_layer_are_transformers(
    random_llama: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    """A float16 model is computed in bfloat16 on a CPU, so it is compared with itself cast to bfloat16."""
    model, samples = random_llama(dtype=dtype), random_samples(5, 40)
    computed = torch.float32 if dtype == "float32" else torch.bfloat16
    theirs = hooked(load(model, computed), torch.from_numpy(samples.token_ids))
    calibration = Calibration(Source(Checkpoint.open(model)), samples, tmp_path)
    calibration.embed()
    entry = calibration.observe(0)[1]
    kept = Activations(tmp_path, (5, 40, 256), computed)
    for place in (0, 1):
        torch.testing.assert_close(torch.cat(list(kept.read(place))), theirs[f"model.layers.{place}"])
    assert kept.holds(1, entry[HIDDEN])


def test_observing_keys_and_values_continues_behind_the_last_finished_layer(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model, samples = random_llama(num_hidden_layers=4, dtype="bfloat16"), random_samples()

    def observe(folder: Path, journal: list[dict[str, object]], stop: int = 99) -> list[int]:
        advanced: list[int] = []

        def record(entry: object) -> None:
            if len(journal) == stop:
                raise KeyboardInterrupt
            journal.append(dict(entry))  # type: ignore[call-overload]

        calibration = Calibration(Source(Checkpoint.open(model)), samples, folder)
        found.append(observe_kv(calibration, 4, list(journal), record, advanced.append))
        return advanced

    found: list[list[dict[str, object]]] = []
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    assert observe(tmp_path / "whole", []) == [0, 1, 1, 1, 1]
    journal: list[dict[str, object]] = []
    with pytest.raises(KeyboardInterrupt):
        observe(tmp_path / "cut", journal, stop=3)
    assert min(path.name for path in (tmp_path / "cut").iterdir()) == "hidden-states-00002.bin"
    assert observe(tmp_path / "cut", journal) == [2, 1, 1]
    assert found[0] == found[1]
    assert not list((tmp_path / "cut").iterdir())


def test_tokens_that_the_model_does_not_have_are_refused(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = Source(Checkpoint.open(random_llama()))
    with pytest.raises(ArtifactError, match=r"token 320, and the model at .* has 320"):
        Calibration(source, samples_of(torch.tensor([[1, 2, 320]])), tmp_path)
