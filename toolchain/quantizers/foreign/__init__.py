"""Models as other tools wrote them: what a folder is, and its numbers as our layout has them, never rounded twice.

One file a format: ``autoawq``, ``gptq``, ``compressed_tensors``, ``modelopt``, ``gguf``, ``pickled``; ``folder`` and
``grouped`` hold what several share. The room lies inside ``quantizers`` because importing is the other way to the
quantized layout: it needs the names of ``layout`` and the plans of ``shards``, and rooms do not import sideways. What
a folder is, its own files say (config.json, headers, magic numbers); the folder's name is never looked at. It writes
no file: stages/adopt.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from toolchain import checkpoint as checkpoints
from toolchain.checkpoint import Checkpoint, TensorInfo, read_json
from toolchain.errors import ArtifactError, PlanError
from toolchain.family import LlamaConfig
from toolchain.quantization import weights_of
from toolchain.quantizers.layout import HF_QUANT_CONFIG, Scheme
from toolchain.quantizers.shards import Bytes, TensorPlan, Unit

VERSION = "1"
"""Raised when the same foreign model would become other bits."""

_OLD_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ kept what is in config.json today."""


@dataclass(frozen=True)
class Identity:
    """What a folder or file is."""

    path: Path
    format: str
    """``"plain"``, ``"modelopt"``, ``"autoawq"``, ``"gptq"``, ``"compressed-tensors"``, ``"gguf"``, ``"pickle"`` or
    ``"unknown"``."""
    title: str
    """In a person's words: ``"AutoAWQ int4, groups of 128, with zero points"``."""
    producer: str = ""
    weights: str | None = None
    """The recipe's word for these weights; None where it has none."""
    group_size: int | None = None
    zero_points: bool = False
    act_order: bool = False
    kv: str = "fp16"
    """``"fp8"`` where it comes with the scales of an FP8 cache, else ``"fp16"``."""
    use: Literal["direct", "import", "refused"] = "refused"
    reason: str = ""
    """Why it is refused."""
    hint: str = ""


class Foreign(Protocol):
    """A foreign model whose headers were found sound."""

    config: LlamaConfig
    scheme: Scheme | None
    """None where its weights become plain 16- or 32-bit floats."""

    @property
    def nbytes(self) -> int: ...

    @property
    def document(self) -> dict[str, Any]:
        """``config.json`` as it will be written, but for ``quantization_config``."""

    @property
    def side_files(self) -> list[Path]: ...

    @property
    def fingerprint(self) -> str: ...

    def units(self) -> list[Unit]: ...

    def check(self, advance: Callable[[int], None]) -> None:
        """Every number that could make the import wrong, before anything is written. PlanError or ArtifactError."""

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """One tensor of the layout, in pieces of flat uint8."""


def identify(path: Path) -> Identity:
    """What a folder of a model, or a GGUF file, is. Reads configurations and headers only.

    Raises ArtifactError where there is nothing that could be a model.
    """
    found, opener = _recognize(path)
    if found.use != "import" or opener is None:
        return found
    try:
        opener()
    except (PlanError, ArtifactError) as error:
        return replace(found, use="refused", reason=error.message, hint=error.hint)
    return found


def open_foreign(path: Path) -> Foreign | None:
    """A model that can be imported; None for one that ``Checkpoint.open`` reads as it is.

    Raises PlanError or ArtifactError, saying why, for one that is neither.
    """
    found, opener = _recognize(path)
    if found.use == "direct":
        return None
    if opener is None:
        raise PlanError(f"{path}: {found.title}. {found.reason}", hint=found.hint)
    return opener()


def importable(path: Path) -> bool:
    """Whether ``path`` is of a format that is imported, sound or not, rather than opened as it is."""
    return _recognize(path)[0].use == "import"


_Opener = Callable[[], Foreign]


def _recognize(path: Path) -> tuple[Identity, _Opener | None]:
    raw = read_json(path / "config.json", hint="Give the folder of a model, or a GGUF file.")
    settings, method = _settings(path, raw)
    if (path / HF_QUANT_CONFIG).exists() or method is None:
        return _direct(path), None
    if method not in _METHODS:
        return Identity(
            path, "unknown", f"quantized by {method!r}", reason="scalellm does not read that.", hint=_ANEW
        ), None
    return _METHODS[method](path, raw, settings)


def _settings(path: Path, raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """What config.json, or a file beside it, says of the quantization, and its method; None where there is none."""
    settings = raw.get("quantization_config")
    if isinstance(settings, dict) and settings:
        return settings, str(settings.get("quant_method", "a method that it does not name")).lower()
    for name, method in _OLD_SETTINGS.items():
        if (path / name).exists():
            return read_json(path / name), method
    return {}, None


def _direct(path: Path) -> Identity:
    """A folder that ``Checkpoint.open`` reads, or refuses with its own words."""
    try:
        opened = Checkpoint.open(path)
    except (PlanError, ArtifactError) as error:
        return Identity(path, "unknown", "not a model that scalellm reads", reason=error.message, hint=error.hint)
    stated = opened.quantization
    scheme = weights_of(stated.quant_algo if stated else None)
    if stated is None or scheme is None or scheme.quant_algo is None:
        return Identity(path, "plain", f"unquantized, {opened.config.dtype}", weights="none", use="direct")
    kv = "fp8" if stated.kv_cache_quant_algo == "FP8" else "fp16"
    group = stated.group_size or 128 if scheme.group_sizes else None
    title = f"{stated.quant_algo} in NVIDIA ModelOpt's unified layout"
    title += f", groups of {group}" * bool(group) + f", {kv} cache" * (kv != "fp16")
    producer = read_json(path / HF_QUANT_CONFIG).get("producer") or {}
    return Identity(
        path,
        "modelopt",
        title,
        producer=f"{producer.get('name', '')} {producer.get('version', '')}".strip(),
        weights=scheme.name,
        group_size=group,
        kv=kv,
        use="direct",
    )


_ANEW = "Start from the unquantized model: scalellm quantize --recipe RECIPE --model DIR"


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder whose one file, or index, may have another name than transformers gives it."""
    named = [*path.glob("*.safetensors.index.json"), *path.glob("*.safetensors")]
    if named and not any(file.name.startswith("model.safetensors") for file in named):
        return _oddly_named(path)
    return checkpoints.read_headers(path)


def _oddly_named(path: Path) -> dict[str, TensorInfo]:
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        files = [path / name for name in sorted(set(read_json(indices[0]).get("weight_map", {}).values()))]
    elif len(files) != 1:
        raise ArtifactError(
            f"{path}: has {len(files)} .safetensors files and no index that says which belong together",
            hint="Keep the files of one model in the folder.",
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= checkpoints.read_header(file)
    return tensors


def _awq(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Identity, _Opener]:
    from toolchain.quantizers.foreign import autoawq

    identity = Identity(path, use="import", **autoawq.facts(settings))
    return identity, lambda: autoawq.AutoAwq(path, raw, _tensors(path), settings)


def _gptq(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Identity, _Opener]:
    from toolchain.quantizers.foreign import gptq

    identity = Identity(path, use="import", **gptq.facts(settings))
    return identity, lambda: gptq.Gptq(path, raw, _tensors(path), settings)


def _compressed(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Identity, _Opener]:
    from toolchain.quantizers.foreign import compressed_tensors

    identity = Identity(path, use="import", **compressed_tensors.facts(settings))
    return identity, lambda: compressed_tensors.read(path, raw, _tensors(path), settings)


_METHODS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Any]], tuple[Identity, _Opener]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}
