"""Write the Triton model repository that serves an engine.

    OUT/preprocessing  OUT/tensorrt_llm  OUT/postprocessing  OUT/ensemble  OUT/tensorrt_llm_bls      (version folder 1)
    OUT/tensorrt_llm_draft    where there is a draft model, the same as tensorrt_llm with its own engine and numbers;
                              a CPU engine drafts by itself, from OUT/tensorrt_llm/1/draft

The models' files come from ``model_repo_templates``: ``common`` is the same for every backend, ``tensorrt_llm`` comes
from the backend's own folder, or, for a TensorRT-LLM engine, from what its release knows (``engine_model``), and the
ensemble is wired to what that release has. The engine's files are hard links where the disk allows it, so that a
repository costs no second copy of the weights. It does not start anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import workspace
from toolchain.engine import Engine
from toolchain.engine_model import TOKENIZER_INFO, EngineModel, check_draft
from toolchain.errors import ArtifactError
from toolchain.release import IMAGES
from toolchain.repository import CONTENTS, Value, fit_ensemble, render_all
from toolchain.token_bytes import tokenizer_text, xgrammar_info
from toolchain.triton_model import NAME

if TYPE_CHECKING:
    from toolchain.planning.plan import Plan

VERSION = "1"
"""Raised when the same engine would give another repository for a reason that ``inputs`` does not see."""

COMMON = ("preprocessing", "postprocessing", "tensorrt_llm_bls", "ensemble")
ENGINE_MODEL = NAME
DRAFT_MODEL = "tensorrt_llm_draft"
RENDERED = "tensorrt_engine"
"""The backend whose ``tensorrt_llm`` is NVIDIA's own, in the engine's release."""
_SHARED = {
    "preprocessing": ("detokenizer.py", "prompts.py", "tensors.py", "tokenizer.py", "words.py"),
    "postprocessing": ("detokenizer.py", "tensors.py", "tokenizer.py"),
    "tensorrt_llm_bls": ("channel.py", "detokenizer.py", "prompts.py", "tensors.py", "tokenizer.py", "words.py"),
}
"""Files of ``common/shared`` that each model needs beside it: Triton puts the version folder on ``sys.path``."""
_SHARES_CORES = "openvino"
"""The backend whose engine must know how many services there are beside it."""
_OF_OUR_ENGINES = (
    "asked.py",
    "channel.py",
    "detokenizer.py",
    "engine_model.py",
    "generation.py",
    "guides.py",
    "lanes.py",
    "senders.py",
    "stop_words.py",
    "tensors.py",
    "words.py",
)
_SHARED_WITH_ENGINE = {"openvino": _OF_OUR_ENGINES, "tensorrt_llmapi": _OF_OUR_ENGINES}
"""The same for ``tensorrt_llm`` of each backend that has a private line to ``tensorrt_llm_bls``."""
_BESIDE_THE_MODEL = {"tensorrt_llmapi": ("model.yaml",)}
"""Files of a backend's engine that stand in the version folder of ``tensorrt_llm``, too."""
_DOORS = {RENDERED: "http"}
"""How ``tensorrt_llm_bls`` reaches the engine of a backend that has no private line."""
_WITH_TOKENIZER = ("preprocessing", "postprocessing", "tensorrt_llm_bls")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def inputs(plan: Plan, engine_key: str) -> dict[str, Any]:
    """What the repository depends on, as plain JSON: its key is the hash of this."""
    templates = workspace.shipped("model_repo_templates")
    files = [*_files(templates / "common"), *_files(templates / plan.backend)]
    digests = {path.relative_to(templates).as_posix(): workspace.sha256_of(path) for path in files}
    if plan.backend == RENDERED:
        digests["triton_models"] = workspace.key_of({"facts": str(workspace.facts("triton_models"))})
    return {
        **plan.slice("package"),
        "package_version": VERSION,
        "templates": workspace.key_of(digests),
        "engine": engine_key,
    }


def package(
    engine: Engine,
    out: Path,
    *,
    services: int = 1,
    parameters: Mapping[str, Value] | None = None,
    draft: Engine | None = None,
) -> dict[str, str]:
    """Write the repository of ``engine`` into the draft folder ``out``.

    ``draft`` is the engine of the draft model, where ``engine`` is built for one. ``services`` servers will be started
    on it. ``parameters`` replaces values of ``defaults(engine)``. Returns the sha256 of the engines' own files by their
    path in ``out``, so that nobody has to read the weights again. Raises ArtifactError for a backend without templates,
    an unknown parameter, an engine without a tokenizer, one that is not what its passport says, and two that do not
    fit together.
    """
    templates = workspace.shipped("model_repo_templates")
    backend = engine.passport.backend
    sources = {name: templates / "common" / name for name in COMMON}
    if backend != RENDERED:
        sources[ENGINE_MODEL] = templates / backend / ENGINE_MODEL
        if not sources[ENGINE_MODEL].is_dir():
            raise ArtifactError(f"{engine.path}: there are no templates for the backend {backend!r} in {templates}")
    check_draft(engine, draft)
    beside: dict[str, Value] = {"services": services} if backend == _SHARES_CORES else {}
    values = {**defaults(engine), **_drafting(engine, draft), **beside, **(parameters or {})}
    texts = {name: (source / "config.pbtxt").read_text(encoding="utf-8") for name, source in sources.items()}
    if backend == RENDERED:
        model = EngineModel.of(engine)
        texts["ensemble"] = fit_ensemble(texts["ensemble"], ENGINE_MODEL, model.input_named, model.outputs)
    configurations = render_all(texts, values)
    if backend == RENDERED:
        configurations[ENGINE_MODEL] = model.config(f"{ENGINE_MODEL}/1/engine", _queue(engine))
    if draft and backend == RENDERED:
        folder, second = f"{DRAFT_MODEL}/1/engine", EngineModel.of(draft)
        configurations[DRAFT_MODEL] = second.config(folder, _queue(engine), name=DRAFT_MODEL)
    for name, text in configurations.items():
        _write_model(out / name, sources.get(name), text)
        for shared in _shared(name, backend):
            shutil.copyfile(templates / "common" / "shared" / shared, out / name / "1" / shared)
    known = _place_tokenizer(engine, out) | _place_engine(engine, out, ENGINE_MODEL)
    if draft and backend == RENDERED:
        known |= _place_engine(draft, out, DRAFT_MODEL)
    elif draft:
        known |= _place(draft, list(draft.stamp.files), out, Path(ENGINE_MODEL) / "1" / "draft")
    known |= _place_tokenizer_info(engine, out)
    contents = {**_contents(engine, services), "models": sorted(configurations), "parameters": values}
    workspace.write_durably(out / CONTENTS, (json.dumps(contents, indent=2, sort_keys=True) + "\n").encode())
    return known


def defaults(engine: Engine) -> dict[str, Value]:
    """The value of every placeholder, from the engine's passport where it decides."""
    passport, limits = engine.passport, engine.passport.limits
    common: dict[str, Value] = {
        "triton_max_batch_size": limits.max_batch_size,
        "tokenizer_dir": "tokenizer",
        "add_special_tokens": True,
        "skip_special_tokens": True,
        "exclude_input_in_output": True,
        "max_input_len": limits.max_input_len,
        "vocab_size": passport.vocab_size,
        "preprocessing_instance_count": 1,
        "postprocessing_instance_count": 1,
        "bls_max_concurrent_requests": limits.max_batch_size + _queue(engine),
        "tensorrt_llm_model_name": ENGINE_MODEL,
        "engine_door": _DOORS.get(passport.backend, "line"),
    }
    if passport.backend == RENDERED:
        return {**common, **EngineModel.of(engine).placeholders}
    return {
        **common,
        "engine_release": "",
        "engine_renamed": "",
        "engine_lacks": "",
        "logits_datatype": "TYPE_FP32",
        "engine_dir": "engine",
        "max_queue_size": _queue(engine),
        "max_beam_width": 4,
        "status_file": "",
    }


def _drafting(engine: Engine, draft: Engine | None) -> dict[str, Value]:
    """What ``tensorrt_llm_bls`` must know of the draft model that it asks itself."""
    draft = draft if engine.passport.backend == RENDERED else None
    return {
        "tensorrt_llm_draft_model_name": DRAFT_MODEL if draft else "",
        "num_draft_tokens": engine.passport.runtime["draft"]["tokens"] if draft else 0,
        "draft_max_seq_len": draft.passport.limits.max_seq_len if draft else 0,
    }


def _queue(engine: Engine) -> int:
    """Requests that wait at most, beside those in flight."""
    return 4 * engine.passport.limits.max_batch_size


def _contents(engine: Engine, services: int) -> dict[str, Any]:
    """What ``serve`` must know of the repository."""
    passport = engine.passport
    image = f"{IMAGES}/{passport.container}" if passport.container else None
    gpus = {"gpus": passport.tp * passport.pp, "sm": passport.sm} if image else {"gpus": 0, "sm": None}
    release = {"release": passport.release, "image": image, **gpus}
    return {"backend": passport.backend, "recipe": passport.recipe, "services": services, **release}


def _shared(model: str, backend: str) -> tuple[str, ...]:
    return _SHARED_WITH_ENGINE.get(backend, ()) if model == ENGINE_MODEL else _SHARED.get(model, ())


def _write_model(folder: Path, source: Path | None, configuration: str) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(configuration, encoding="utf-8")
    if source is None:
        return
    for path in _files(source / "1"):
        target = folder / "1" / path.relative_to(source / "1")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _place_tokenizer(engine: Engine, out: Path) -> dict[str, str]:
    names = [name for name in _TOKENIZER_FILES if name in engine.stamp.files]
    if not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise ArtifactError(
            f"{engine.path}: neither tokenizer.json nor tokenizer.model is here, so text cannot become tokens",
            hint="Put the tokenizer's files into the model's folder, then: scalellm build --recipe RECIPE",
        )
    return {
        relative: digest
        for model in _WITH_TOKENIZER
        for relative, digest in _place(engine, names, out, Path(model) / "1" / "tokenizer").items()
    }


def _place_tokenizer_info(engine: Engine, out: Path) -> dict[str, str]:
    """What NVIDIA's backend keeps answers to a grammar by, where the engine is to do so."""
    passport, file = engine.passport, Path(ENGINE_MODEL) / "1" / TOKENIZER_INFO
    if passport.backend != RENDERED or not passport.runtime.get("guided_decoding"):
        return {}
    info = xgrammar_info(tokenizer_text(engine.path), passport.eos_token_ids)
    workspace.write_durably(out / file, json.dumps(info).encode())
    return {file.as_posix(): workspace.sha256_of(out / file)}


def _place_engine(engine: Engine, out: Path, model: str) -> dict[str, str]:
    version = Path(model) / "1"
    beside = _place(engine, list(_BESIDE_THE_MODEL.get(engine.passport.backend, ())), out, version)
    return beside | _place(engine, list(engine.stamp.files), out, version / "engine")


def _place(engine: Engine, names: list[str], out: Path, folder: Path) -> dict[str, str]:
    """Link the engine's files into ``out/folder``; returns their digests by path in ``out``."""
    for name in names:
        target = out / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        workspace.link(engine.path / name, target)
    return {(folder / name).as_posix(): engine.stamp.files[name].sha256 for name in names}


def _files(folder: Path) -> list[Path]:
    """The files under a template folder, in order; what Python leaves behind is none of them."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    )
