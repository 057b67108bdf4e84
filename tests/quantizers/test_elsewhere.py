"""All that is computed stays on the device that was chosen, whichever it is: tried with a pretended one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantizers.calibrated import random_samples
from tests.quantizers.pretended import ELSEWHERE, Far, Pretended
from tests.stages.test_quantize import Listening, tensors_of
from tests.stages.test_quantize_calibrated import INT4, WAYS, calibrate
from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.quantizers import layout, shards
from toolchain.quantizers.calibration import Calibration
from toolchain.quantizers.convert import Converter
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.rows import Workers
from toolchain.quantizers.shards import ShardWriter
from toolchain.quantizers.source import Source
from toolchain.stages.quantize import REPORT


def test_the_pretended_device_notices_a_tensor_that_stayed_behind() -> None:
    with Pretended():
        far = torch.ones(3).to(ELSEWHERE)
        assert isinstance(far, Far)
        assert far.device == ELSEWHERE
        assert float((far * 2).sum()) == 6
        with pytest.raises(AssertionError, match="two devices"):
            far + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            far.numpy()
        assert torch.equal((far + 1).cpu(), torch.full((3,), 2.0))


@pytest.mark.parametrize("way", [*WAYS, "rtn"])
def test_every_method_computes_where_it_is_told_to(random_llama: Callable[..., Path], tmp_path: Path, way: str) -> None:
    """And gives what the CPU gives, but for the roundings that another attention kernel and other blocks bring.

    Scaled channels (awq, int8_sq) or a feedback (gptq) turn those into other codes of equal worth: there the errors are
    compared.
    """
    model, samples = random_llama(dtype="float16", num_hidden_layers=1), random_samples(4, 48)
    choices: dict[str, Any] = {"method": "rtn", **(INT4 if way == "rtn" else WAYS[way])}
    made = calibrate(model, tmp_path / "cpu", samples=samples, **choices)
    on_cpu, expected = tensors_of(made), json.loads((made / REPORT).read_text())["relative_error"]
    errors: dict[str, float] = {}
    checkpoint = Checkpoint.open(model)
    scheme = Scheme(calibrated=True, **choices)
    units = layout.units(checkpoint.config, lambda name: checkpoint.tensors[name].dtype, scheme)
    folder = tmp_path / "far"
    folder.mkdir()
    source = Source(checkpoint, ELSEWHERE)
    with Pretended() as device, Workers(2) as workers:
        calibration = Calibration(source, samples, folder)
        with ShardWriter(folder, shards.plan_shards(units, 2**30)) as writer:
            convert = Converter(source, scheme, writer, workers, lambda _count: None, calibration)
            for unit in units:
                errors |= convert.write(unit)["errors"]
    assert {"aten::mm", "aten::silu"} <= {name.split(".")[0] for name in device.seen}
    far = tensors_of(folder)
    assert far.keys() == on_cpu.keys()
    assert {name: (one.dtype, one.shape) for name, one in far.items()} == {
        name: (one.dtype, one.shape) for name, one in on_cpu.items()
    }
    assert errors == {name: pytest.approx(error, rel=0.05) for name, error in expected.items()}
    if not (scheme.smoothed or scheme.gptq):
        for name, tensor in far.items():
            if tensor.dtype == torch.uint8:
                assert torch.equal(tensor, on_cpu[name]), name
            else:
                torch.testing.assert_close(tensor.float(), on_cpu[name].float(), rtol=0.02, atol=1e-3)


def test_nothing_of_a_run_on_the_cpu_is_elsewhere(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    with Pretended() as device:
        calibrate(random_llama(), tmp_path / "out", Listening(), random_samples(4, 32), **WAYS["awq"])
    assert not device.seen
    assert workspace.require(tmp_path / "out", "quantize").files
