"""LoRA adapters as TensorRT-LLM's C++ runtime reads them from a folder when it starts (``lora_prefetch_dir``).

    DIR/TASK/model.lora_weights.npy   f16 [1, matrices, most]: A [rank, in] then B [out, rank] of a matrix, row major,
                                      B times the scaling, filled up with zeros
    DIR/TASK/model.lora_config.npy    i32 [1, matrices, 3]: module, layer, rank

Sources (read 2026-11): NVIDIA/TensorRT-LLM examples/hf_lora_convert.py, tensorrt_llm/lora_manager.py LORA_MODULE_IDS,
cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp ``prefetchLoraWeights``; tensorrtllm_backend docs/lora.md. No
GPU has run any of it.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain import workspace
from toolchain.adapters import Adapter
from toolchain.errors import ArtifactError
from toolchain.family import LlamaConfig, layer_linears

FOLDER = "lora"
MODULES = {
    "self_attn.q_proj": 1,
    "self_attn.k_proj": 2,
    "self_attn.v_proj": 3,
    "self_attn.o_proj": 4,
    "mlp.gate_proj": 5,
    "mlp.down_proj": 6,
    "mlp.up_proj": 7,
}
"""``attn_q``, ``attn_k``, ``attn_v``, ``attn_dense``, ``mlp_h_to_4h``, ``mlp_4h_to_h`` and ``mlp_gate``."""


def tables(adapter: Adapter, config: LlamaConfig) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]]:
    """An adapter -> (weights [1, n, most], config [1, n, 3]). ArtifactError for a number that f16 does not hold."""
    rows, keys = [], []
    for layer, linear in layer_linears(config):
        if adapter.has(layer, linear):
            rows.append(np.concatenate([matrix.ravel() for matrix in adapter.matrices(layer, linear)]))
            keys.append((MODULES[linear], layer, adapter.rank))
    weights = np.zeros((1, len(rows), max(map(len, rows))), np.float16)
    with np.errstate(over="ignore"):
        for place, row in enumerate(rows):
            weights[0, place, : len(row)] = row
    if not np.isfinite(weights).all():
        raise ArtifactError(f"{adapter.path}: the adapter {adapter.name} has numbers that 16 bits do not hold")
    return weights, np.array([keys], np.int32)


def write_adapters(adapters: list[Adapter], config: LlamaConfig, out: Path) -> None:
    """Write a folder for each adapter into ``out``, called 1, 2, ...: what requests say as ``lora_task_id``."""
    for task, adapter in enumerate(adapters, start=1):
        folder = out / FOLDER / str(task)
        folder.mkdir(parents=True, exist_ok=True)
        weights, keys = tables(adapter, config)
        for name, table in (("weights", weights), ("config", keys)):
            content = io.BytesIO()
            np.save(content, np.asarray(table))
            workspace.write_durably(folder / f"model.lora_{name}.npy", content.getvalue())
