"""``config.json`` of a TensorRT-LLM engine, as ``trtllm-build`` leaves it: what the engine is, beside its passport.

Three keys on top: ``version``, ``pretrained_config`` (the checkpoint's, with defaults filled in) and ``build_config``
(all limits, and ``plugin_config``). Source: NVIDIA/TensorRT-LLM tensorrt_llm/builder.py ``EngineConfig``, 0.12 to 1.2.
It knows nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.checkpoint import read_json
from toolchain.engine import Passport
from toolchain.errors import ArtifactError
from toolchain.quantization import KV, WEIGHTS

FILE = "config.json"
_REBUILD = "scalellm build --recipe RECIPE   # an engine is made for one release and one set of limits"


@dataclass(frozen=True)
class EngineConfig:
    """What the engine's runtime will read."""

    file: Path
    version: str
    max_batch_size: int
    max_seq_len: int
    max_input_len: int
    max_num_tokens: int
    max_beam_width: int
    max_draft_len: int
    """Tokens of a draft, which the builder adds to ``max_seq_len``."""
    tp: int
    pp: int
    vocab_size: int
    logits_dtype: str
    quant_algo: str | None
    kv_algo: str | None
    paged_context_fmha: bool

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @classmethod
    def read(cls, folder: Path) -> EngineConfig:
        """Raises ArtifactError, naming file and key, where the file is not what ``trtllm-build`` writes."""
        file = folder / FILE
        raw = read_json(file)
        try:
            return cls._from_json(file, raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{file}: not the configuration of a TensorRT-LLM engine: {type(error).__name__} {error}", hint=_REBUILD
            ) from error

    @classmethod
    def _from_json(cls, file: Path, raw: Mapping[str, Any]) -> EngineConfig:
        model, built = raw["pretrained_config"], raw["build_config"]
        mapping, quantization = model["mapping"], model.get("quantization") or {}
        plugins = built["plugin_config"]
        paged = plugins.get("use_paged_context_fmha", plugins.get("_use_paged_context_fmha", False))
        return cls(
            file=file,
            version=str(raw["version"]),
            max_batch_size=int(built["max_batch_size"]),
            max_seq_len=int(built["max_seq_len"]),
            max_input_len=int(built["max_input_len"]),
            max_num_tokens=int(built["max_num_tokens"]),
            max_beam_width=int(built["max_beam_width"]),
            max_draft_len=int(built.get("max_draft_len") or 0),
            tp=int(mapping["tp_size"]),
            pp=int(mapping["pp_size"]),
            vocab_size=int(model["vocab_size"]),
            logits_dtype=str(model["logits_dtype"]),
            quant_algo=quantization.get("quant_algo"),
            kv_algo=quantization.get("kv_cache_quant_algo"),
            paged_context_fmha=bool(paged),
        )

    def check(self, passport: Passport) -> None:
        """Raises ArtifactError with every number in which engine and passport differ."""
        found = list(self._differences(passport))
        if found:
            listed = "".join(f"\n  - {line}" for line in found)
            raise ArtifactError(f"{self.file}: the engine is not what its passport says:{listed}", hint=_REBUILD)

    def _differences(self, passport: Passport) -> Iterator[str]:
        limits, draft = passport.limits, self.max_draft_len
        expected = {
            "version": (self.version.split(".post")[0], passport.release),
            "max_batch_size": (self.max_batch_size, limits.max_batch_size),
            "max_seq_len": (self.max_seq_len - draft, limits.max_seq_len),
            "max_num_tokens": (self.max_num_tokens, limits.max_num_tokens),
            "max_draft_len": (draft, passport.runtime.get("draft", {}).get("tokens", 0)),
            "tp_size": (self.tp, passport.tp),
            "pp_size": (self.pp, passport.pp),
            "quant_algo": (self.quant_algo, WEIGHTS[passport.weights].quant_algo),
            "kv_cache_quant_algo": (self.kv_algo, KV[passport.kv].quant_algo),
        }
        for name, (here, there) in expected.items():
            if here != there:
                yield f"{name} is {_spoken(here)}, the passport says {_spoken(there)}"
        if self.max_input_len < limits.max_input_len:
            yield f"max_input_len is {self.max_input_len}, the passport says {limits.max_input_len}"
        if self.vocab_size < passport.vocab_size:  # it may be padded to a multiple of tp
            yield f"vocab_size is {self.vocab_size}, the passport says {passport.vocab_size}"
        asks = passport.runtime.get("enable_kv_cache_reuse") or passport.runtime.get("enable_chunked_context")
        if asks and not self.paged_context_fmha:
            yield "use_paged_context_fmha is off, the passport asks for KV reuse or chunked context"


def _spoken(value: object) -> str:
    return "none" if value is None else str(value)
