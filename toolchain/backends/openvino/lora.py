"""LoRA adapters inside the graph, chosen token by token, so that requests with and without them share every step.

OpenVINO GenAI 2026.4 switches adapters for a whole ``generate`` only, not for requests that are added while others run
(src/cpp/src/continuous_batching/pipeline_impl.cpp, ``set_adapters``). So the choice travels in the ids: token t of
adapter k (1, 2, ...; 0 is the model alone) is t + k V, with V ids in the vocabulary.

    ids        i64 [tokens, 1] -> k = ids div V, t = ids mod V
    matrix     W x + B (m(k) A x), A [R, in], B [out, R]: all adapters, one below the other; m(k) is 1 at the rows of k
    logits     [sampled, 1, (adapters + 1) V]: the model's own at k V, and next to nothing everywhere else

What is sampled is then an id of the same adapter, which comes back with the next step; and the cache of prompts, which
compares ids, never gives one adapter the keys and values of another. ``sampled_tokens_indices`` is an input that GenAI
fills by its name, and would add by itself only right behind the last matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from toolchain.adapters import Adapter, Floats
from toolchain.backends.openvino.ir import IrWriter, Port
from toolchain.family import LlamaConfig, linear_name

_NEVER = -1e30
"""Added to the logits of other adapters' ids: no probability is left, and bf16 holds it."""
_NUMPY = {"auto_broadcast": "numpy"}


@dataclass
class Lora:
    """The adapters in one graph that is being written."""

    ir: IrWriter
    config: LlamaConfig
    adapters: Sequence[Adapter]
    _which: Port | None = None
    _masks: dict[tuple[int, ...], Port] = field(default_factory=dict)

    def split(self, ids: Port) -> Port:
        """ids i64 [batch, new] -> the tokens' own ids; remembers the adapters."""
        vocabulary = self.ir.values("i64", self.config.vocab_size)
        self._which = self.ir.node("Divide", "opset1", (ids, vocabulary), "i64", {**_NUMPY, "m_pythondiv": True})
        return self.ir.node("Mod", "opset1", (ids, vocabulary), "i64", _NUMPY)

    def add(self, product: Port, hidden: Port, layer: int, linear: str) -> Port:
        """product [.., out] and the matrix's input [.., in] -> the product of the adapted matrix."""
        found = [
            (number, *adapter.matrices(layer, linear))
            for number, adapter in enumerate(self.adapters, start=1)
            if adapter.has(layer, linear)
        ]
        if not found:
            return product
        owners = tuple(number for number, first, _ in found for _ in range(len(first)))
        down = np.concatenate([first for _, first, _ in found])
        up = np.concatenate([second for _, _, second in found], axis=1)
        name = linear_name(layer, linear)
        inner = self._matmul(hidden, self._constant(f"{name}.lora_A", down))
        chosen = self._binary("Multiply", inner, self._mask(owners))
        return self._binary("Add", product, self._matmul(chosen, self._constant(f"{name}.lora_B", up)))

    def sampled(self, hidden: Port, indices: Port) -> Port:
        """The rows of hidden [tokens, .., hidden] that are sampled from."""
        return self._gather(hidden, indices)

    def widen(self, logits: Port, indices: Port) -> Port:
        """logits [sampled, n, V] -> [sampled, n, (adapters + 1) V]."""
        assert self._which is not None
        ir = self.ir
        which = self._unsqueeze(self._gather(self._which, indices), 2)
        slots = ir.values("i64", list(range(len(self.adapters) + 1)))
        own = ir.node("Equal", "opset1", (which, slots), "boolean", _NUMPY)
        choices = (own, ir.values("f32", 0.0), ir.values("f32", _NEVER))
        penalty = self._unsqueeze(ir.node("Select", "opset1", choices, "f32", _NUMPY), 3)
        wide = self._binary("Add", self._unsqueeze(logits, 2), penalty)
        shape = ir.values("i64", [0, 0, -1])
        return ir.node("Reshape", "opset1", (wide, shape), "f32", {"special_zero": True}, tensor="logits")

    def _mask(self, owners: tuple[int, ...]) -> Port:
        """f32 [batch, new, R]: 1 at the rows of the token's own adapter."""
        if owners not in self._masks:
            assert self._which is not None
            pair = (self._unsqueeze(self._which, 2), self.ir.values("i64", list(owners)))
            own = self.ir.node("Equal", "opset1", pair, "boolean", _NUMPY)
            choices = (own, self.ir.values("f32", 1.0), self.ir.values("f32", 0.0))
            self._masks[owners] = self.ir.node("Select", "opset1", choices, "f32", _NUMPY)
        return self._masks[owners]

    def _constant(self, name: str, matrix: Floats) -> Port:
        return self.ir.constant("f32", matrix.shape, [np.ascontiguousarray(matrix).tobytes()], name=name)

    def _matmul(self, left: Port, right: Port) -> Port:
        return self.ir.node("MatMul", "opset1", (left, right), "f32", {"transpose_a": False, "transpose_b": True})

    def _binary(self, kind: str, left: Port, right: Port) -> Port:
        return self.ir.node(kind, "opset1", (left, right), "f32", _NUMPY)

    def _unsqueeze(self, port: Port, axis: int) -> Port:
        return self.ir.node("Unsqueeze", "opset1", (port, self.ir.values("i64", [axis])), port.element_type)

    def _gather(self, table: Port, indices: Port) -> Port:
        inputs = (table, indices, self.ir.values("i64", 0))
        return self.ir.node("Gather", "opset8", inputs, table.element_type, {"batch_dims": 0})
