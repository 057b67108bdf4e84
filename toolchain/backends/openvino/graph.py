"""The forward pass of a Llama as an OpenVINO graph with state, in the shapes that OpenVINO's own passes look for.

``input_ids``, ``attention_mask``, ``position_ids`` and ``beam_idx`` -> ``logits``; keys and values live in variables
between calls. OpenVINO GenAI turns the attention into paged attention when it loads the model (SDPAToPagedAttention
finds the inputs by their *friendly* names, so layers carry the same names as tensors), and the CPU plug-in fuses the
rotary embedding, the RMS norm and the decompression of weights. All arithmetic is written in f32; the plug-in lowers it
to what ``INFERENCE_PRECISION_HINT`` allows. It does not know how a weight is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from toolchain import family
from toolchain.adapters import Adapter
from toolchain.backends.openvino.ir import IrWriter, Port
from toolchain.backends.openvino.lora import Lora
from toolchain.backends.openvino.rotary import inverse_frequencies
from toolchain.backends.openvino.weights import Matrix
from toolchain.family import LlamaConfig

_MASKED = -65504.0
"""Added to masked scores: the lowest f16, so that no precision turns a fully masked (padding) row into NaN."""

_NUMPY = {"auto_broadcast": "numpy"}


class Tensors(Protocol):
    """Where weights come from: ``weights.Weights``."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def floats(self, name: str) -> Port:
        """An unquantized tensor, as f32."""

    def linear(self, name: str) -> Matrix:
        """The matrix of a linear layer."""


@dataclass(frozen=True)
class _Shared:
    """What every layer reads."""

    batch: Port
    """i64 [1]."""
    beam_idx: Port
    """i32 [batch]."""
    mask: Port
    """f32 [batch, 1, new, past + new]."""
    cos: Port
    """f32 [batch, 1, new, head_dim]."""
    sin: Port


def write_llama(ir: IrWriter, config: LlamaConfig, weights: Tensors, adapters: Sequence[Adapter] = ()) -> None:
    """The whole model: ids i64 [batch, new] -> logits f32 [batch, new, vocab]; with ``adapters`` as in ``lora``."""
    lora = Lora(ir, config, adapters) if adapters else None
    graph = _Graph(ir, config, weights, lora)
    ids = graph.parameter("input_ids", "i64", "?,?")
    ids = lora.split(ids) if lora else ids
    attention_mask = graph.parameter("attention_mask", "i64", "?,?")
    position_ids = graph.parameter("position_ids", "i64", "?,?")
    beam_idx = graph.parameter("beam_idx", "i32", "?")
    cos, sin = graph.rotary_table(position_ids)
    shared = _Shared(graph.size(ids, [0]), beam_idx, graph.causal_mask(ids, attention_mask), cos, sin)
    hidden = graph.gather(weights.floats("model.embed_tokens.weight"), ids)
    for layer in range(config.num_layers):
        hidden = graph.decoder_layer(hidden, layer, shared)
    hidden = graph.rms_norm(hidden, "model.norm")
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    indices = graph.parameter("sampled_tokens_indices", "i64", "?") if lora else None
    if lora and indices:
        logits = graph.matmul(lora.sampled(hidden, indices), weights.floats(head))
        logits = lora.widen(logits, indices)
    else:
        logits = graph.matmul(hidden, weights.floats(head), tensor="logits")
    ir.split("Result", "opset1", (logits,), "f32", 0, name="logits")


class _Graph:
    """Operations in terms of one model."""

    def __init__(self, ir: IrWriter, config: LlamaConfig, weights: Tensors, lora: Lora | None) -> None:
        self.ir = ir
        self.lora = lora
        self.config = config
        self.weights = weights

    def parameter(self, name: str, element_type: str, shape: str) -> Port:
        data = {"shape": shape, "element_type": element_type}
        return self.ir.node("Parameter", "opset1", (), element_type, data, name=name, tensor=name)

    def decoder_layer(self, hidden: Port, layer: int, shared: _Shared) -> Port:
        """[batch, new, hidden] -> the same."""
        name = f"model.layers.{layer}"
        attended = self.attention(self.rms_norm(hidden, f"{name}.input_layernorm"), layer, shared)
        hidden = self.binary("Add", hidden, attended)
        inner = self.rms_norm(hidden, f"{name}.post_attention_layernorm")
        gate = self.ir.node("Swish", "opset4", (self.linear(inner, layer, "mlp.gate_proj"),), "f32")
        product = self.binary("Multiply", gate, self.linear(inner, layer, "mlp.up_proj"))
        return self.binary("Add", hidden, self.linear(product, layer, "mlp.down_proj"))

    def attention(self, hidden: Port, layer: int, shared: _Shared) -> Port:
        """[batch, new, hidden] -> the same. Keys and values of the past come from the layer's two variables."""
        config = self.config
        query = self.rotate(self.heads(hidden, layer, "self_attn.q_proj", config.num_heads), shared)
        key = self.rotate(self.heads(hidden, layer, "self_attn.k_proj", config.num_kv_heads), shared)
        value = self.heads(hidden, layer, "self_attn.v_proj", config.num_kv_heads)
        keys = self.repeat(self.remember(key, f"past_key_values.{layer}.key", shared))
        values = self.repeat(self.remember(value, f"past_key_values.{layer}.value", shared))
        inputs = (query, keys, values, shared.mask)
        context = self.ir.node("ScaledDotProductAttention", "opset13", inputs, "f32", {"causal": False})
        merged = self.reshape(self.transpose(context, [0, 2, 1, 3]), [0, 0, config.q_size])
        return self.linear(merged, layer, "self_attn.o_proj")

    def heads(self, hidden: Port, layer: int, linear: str, count: int) -> Port:
        """[batch, new, hidden] -> [batch, count, new, head_dim]."""
        flat = self.linear(hidden, layer, linear)
        return self.transpose(self.reshape(flat, [0, 0, count, self.config.head_dim]), [0, 2, 1, 3])

    def remember(self, new: Port, variable: str, shared: _Shared) -> Port:
        """Append to a variable and read it all: [batch, kv, new, head_dim] -> [batch, kv, past + new, head_dim]."""
        kv, head_dim = self.config.num_kv_heads, self.config.head_dim
        sizes = (shared.batch, *(self.ir.values("i64", [size]) for size in (kv, 0, head_dim)))
        shape = self.ir.node("Concat", "opset1", sizes, "i64", {"axis": 0})
        empty = self.ir.node("Broadcast", "opset3", (self.ir.values("f32", 0.0), shape), "f32", {"mode": "numpy"})
        data = {"variable_id": variable, "variable_type": "f32", "variable_shape": f"?,{kv},?,{head_dim}"}
        past = self.gather(self.ir.node("ReadValue", "opset6", (empty,), "f32", data), shared.beam_idx)
        both = self.ir.node("Concat", "opset1", (past, new), "f32", {"axis": 2})
        self.ir.node("Assign", "opset6", (both,), "f32", {"variable_id": variable})
        return both

    def repeat(self, states: Port) -> Port:
        """One copy for each query head of a group: [batch, kv, length, head_dim] -> [batch, heads, ...]."""
        copies = self.config.num_heads // self.config.num_kv_heads
        if copies == 1:
            return states
        target = self.ir.values("i64", [1, 1, copies, 1, 1])
        wide = self.ir.node(
            "Broadcast", "opset3", (self.unsqueeze(states, [2]), target), "f32", {"mode": "bidirectional"}
        )
        return self.reshape(wide, [0, self.config.num_heads, -1, self.config.head_dim])

    def rotate(self, states: Port, shared: _Shared) -> Port:
        """x cos + (-x2, x1) sin, where x1 and x2 are the halves of each head (Hugging Face's order of dimensions)."""
        half = self.config.head_dim // 2
        where = (self.ir.values("i64", 3), self.ir.values("i64", [half, half]))
        first, second = self.ir.split("VariadicSplit", "opset1", (states, *where), "f32", 2)
        negated = self.binary("Multiply", second, self.ir.values("f32", -1.0))
        turned = self.ir.node("Concat", "opset1", (negated, first), "f32", {"axis": -1})
        straight = self.binary("Multiply", states, shared.cos)
        return self.binary("Add", straight, self.binary("Multiply", turned, shared.sin))

    def rotary_table(self, position_ids: Port) -> tuple[Port, Port]:
        """i64 [batch, new] -> the cosines and sines, f32 [batch, 1, new, head_dim]."""
        frequencies = self.ir.values("f32", inverse_frequencies(self.config)[None, None, :])
        positions = self.convert(self.unsqueeze(position_ids, [2]), "f32")
        angles = self.binary("Multiply", positions, frequencies)
        both = self.ir.node("Concat", "opset1", (angles, angles), "f32", {"axis": -1})
        cos, sin = (self.ir.node(kind, "opset1", (both,), "f32") for kind in ("Cos", "Sin"))
        return self.unsqueeze(cos, [1]), self.unsqueeze(sin, [1])

    def causal_mask(self, ids: Port, attention_mask: Port) -> Port:
        """ids [batch, new], mask i64 [batch, past + new] -> f32 [batch, 1, new, past + new]: 0 where it may look."""
        total, new = self.size(attention_mask, 1), self.size(ids, 1)
        one = self.ir.values("i64", 1)
        span = {"output_type": "i64"}
        past = self.ir.node("Subtract", "opset1", (total, new), "i64", _NUMPY)
        columns = self.ir.node("Range", "opset4", (self.ir.values("i64", 0), total, one), "i64", span)
        rows = self.unsqueeze(self.ir.node("Range", "opset4", (past, total, one), "i64", span), [1])
        earlier = self.ir.node("LessEqual", "opset1", (columns, rows), "boolean", _NUMPY)
        present = self.convert(self.unsqueeze(attention_mask, [1, 2]), "boolean")
        seen = self.ir.node("LogicalAnd", "opset1", (earlier, present), "boolean", _NUMPY)
        choices = (seen, self.ir.values("f32", 0.0), self.ir.values("f32", _MASKED))
        return self.ir.node("Select", "opset1", choices, "f32", _NUMPY)

    def rms_norm(self, hidden: Port, name: str) -> Port:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        square = self.binary("Power", hidden, self.ir.values("f32", 2.0))
        axes = self.ir.values("i64", [-1])
        mean = self.ir.node("ReduceMean", "opset1", (square, axes), "f32", {"keep_dims": True})
        padded = self.binary("Add", mean, self.ir.values("f32", self.config.rms_norm_eps))
        root = self.ir.node("Sqrt", "opset1", (padded,), "f32")
        unit = self.binary("Multiply", hidden, self.binary("Divide", self.ir.values("f32", 1.0), root))
        return self.binary("Multiply", self.weights.floats(f"{name}.weight"), unit)

    def linear(self, hidden: Port, layer: int, linear: str) -> Port:
        """[.., in] -> [.., out]. The activation is first multiplied by ``pre_quant_scale`` [in] where there is one, and
        the ``bias`` [out] is added last."""
        name = family.linear_name(layer, linear)
        given = hidden
        if self.weights.has(f"{name}.pre_quant_scale"):
            hidden = self.binary("Multiply", hidden, self.weights.floats(f"{name}.pre_quant_scale"))
        matrix = self.weights.linear(name)
        product = self.matmul(hidden, matrix.weight, name=name)
        if matrix.scale is not None:
            product = self.binary("Multiply", product, matrix.scale)
        if self.lora:
            product = self.lora.add(product, given, layer, linear)
        if linear not in self.config.biased:
            return product
        return self.binary("Add", product, self.weights.floats(f"{name}.bias"))

    def matmul(self, hidden: Port, matrix: Port, *, name: str = "", tensor: str = "") -> Port:
        data = {"transpose_a": False, "transpose_b": True}
        return self.ir.node("MatMul", "opset1", (hidden, matrix), "f32", data, name=name, tensor=tensor)

    def binary(self, kind: str, left: Port, right: Port) -> Port:
        return self.ir.node(kind, "opset1", (left, right), "f32", _NUMPY)

    def convert(self, port: Port, element_type: str) -> Port:
        return self.ir.node("Convert", "opset1", (port,), element_type, {"destination_type": element_type})

    def gather(self, table: Port, indices: Port) -> Port:
        """Rows of ``table``."""
        inputs = (table, indices, self.ir.values("i64", 0))
        return self.ir.node("Gather", "opset8", inputs, table.element_type, {"batch_dims": 0})

    def size(self, port: Port, axis: int | list[int]) -> Port:
        """One dimension: i64 [] for an ``axis``, i64 [1] for a list of one."""
        shape = self.ir.node("ShapeOf", "opset3", (port,), "i64", {"output_type": "i64"})
        inputs = (shape, self.ir.values("i64", axis), self.ir.values("i64", 0))
        return self.ir.node("Gather", "opset8", inputs, "i64", {"batch_dims": 0})

    def reshape(self, port: Port, shape: list[int]) -> Port:
        """0 keeps a dimension, -1 takes the rest."""
        inputs = (port, self.ir.values("i64", shape))
        return self.ir.node("Reshape", "opset1", inputs, port.element_type, {"special_zero": True})

    def transpose(self, port: Port, order: list[int]) -> Port:
        return self.ir.node("Transpose", "opset1", (port, self.ir.values("i64", order)), port.element_type)

    def unsqueeze(self, port: Port, axes: list[int]) -> Port:
        return self.ir.node("Unsqueeze", "opset1", (port, self.ir.values("i64", axes)), port.element_type)
