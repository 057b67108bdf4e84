"""A TensorRT-LLM engine as NVIDIA's Triton model ``tensorrt_llm``: the numbers of its config.pbtxt, and what it lacks.

It joins the engine's passport, the engine's own ``config.json`` and what its release knows. It does not know our own
models, nor where a repository lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.engine import Engine, Passport
from toolchain.engine_config import EngineConfig
from toolchain.errors import ArtifactError
from toolchain.planning.memory import KV_FREE_FRACTION
from toolchain.release import releases
from toolchain.triton_model import LOGITS, NAME, Setting, TritonModel, config, triton_model
from toolchain.vocabulary import difference

TOKENIZER_INFO = "xgrammar_tokenizer_info.json"
SCHEDULER = "guaranteed_no_evict"
"""Never takes back a sequence that has begun: the default of every release, and what the plan's token budget is for."""
_RUNTIME = (
    "max_tokens_in_paged_kv_cache",
    "enable_kv_cache_reuse",
    "enable_chunked_context",
    "max_attention_window_size",
    "sink_token_length",
)
"""Keys of the passport's ``runtime`` that are parameters of the model."""
_LOGITS = {"float32": "FP32", "float16": "FP16"}
"""The backend throws for others (``fillTritonResponse`` in src/model_instance_state.cc @v0.19.0)."""


@dataclass(frozen=True)
class EngineModel:
    """The model of one engine."""

    passport: Passport
    built: EngineConfig
    model: TritonModel

    @classmethod
    def of(cls, engine: Engine) -> EngineModel:
        """Raises ArtifactError where the engine is not what its passport says, or the passport names no release."""
        built = EngineConfig.read(engine.path)
        if engine.passport.release is None:
            raise ArtifactError(
                f"{engine.path}: its passport names no TensorRT-LLM release", hint="scalellm build --recipe RECIPE"
            )
        built.check(engine.passport)
        return cls(engine.passport, built, triton_model(engine.passport.release))

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset(self.model.outputs)

    def input_named(self, newest: str) -> str | None:
        """What the input with this newest name is called here; None where there is none."""
        return self.model.input_named(newest)

    @property
    def placeholders(self) -> dict[str, str]:
        """What our own models must know of the engine and its release, by placeholder."""
        newest = triton_model([release.version for release in releases().values() if release.engine][-1])
        lacks = [name for name in newest.inputs if self.input_named(name) is None]
        lacks += [name for name in newest.outputs if name not in self.model.outputs and name not in lacks]
        return {
            "engine_release": f"TensorRT-LLM {self.model.version}",
            "engine_renamed": " ".join(f"{name}={here}" for name, here in self.model.renamed.items()),
            "engine_lacks": " ".join(lacks),
            "logits_datatype": f"TYPE_{self.logits}",
        }

    @property
    def logits(self) -> str:
        """The type of the engine's logits. Raises ArtifactError where the release has another one."""
        name = self.built.logits_dtype
        found, fixed = _LOGITS.get(name), self.model.outputs["context_logits"].type
        if found is None:
            raise ArtifactError(f"{self.built.file}: logits_dtype {name} is none of {', '.join(_LOGITS)}")
        if fixed not in (LOGITS, found):
            raise ArtifactError(
                f"{self.built.file}: logits_dtype {name}, and Triton's backend of TensorRT-LLM {self.model.version} "
                f"gives {fixed} only",
                hint="Build it without --logits_dtype: a checkpoint of scalellm says float32",
            )
        return found

    def config(self, engine_folder: str, max_queue_size: int, *, name: str = NAME) -> str:
        """The text of config.pbtxt; ``engine_folder`` as the server finds it, ``name`` as Triton calls the model."""
        runtime = {name: value for name in _RUNTIME if (value := self.passport.runtime.get(name)) is not None}
        if {"max_attention_window_size", "sink_token_length"} & set(runtime):
            runtime["enable_kv_cache_reuse"] = False  # blocks of a window are overwritten, and sinks turn reuse off
        settings: dict[str, Setting] = {
            "gpt_model_path": engine_folder,
            "gpu_device_ids": ",".join(str(rank) for rank in range(self.built.world_size)),
            "max_beam_width": self.built.max_beam_width,
            "exclude_input_in_output": True,
            "batch_scheduler_policy": SCHEDULER,
            "kv_cache_free_gpu_mem_fraction": KV_FREE_FRACTION,
            **runtime,
            **({"lora_prefetch_dir": f"{engine_folder}/lora"} if self.passport.runtime.get("lora") else {}),
            **(_guided(name) if self.passport.runtime.get("guided_decoding") else {}),
        }
        return config(
            self.model,
            settings,
            max_batch_size=self.built.max_batch_size,
            max_queue_size=max_queue_size,
            logits=self.logits,
            name=name,
        )


def _guided(name: str) -> dict[str, Setting]:
    """The C++ backend takes no tokenizer but this file, relative to the folder that the server is started in."""
    return {"guided_decoding_backend": "xgrammar", "xgrammar_tokenizer_info_path": f"{name}/1/{TOKENIZER_INFO}"}


def check_draft(engine: Engine, draft: Engine | None) -> None:
    """Raise ArtifactError, with every reason, where a draft's engine is missing, not wanted, or does not fit."""
    rebuild, wanted = "scalellm build --recipe RECIPE", "draft" in engine.passport.runtime
    if draft is None or not wanted:
        if wanted:
            raise ArtifactError(f"{engine.path}: it is built for a draft model, and there is none", hint=rebuild)
        if draft:
            raise ArtifactError(f"{engine.path}: it is not built for a draft model ({draft.path})", hint=rebuild)
        return
    here, there = engine.passport, draft.passport
    pairs = {
        "backend": (there.backend, here.backend),
        "release": (there.release, here.release),
        "device": (there.device, here.device),
        "tp": (there.tp, here.tp),
        "pp": (there.pp, here.pp),
    }
    found = [f"its {name} is {own}, the engine's {other}" for name, (own, other) in pairs.items() if own != other]
    if here.release and not there.runtime.get("enable_kv_cache_reuse"):
        found.append("it cannot reuse its cache")
    if different := difference(engine.path, draft.path):
        found.append(f"its tokenizer is another: {different}")
    if found:
        listed = "".join(f"\n  - {line}" for line in found)
        raise ArtifactError(f"{draft.path}: not a draft for {engine.path}:{listed}", hint=rebuild)
