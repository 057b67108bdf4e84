"""An imported folder on the CPU engine gives the logits of transformers on the weights that the folder stood for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.backends.test_openvino import TOLERANCE, Stateful, logits_of, span, tokens
from tests.quantizers.foreign import test_compressed_tensors as ct
from tests.quantizers.foreign.adopted import adopt
from tests.quantizers.foreign.folders import AWQ, GPTQ, Written, awq, gptq, write
from toolchain.backends import openvino as backend
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent


def written(kind: str, folder: Path) -> Written:
    if kind == "awq":
        return write(folder, awq(64), AWQ | {"group_size": 64}, kv_heads=2)
    if kind == "gptq-g32":
        return write(folder, gptq(32), GPTQ | {"group_size": 32}, tied=True)
    weights, form = {"w4a16": (ct.INT4, "pack-quantized"), "fp8": (ct.FP8, "float-quantized")}[kind]
    return write(folder, ct.packed(weights, form), ct.settings(weights, form), dtype="bfloat16")


@pytest.mark.parametrize("kind", ["awq", "gptq-g32", "w4a16", "fp8"])
def test_logits_are_those_of_the_foreign_weights(tmp_path, kind):
    source = written(kind, tmp_path / kind)
    target = adopt(source.path, tmp_path / "out")
    backend.write(Checkpoint.open(target), tmp_path / "engine", Silent())
    ids = tokens(2, 40)
    found = Stateful(tmp_path / "engine")(ids, np.ones((2, 40), np.int64), span(2, 0, 40))
    expected = logits_of(source.reference(), ids)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
