"""NVIDIA's Triton model ``tensorrt_llm`` by TensorRT-LLM release (``facts/triton_models.yaml``), and its config.pbtxt.

Pure. It knows which tensors and parameters each release has, and what a newest name is called there. It does not know
where values come from, what our own models are, or how Triton is started.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.release import within

NAME = "tensorrt_llm"
BACKEND = "tensorrtllm"
LOGITS = "logits"
"""The type of tensors that have the engine's logits in them."""
_PLACEHOLDER_TYPE = {"encoder_input_features": "FP16", "prompt_embedding_table": "FP16"}
"""What encoders and prompt tables take, which we serve neither of."""

Setting = str | int | float | bool


@dataclass(frozen=True)
class Tensor:
    """One input or output."""

    name: str
    type: str
    """Without ``TYPE_``; ``"logits"``: the engine's own."""
    dims: tuple[int, ...]
    optional: bool
    scalar: bool
    """[1] for clients, reshaped to [] for the backend."""
    ragged: bool
    unconfirmed: frozenset[str]


@dataclass(frozen=True)
class Parameter:
    """One key of config.pbtxt. A ``value`` is always written; what has a reason to be ``never`` written is not."""

    name: str
    required: bool
    default: Setting | None
    value: str | None
    never: str
    takes_list: bool


@dataclass(frozen=True)
class TritonModel:
    """The model ``tensorrt_llm`` of one release."""

    version: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    parameters: Mapping[str, Parameter]
    renamed: Mapping[str, str]
    """Newest name of an input -> its name here; only where they differ."""

    def input_named(self, newest: str) -> str | None:
        """What the input with this newest name is called in this release; None where it has none."""
        name = self.renamed.get(newest, newest)
        return name if name in self.inputs else None


@functools.cache
def triton_model(version: str) -> TritonModel:
    """The model of a release of the table of releases."""
    table = workspace.facts("triton_models")
    return TritonModel(
        version=version,
        inputs=MappingProxyType({row["name"]: _tensor(row) for row in _rows(table["inputs"], version)}),
        outputs=MappingProxyType({row["name"]: _tensor(row) for row in _rows(table["outputs"], version)}),
        parameters=MappingProxyType(
            {
                row["name"]: _parameter(row)
                for row in _rows([{"name": name, **row} for name, row in table["parameters"].items()], version)
            }
        ),
        renamed=MappingProxyType(
            {
                newest: span["name"]
                for newest, spans in table["renamed"].items()
                for span in spans
                if within(version, span)
            }
        ),
    )


def config(
    model: TritonModel,
    settings: Mapping[str, Setting],
    *,
    max_batch_size: int,
    max_queue_size: int,
    logits: str,
    name: str = NAME,
) -> str:
    """The text of config.pbtxt, decoupled, for one instance.

    ``settings``: parameters by name; those with a fixed value are added. ``logits`` is a type such as ``"FP32"``. A
    queue of more than ``max_queue_size`` requests is refused by the backend, which reads that number from here.
    Raises ArtifactError for a parameter that the release does not know or must not get, or requires and does not get.
    """
    values = {name: row.value for name, row in model.parameters.items() if row.value is not None} | dict(settings)
    _check(model, values)
    lines = [
        f"# Token ids to token ids: a TensorRT-LLM {model.version} engine behind NVIDIA's C++ backend.",
        "# gpt_model_path is relative to the folder that the server is started in: start it in the repository.",
        f'name: "{name}"',
        f'backend: "{BACKEND}"',
        f"max_batch_size: {max_batch_size}",
        "model_transaction_policy { decoupled: true }",
        "dynamic_batching {",
        f"  preferred_batch_size: [ {max_batch_size} ]",
        "  max_queue_delay_microseconds: 0",
        f"  default_queue_policy {{ max_queue_size: {max_queue_size} }}",
        "}",
        "input [",
        ",\n".join(f"  {{ {_input(tensor, logits)} }}" for tensor in model.inputs.values()),
        "]",
        "output [",
        ",\n".join(f"  {{ {_typed(tensor, logits)} }}" for tensor in model.outputs.values()),
        "]",
        *(
            f'parameters {{ key: "{name}" value {{ string_value: "{_spoken(value)}" }} }}'
            for name, value in values.items()
        ),
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
    ]
    return "\n".join(lines) + "\n"


def _check(model: TritonModel, values: Mapping[str, Setting | None]) -> None:
    for name, value in values.items():
        known = model.parameters.get(name)
        if known is None:
            raise ArtifactError(f"tensorrt_llm of TensorRT-LLM {model.version} has no parameter {name}")
        if known.never:
            raise ArtifactError(f"tensorrt_llm/config.pbtxt: {name} is never set: {known.never}")
        if "," in str(value) and name == "max_attention_window_size" and not known.takes_list:
            raise ArtifactError(f"{name} {value}: TensorRT-LLM {model.version} takes one number, not one a layer")
    missing = [name for name, row in model.parameters.items() if row.required and name not in values]
    if missing:
        raise ArtifactError(f"tensorrt_llm of TensorRT-LLM {model.version} needs the parameter {', '.join(missing)}")


def _rows(rows: list[dict[str, Any]], version: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        for span in row.get("spans", [{}]):
            merged = {**row, **span}
            if within(version, merged):
                yield merged


def _tensor(row: Mapping[str, Any]) -> Tensor:
    return Tensor(
        name=row["name"],
        type=_PLACEHOLDER_TYPE.get(row["type"], row["type"]),
        dims=tuple(row["dims"]),
        optional=row.get("optional", False),
        scalar=row.get("scalar", False),
        ragged=row.get("ragged", False),
        unconfirmed=frozenset(row.get("unconfirmed", ())),
    )


def _parameter(row: Mapping[str, Any]) -> Parameter:
    return Parameter(
        name=row["name"],
        required=row.get("required", False),
        default=row.get("default"),
        value=row.get("value"),
        never=row.get("never", ""),
        takes_list=row.get("list", False),
    )


def _typed(tensor: Tensor, logits: str) -> str:
    kind = logits if tensor.type == LOGITS else tensor.type
    dims = ", ".join(map(str, tensor.dims))
    return f'name: "{tensor.name}" data_type: TYPE_{kind} dims: [ {dims} ]'


def _input(tensor: Tensor, logits: str) -> str:
    shape = " reshape { shape: [ ] }" if tensor.scalar else ""
    optional = " optional: true" if tensor.optional else ""
    ragged = " allow_ragged_batch: true" if tensor.ragged else ""
    return _typed(tensor, logits) + shape + optional + ragged


def _spoken(value: Setting | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("\\", "\\\\").replace('"', '\\"')
