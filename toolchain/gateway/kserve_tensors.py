"""Tensors of KServe's version 2 as plain values and back: raw bytes, typed contents, JSON. It knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from toolchain.gateway.failures import invalid

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "BYTES": np.object_,
}
_KINDS: dict[str, Any] = {"BOOL": bool, "BYTES": str, "FP32": (int, float), "FP16": (int, float)}
"""Datatype -> what its JSON is; integers for all others."""
_FIELDS = {"BOOL": "bool", "INT32": "int", "INT64": "int64", "UINT8": "uint", "UINT64": "uint64", "FP32": "fp32"}
"""Datatype -> its field of ``InferTensorContents``, which has none for half precision."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model."""

    name: str
    datatype: str
    """As KServe writes it: BYTES for texts."""
    dims: tuple[int, ...]
    optional: bool = False

    @classmethod
    def of(cls, found: Any) -> Tensor:
        """From Triton's ``ModelInput`` or ``ModelOutput``."""
        kind = model_config_pb2.DataType.Name(found.data_type).removeprefix("TYPE_")
        optional = bool(getattr(found, "optional", False))
        return cls(found.name, "BYTES" if kind == "STRING" else kind, tuple(found.dims), optional)

    def of_json(self, values: list[Any]) -> list[Any]:
        """Checked. Raises ApiError (400)."""
        kind = _KINDS.get(self.datatype, int)
        for value in values:
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                wanted = {"BOOL": "boolean", "BYTES": "string"}.get(self.datatype, "number")
                text = f"Unable to parse '{self.name}': attempt to access JSON non-{wanted} as {wanted}"
                raise invalid(text, self.name)
            if kind is int and not _fits(value, self.datatype):
                raise invalid(f"Unable to parse '{self.name}': {value} is no {self.datatype}", self.name)
        return values

    def of_raw(self, raw: bytes) -> list[Any]:
        """One of ``raw_input_contents``. Raises ApiError (400)."""
        try:
            if self.datatype == "BYTES":
                return [bytes(one).decode("utf-8", errors="replace") for one in deserialize_bytes_tensor(raw)]
            return list(np.frombuffer(raw, dtype=_DTYPES[self.datatype]).tolist())
        except Exception as error:  # struct's, numpy's and tritonclient's own
            text = f"unexpected size of the contents of input '{self.name}': {error}"
            raise invalid(text, self.name) from None

    def of_typed(self, contents: Any) -> list[Any]:
        """``InferTensorContents``."""
        values = list(getattr(contents, f"{_FIELDS.get(self.datatype, 'bytes')}_contents"))
        return [one.decode("utf-8", errors="replace") if isinstance(one, bytes) else one for one in values]

    def array(self, values: Iterable[Any]) -> np.ndarray[Any, Any]:
        """Plain values, flat."""
        plain = [one.encode() if isinstance(one, str) else one for one in values]
        return np.array(plain, dtype=_DTYPES[self.datatype])


def raw_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """One of ``raw_output_contents``."""
    if array.dtype != np.object_:
        return array.tobytes()
    return bytes(serialize_byte_tensor(array).item()) if array.size else b""


def _fits(value: int, datatype: str) -> bool:
    limits = np.iinfo(_DTYPES[datatype])
    return bool(limits.min <= value <= limits.max)
