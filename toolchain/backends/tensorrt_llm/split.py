"""How a Llama is laid out over the ranks of a TensorRT-LLM checkpoint: names of modules, and who gets which slice.

Matrices that read the residual stream are cut along their outputs (column-parallel), those that write to it along their
inputs (row-parallel). Heads are never cut: q, k and v are split by heads first and joined within the rank. It knows no
dtype and touches no weights.

Source: tensorrt_llm/models/llama/convert.py, layers/attention.py and mapping.py of NVIDIA/TensorRT-LLM (0.12 to 1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain import family
from toolchain.family import LlamaConfig

MODULES: dict[str, tuple[str, ...]] = {
    "attention.qkv": family.ATTENTION_IN,
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""The matrices of a layer, and what each is made of. ``fc`` is the one that the activation is applied to."""

ROW_PARALLEL = ("attention.dense", "mlp.proj")

NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
"""Norms of a layer: TensorRT-LLM's name -> that of Hugging Face."""


@dataclass(frozen=True)
class Split:
    """Tensor parallel (``tp``) times pipeline parallel (``pp``)."""

    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def file(self, stage: int, tp_rank: int) -> str:
        """The file of a rank; ranks of one pipeline stage are neighbors."""
        return f"rank{stage * self.tp + tp_rank}.safetensors"

    def layers(self, config: LlamaConfig, stage: int) -> range:
        """The layers of a pipeline stage: equal parts, in a row. Within its file they are numbered from 0."""
        count = config.num_layers // self.pp
        return range(stage * count, (stage + 1) * count)

    def span(self, config: LlamaConfig, linear: str, tp_rank: int) -> tuple[int, int]:
        """The features [start, stop) of one of ``family.LINEARS`` that a rank has, along the axis that is cut.

        That is the output axis, but for o_proj and down_proj the input axis. With fewer key and value heads than ranks,
        neighboring ranks have the same one.
        """
        if linear in ("self_attn.k_proj", "self_attn.v_proj"):
            heads = max(1, config.num_kv_heads // self.tp)
            first = tp_rank * config.num_kv_heads // self.tp
            return first * config.head_dim, (first + heads) * config.head_dim
        whole = config.q_size if linear.startswith("self_attn") else config.intermediate_size
        return tp_rank * whole // self.tp, (tp_rank + 1) * whole // self.tp

    def vocabulary(self, config: LlamaConfig, tp_rank: int) -> tuple[int, int, int]:
        """The rows [start, stop) of ``lm_head`` that a rank has, and the rows of zeros behind them.

        Every rank has ceil(vocabulary / tp) rows. The embedding is whole on every rank of the first stage.
        """
        rows = -(-config.vocab_size // self.tp)
        start, stop = (min(place * rows, config.vocab_size) for place in (tp_rank, tp_rank + 1))
        return start, stop, rows - (stop - start)
