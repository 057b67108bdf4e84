"""Models as other tools wrote them: what a folder is, and its numbers as our layout has them, never rounded twice.

One file a format: ``autoawq``, ``gptq``, ``compressed_tensors``, ``modelopt``, ``gguf`` (and ``gguf_metadata``),
``pickled``; ``folder`` and ``grouped`` hold what several share. The room lies inside ``quantizers`` because
importing is the other way to the quantized layout: it needs the names of ``layout`` and the plans of ``shards``, and
rooms do not import sideways. What a folder is, its own files say (config.json, headers, magic numbers); its name is
never looked at. It writes no file: stages/adopt.py does.
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
from toolchain.quantizers.foreign.folder import START_ANEW
from toolchain.quantizers.layout import HF_QUANT_CONFIG, Scheme
from toolchain.quantizers.shards import Unit
from toolchain.safetensors_file import Bytes, TensorPlan

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
    notes: tuple[str, ...] = ()
    """What importing rounds, or leaves out."""


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
    def fingerprint(self) -> str: ...

    def side_files(self) -> dict[str, bytes]:
        """The tokenizer's files and the generation configuration, by name."""

    def units(self) -> list[Unit]: ...

    def check(self, advance: Callable[[int], None]) -> None:
        """Every number that could make the import wrong, before anything is written. PlanError or ArtifactError."""

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """One tensor of the layout, in pieces of flat uint8."""


def identify(path: Path) -> Identity:
    """What a folder of a model, or a GGUF file, is. Reads configurations and headers, and a part of the zero points.

    Raises ArtifactError where there is neither.
    """
    opener: _Opener | None = None
    found = Identity(path, "unknown", "not a model that scalellm reads")
    try:
        found, opener = _recognize(path)
        if opener is not None:
            model = opener()
            if found.zero_points:
                _probe(model)
    except (PlanError, ArtifactError) as error:
        if opener is None and not path.exists():
            raise
        return replace(found, use="refused", reason=error.message, hint=error.hint)
    return found


def _probe(model: Foreign) -> None:
    """PlanError where the zero points of the first matrix do not fit already, as is common."""
    from toolchain.quantizers.foreign.grouped import GroupedFolder

    if isinstance(model, GroupedFolder):
        module = min(model.linears)
        bad, total = model.misfits(module)
        if bad:
            raise model.zero_points_do_not_fit(bad, total, module)


def open_foreign(path: Path) -> Foreign | None:
    """A model that can be imported; None for one that ``Checkpoint.open`` reads, or refuses in its own words.

    Raises PlanError or ArtifactError, saying why, for a foreign one that cannot.
    """
    if path.is_dir() and not _gguf_of(path) and not _is_foreign(path):
        return None
    found, opener = _recognize(path)
    if opener is None and found.use == "direct":
        return None
    if opener is None:
        raise PlanError(f"{path}: {found.title}. {found.reason}", hint=found.hint)
    return opener()


_Opener = Callable[[], Foreign]
_Found = tuple[Identity, _Opener | None]


def _is_foreign(path: Path) -> bool:
    """Whether a folder is of another layout than ours; False where it has no configuration to tell by."""
    from toolchain.quantizers.foreign import pickled

    if not (path / "config.json").is_file():
        return False
    return _settings(path, read_json(path / "config.json"))[1] is not None or pickled.is_pickled(path)


def _gguf_of(path: Path) -> Path | None:
    """``path`` if it is a GGUF file, or the one such file of a folder that has no ``config.json``.

    PlanError where there are several, ArtifactError for another file.
    """
    from toolchain.quantizers.foreign import gguf_metadata

    if path.is_file():
        if gguf_metadata.is_gguf(path):
            return path
        raise ArtifactError(f"{path}: not a GGUF file", hint="Give the folder of a model, or a GGUF file.")
    if (path / "config.json").exists() or not path.is_dir():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix == ".gguf" and gguf_metadata.is_gguf(file))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise PlanError(f"{path}: has {len(found)} GGUF files ({names})", hint=f"Name one: {found[0]}")
    return found[0] if found else None


def _recognize(path: Path) -> _Found:
    from toolchain.quantizers.foreign import gguf, modelopt, pickled

    if file := _gguf_of(path):
        return Identity(file, use="import", **gguf.facts(file)), lambda: gguf.Gguf(file)
    raw = read_json(path / "config.json", hint="Give the folder of a model, or a GGUF file.")
    settings, method = _settings(path, raw)
    if method == "modelopt":
        identity = Identity(path, use="direct", **modelopt.facts(path, raw))
        if _opens(path, raw):
            return identity, None
        return replace(identity, use="import"), lambda: modelopt.ModelOpt(path, raw, _tensors(path))
    if method is None and pickled.is_pickled(path):
        return Identity(path, use="import", **pickled.facts(raw)), lambda: pickled.Pickled(path, raw)
    if method is None:
        dtype = Checkpoint.open(path).config.dtype
        return Identity(path, "plain", f"unquantized, {dtype}", weights="none", use="direct"), None
    if method not in _METHODS:
        refused = Identity(path, "unknown", f"quantized by {method!r}", reason="scalellm does not read that.")
        return replace(refused, hint=START_ANEW), None
    return _METHODS[method](path, raw, settings)


def _opens(path: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a folder of ModelOpt's layout needs nothing."""
    from toolchain.quantizers.foreign import modelopt

    try:
        modelopt.refuse_unread(path, raw)
        Checkpoint.open(path)
    except (PlanError, ArtifactError):
        return False
    return True


def _settings(path: Path, raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """What config.json, or a file beside it, says of the quantization, and its method; None where there is none."""
    if (path / HF_QUANT_CONFIG).exists():
        return {}, "modelopt"
    settings = raw.get("quantization_config")
    if isinstance(settings, dict) and settings:
        return settings, str(settings.get("quant_method", "a method that it does not name")).lower()
    for name, method in _OLD_SETTINGS.items():
        if (path / name).exists():
            return read_json(path / name), method
    return {}, None


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


def _awq(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> _Found:
    from toolchain.quantizers.foreign import autoawq

    identity = Identity(path, use="import", **autoawq.facts(settings))
    return identity, lambda: autoawq.AutoAwq(path, raw, _tensors(path), settings)


def _gptq(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> _Found:
    from toolchain.quantizers.foreign import gptq

    identity = Identity(path, use="import", **gptq.facts(settings))
    return identity, lambda: gptq.Gptq(path, raw, _tensors(path), settings)


def _compressed(path: Path, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> _Found:
    from toolchain.quantizers.foreign import compressed_tensors

    identity = Identity(path, use="import", **compressed_tensors.facts(settings))
    return identity, lambda: compressed_tensors.read(path, raw, _tensors(path), settings)


_METHODS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Any]], _Found]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}
