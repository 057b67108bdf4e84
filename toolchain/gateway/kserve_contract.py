"""What KServe's clients know of the model: its tensors, as ``tensorrt_llm_bls``'s config.pbtxt has them.

Requests and answers as JSON (Triton's generate extension) and as tensors (gRPC) -> the inputs and events that the
engines take and give. Wording and behavior: Triton 2.51, src/http_server.cc and src/grpc/stream_infer_handler.cc of
https://github.com/triton-inference-server/server, read 2026-11. It asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from toolchain.errors import ArtifactError
from toolchain.gateway.failures import ApiError, invalid
from toolchain.gateway.kserve_tensors import Tensor, raw_bytes

VERSION = "1"
_PER_SEQUENCE = frozenset({"text_output", "finish_reason"})
"""Outputs of shape [sequences]."""
_GROWING = frozenset({"output_ids", "output_log_probs"})
"""Of shape [1, sequences, tokens]; all others are [1, n]."""
_COUNTS = ("return_num_input_tokens", "return_num_output_tokens")
_ONLY_WITH = {
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
    "finish_reason": "return_num_output_tokens",
}
"""Outputs that the engines always give here, because tokens are counted -> the input with which a client wants them."""
_FINAL = "triton_final_response"
_EMPTY_FINAL = "triton_enable_empty_final_response"
_RESERVED = frozenset({"id", "model_name", "model_version"})


@dataclass(frozen=True)
class Wanted:
    """One request, checked against the model's tensors."""

    inputs: Mapping[str, Any]
    """For the engines: flat lists."""
    outputs: frozenset[str]
    id: str = ""
    empty_final: bool = False
    """Whether the end is told by a response of its own (gRPC)."""

    @property
    def streaming(self) -> bool:
        return bool(self._one("stream"))

    @property
    def answers(self) -> int:
        """How many ends there will be."""
        return int(self._one("num_return_sequences") or 1) if int(self._one("beam_width") or 1) == 1 else 1

    @property
    def asked(self) -> dict[str, Any]:
        """The inputs, and that tokens are counted: of every door it is logged how many there were."""
        return {**self.inputs, **dict.fromkeys(_COUNTS, True)}

    def outputs_of(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """What this client gets of an event; empty where Triton would send nothing."""
        told = {
            name: value
            for name, value in event.items()
            if name in self.outputs and (name not in _ONLY_WITH or self._one(_ONLY_WITH[name]))
        }
        ends = not self.streaming or ("finish_reason" in event and self._one(_ONLY_WITH["finish_reason"]))
        return told if ends or event.get("text_output") or "output_log_probs" in event else {}

    def _one(self, name: str) -> Any:
        found = self.inputs.get(name)
        return found[0] if found else None


@dataclass(frozen=True)
class Contract:
    """The model as its clients see it."""

    config: Any
    """Triton's ``ModelConfig`` message."""

    @classmethod
    def read(cls, file: Path) -> Contract:
        """From a config.pbtxt. Raises ArtifactError."""
        try:
            return cls(text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig()))
        except (OSError, text_format.ParseError) as error:
            raise ArtifactError(f"{file}: not a model configuration of Triton: {error}") from error

    @property
    def name(self) -> str:
        return str(self.config.name)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return {one.name: Tensor.of(one) for one in self.config.input}

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return {one.name: Tensor.of(one) for one in self.config.output}

    @property
    def metadata(self) -> dict[str, Any]:
        """Of ``/v2/models/NAME``; shapes with the batch's dimension, if the model has one."""
        batch = [-1] if self.config.max_batch_size else []
        sides = {
            side: [
                {"name": one.name, "datatype": one.datatype, "shape": [*batch, *one.dims]} for one in tensors.values()
            ]
            for side, tensors in (("inputs", self.inputs), ("outputs", self.outputs))
        }
        return {"name": self.name, "versions": [VERSION], "platform": self.config.backend, **sides}

    @property
    def config_json(self) -> dict[str, Any]:
        """Of ``/v2/models/NAME/config``: numbers as numbers, which protobuf's JSON writes as texts."""
        found: dict[str, Any] = json_format.MessageToDict(
            self.config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return _numbered(found, self.config.DESCRIPTOR)

    def check(self, name: str, version: str) -> None:
        """Raises ApiError (404) for another model than this."""
        if name != self.name:
            raise ApiError(404, f"Request for unknown model: '{name}' is not found", code="model_not_found")
        if version not in ("", VERSION):
            text = f"Request for unknown model: '{name}' version {version} is not found"
            raise ApiError(404, text, code="model_not_found")

    def of_json(self, body: Mapping[str, Any]) -> Wanted:
        """The body of ``generate`` and ``generate_stream``. What is no input is a parameter, which this model does not
        look at. Raises ApiError (400).
        """
        nested = body.get("parameters", {})
        if not isinstance(nested, dict):
            raise invalid("Expected JSON object for keyword: 'parameters'", "parameters")
        found = {}
        for name, value in {**body, **nested}.items():
            if name in self.inputs:
                found[name] = self._alone(name, self.inputs[name].of_json(_listed(value)))
            elif name not in ("id", "parameters") and not isinstance(value, str | int | float | bool):
                kinds = "It should be either 'int', 'bool', or 'string'."
                raise invalid(f"parameter '{name}' has invalid type. {kinds}", name)
        request_id = body.get("id", "")
        return self._checked(found, frozenset(self.outputs), "" if request_id is None else str(request_id))

    def of_tensors(self, request: Any) -> Wanted:
        """A ``ModelInferRequest``. Raises ApiError (400, 404)."""
        self.check(request.model_name, request.model_version)
        given = [one.name for one in request.inputs]
        for name in given:
            if name not in self.inputs:
                raise invalid(f"unexpected inference input '{name}' for model '{self.name}'", name)
        raw = list(request.raw_input_contents)
        if raw and len(raw) != len(given):
            raise invalid("expected raw input content for all inputs, or for none of them")
        found = {
            one.name: self._array(self.inputs[one.name], one, raw[place] if raw else None)
            for place, one in enumerate(request.inputs)
        }
        names = [one.name for one in request.outputs] or list(self.outputs)
        for name in names:
            if name not in self.outputs:
                raise invalid(f"unexpected inference output '{name}' for model '{self.name}'", name)
        return self._checked(found, frozenset(names), request.id, request.parameters[_EMPTY_FINAL].bool_param)

    def _alone(self, name: str, values: list[Any]) -> list[Any]:
        """One value where the model takes one. Of prompts there may be several: the engines say what they think."""
        if self.inputs[name].dims == (1,) and len(values) != 1 and name != "text_input":
            raise invalid(f"{name}: {len(values)} values, expected one", name)
        return values

    def _array(self, tensor: Tensor, given: Any, raw: bytes | None) -> list[Any]:
        if given.datatype != tensor.datatype:
            raise invalid(
                f"inference input '{tensor.name}' data-type is '{given.datatype}', but model '{self.name}' expects "
                f"'{tensor.datatype}'",
                tensor.name,
            )
        shape, batched = tuple(given.shape), bool(self.config.max_batch_size)
        wanted = (-1, *tensor.dims) if batched else tensor.dims
        if len(shape) != len(wanted) or any(-1 != one != other for one, other in zip(wanted, shape, strict=True)):
            spoken = ",".join(map(str, wanted)), ",".join(map(str, shape))
            raise invalid(
                f"unexpected shape for input '{tensor.name}' for model '{self.name}'. Expected [{spoken[0]}], got "
                f"[{spoken[1]}]",
                tensor.name,
            )
        values = tensor.of_raw(raw) if raw is not None else tensor.of_typed(given.contents)
        if len(values) != int(np.prod(shape)):
            raise invalid(f"input '{tensor.name}' holds {len(values)} values, and its shape says {list(shape)}")
        return values

    def _checked(self, found: dict[str, Any], outputs: frozenset[str], request_id: str, final: bool = False) -> Wanted:
        missing = [one.name for one in self.inputs.values() if not one.optional and one.name not in found]
        if missing:
            least, most = sum(not one.optional for one in self.inputs.values()), len(self.inputs)
            raise invalid(
                f"expected number of inputs between {least} and {most} but got {len(found)} inputs for model "
                f"'{self.name}': {', '.join(missing)} is missing",
                missing[0],
            )
        return Wanted(found, outputs, request_id, final)

    def json_of(self, wanted: Wanted, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """A response as JSON: a tensor of one element is that element."""
        head = {"id": wanted.id} if wanted.id else {}
        plain = {name: _bare(value) for name, value in outputs.items() if name not in _RESERVED}
        return {**head, "model_name": self.name, "model_version": VERSION, **plain}

    def tensors_of(self, wanted: Wanted, outputs: Mapping[str, Any]) -> Any:
        """A response as a ``ModelStreamInferResponse``; without outputs, the end of the answer."""
        answer = service_pb2.ModelInferResponse(model_name=self.name, model_version=VERSION, id=wanted.id)
        answer.parameters[_FINAL].bool_param = not outputs
        for name, value in outputs.items():
            tensor = self.outputs[name]
            array = _shaped(tensor, _listed(value), outputs)
            answer.outputs.add(name=name, datatype=tensor.datatype, shape=array.shape)
            answer.raw_output_contents.append(raw_bytes(array))
        return service_pb2.ModelStreamInferResponse(infer_response=answer)


def _shaped(tensor: Tensor, values: list[Any], outputs: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    array = tensor.array(values)
    if tensor.name in _PER_SEQUENCE:
        return array
    return (
        array.reshape(1, len(_listed(outputs.get("text_output", ""))), -1) if tensor.name in _GROWING else array[None]
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _bare(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _numbered(found: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    """The message's JSON with its 64-bit numbers as numbers."""
    wide = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64}
    for field in descriptor.fields:
        value = found.get(field.name)
        if value is None:
            continue
        if field.type in wide:
            found[field.name] = [int(one) for one in value] if isinstance(value, list) else int(value)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if isinstance(value, list) else [value]:
                _numbered(one, field.message_type)
    return found
