"""Writes OpenVINO IR version 11: ``NAME.xml`` (layers, edges) beside ``NAME.bin`` (constants), as a stream.

A model of any size is written in the memory of one piece of one constant: layers go to the XML as they are made,
constants to the .bin as they come, and only the edges (some bytes each) wait for the end. Shapes of intermediate
tensors are left out; OpenVINO infers and so checks them when it reads the model. It knows operations only by name, and
nothing of Llamas.

Format: https://docs.openvino.ai/2026/documentation/openvino-ir-format.html, and what OpenVINO 2026.4.1 itself saves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from toolchain.errors import ArtifactError

Piece = bytes | npt.NDArray[np.uint8]

ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register of the CPUs that read the file in place."""

_SMALL_BYTES = 256
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "i4": 4, "u8": 8, "i8": 8, "i32": 32, "i64": 64, "boolean": 8}
_PRECISION = {"f32": "FP32", "f16": "FP16", "boolean": "BOOL"}


class Port(NamedTuple):
    """An output of a layer, and what it holds."""

    layer: int
    port: int
    element_type: str
    """OpenVINO's name: ``"f32"``, ``"i64"``, ``"i4"`` ..."""


class IrWriter:
    """One IR being written. Use it as a context manager; the files are complete and fsynced once it is left."""

    def __init__(self, xml: Path, name: str) -> None:
        self._xml_path = xml
        self._bin_path = xml.with_suffix(".bin")
        self._name = name
        self._edges: list[str] = []
        self._layers = 0
        self._offset = 0
        self._small: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        self._xml: IO[str] = self._xml_path.open("w", encoding="utf-8")
        self._bin: IO[bytes] = self._bin_path.open("wb")
        self._xml.write(f'<?xml version="1.0"?>\n<net name={quoteattr(self._name)} version="11">\n<layers>\n')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._xml, self._bin:
            if error is not None:
                return
            self._xml.write("</layers>\n<edges>\n")
            self._xml.writelines(self._edges)
            self._xml.write("</edges>\n</net>\n")
            for stream in (self._xml, self._bin):
                stream.flush()
                os.fsync(stream.fileno())

    def node(
        self,
        kind: str,
        version: str,
        inputs: Sequence[Port],
        result: str,
        attributes: Mapping[str, object] | None = None,
        *,
        name: str = "",
        tensor: str = "",
    ) -> Port:
        """A layer with one output of element type ``result``. ``tensor`` also names the output tensor."""
        return self.split(kind, version, inputs, result, 1, attributes, name=name, tensor=tensor)[0]

    def split(
        self,
        kind: str,
        version: str,
        inputs: Sequence[Port],
        result: str,
        outputs: int,
        attributes: Mapping[str, object] | None = None,
        *,
        name: str = "",
        tensor: str = "",
        decompression: bool = False,
    ) -> list[Port]:
        """A layer with any number of ``outputs``, all of element type ``result``; ``decompression`` marks a Convert."""
        layer = self._layers
        self._layers += 1
        names = f" names={quoteattr(tensor)}" if tensor else ""
        data = "".join(f" {key}={quoteattr(_text(value))}" for key, value in (attributes or {}).items())
        mark = '<rt_info><attribute name="decompression" version="0"/></rt_info>' if decompression else ""
        ports = [Port(layer, len(inputs) + index, result) for index in range(outputs)]
        parts = [f'<layer id="{layer}" name={quoteattr(name or f"{kind}_{layer}")} type="{kind}" version="{version}">']
        parts.append(f"<data{data}/>" if data else "")
        parts.append(mark)
        if inputs:
            sockets = (_port(index, port.element_type) for index, port in enumerate(inputs))
            parts.append(f"<input>{''.join(sockets)}</input>")
        if ports:
            parts.append(f"<output>{''.join(_port(port.port, result, names) for port in ports)}</output>")
        self._xml.write("".join(parts) + "</layer>\n")
        for index, port in enumerate(inputs):
            edge = f'<edge from-layer="{port.layer}" from-port="{port.port}" to-layer="{layer}" to-port="{index}"/>\n'
            self._edges.append(edge)
        return ports

    def constant(self, element_type: str, shape: Sequence[int], pieces: Iterable[Piece], *, name: str = "") -> Port:
        """A constant whose bytes are the concatenation of ``pieces``: row major, little endian, i4 low nibble first.

        Raises ArtifactError if the pieces do not fill ``shape`` exactly.
        """
        size = (int(np.prod(shape, dtype=np.int64)) * _BITS[element_type] + 7) // 8
        offset = self._store(pieces, size, name)
        where = {"element_type": element_type, "shape": tuple(shape), "offset": offset, "size": size}
        return self.node("Const", "opset1", (), element_type, where, name=name)

    def decompressed(self, port: Port) -> Port:
        """A constant of fewer bits -> f32, marked so that the plug-in keeps the constant as it is in memory."""
        if port.element_type == "f32":
            return port
        target = {"destination_type": "f32"}
        return self.split("Convert", "opset1", (port,), "f32", 1, target, decompression=True)[0]

    def values(self, element_type: str, value: npt.ArrayLike) -> Port:
        """A small constant: a scalar or a list, as ``"i64"``, ``"i32"`` or ``"f32"``."""
        array = np.asarray(value, dtype={"i64": np.int64, "i32": np.int32, "f32": np.float32}[element_type])
        return self.constant(element_type, array.shape, [array.tobytes()])

    def _store(self, pieces: Iterable[Piece], size: int, name: str) -> int:
        """Append the bytes, aligned, and return where they begin; small ones are stored once."""
        if size <= _SMALL_BYTES:
            content = b"".join(bytes(piece) for piece in pieces)
            if len(content) == size and content in self._small:
                return self._small[content]
            pieces = [content]
        start = -(-self._offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._bin.write(bytes(start - self._offset))
        written = 0
        for piece in pieces:
            written += self._bin.write(piece if isinstance(piece, bytes) else piece.data)
        if written != size:
            raise ArtifactError(f"{self._bin_path}: {name}: {written} bytes came where {size} were expected")
        self._offset = start + size
        if size <= _SMALL_BYTES:
            self._small[content] = start
        return start


def _port(index: int, element_type: str, names: str = "") -> str:
    precision = _PRECISION.get(element_type, element_type.upper())
    return f'<port id="{index}" precision="{precision}"{names}/>'


def _text(value: object) -> str:
    """An attribute as IR spells it: (1, 2) -> ``"1, 2"``, True -> ``"true"``."""
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
