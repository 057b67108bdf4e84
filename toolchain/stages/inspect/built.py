"""Engines and model repositories: passport, the engine's own configuration, the verdict on its answers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain import accuracy
from toolchain.accuracy import Verdict
from toolchain.admission import ENGINE, passport_of
from toolchain.checkpoint import read_json
from toolchain.engine import PASSPORT, Passport
from toolchain.engine_config import FILE, EngineConfig
from toolchain.errors import ArtifactError
from toolchain.repository import CONTENTS
from toolchain.stages.inspect.sheet import Sheet, sheet
from toolchain.workspace import Stamp

_RENDERED = "tensorrt_engine"
_SHORT = 12


def engine(path: Path, stamp: Stamp | None) -> Sheet:
    """Everything in the passport, and where the engine's files say something else."""
    passport = _passport(path)
    own, warnings = _own(path, passport)
    verdict = _verdict(path, stamp, "", warnings)
    rows = [("what", f"engine of the recipe {passport.recipe}, for {passport.backend}"), *_rows(passport, own, verdict)]
    if stamp is None:
        warnings.append("it has no stamp: an unfinished build, or a copy that lost it; scalellm serves no such engine")
    rebuild = f"scalellm build --recipe {passport.recipe}"
    next_ = rebuild if warnings else f"scalellm package --recipe {passport.recipe}"
    facts = {"passport": asdict(passport), "engine_version": own, "accuracy": asdict(verdict) if verdict else None}
    return sheet("engine", path, rows, stamp=stamp, warnings=warnings, next=next_, facts=facts)


def repository(path: Path, stamp: Stamp | None) -> Sheet:
    """The models, and the engine in it."""
    contents = read_json(path / CONTENTS)
    passport = passport_of(path)
    own, warnings = _own(path / ENGINE, passport) if passport else ("", [])
    verdict = _verdict(path, stamp, ENGINE, warnings) if passport else None
    if stamp is None:
        warnings.append("it has no stamp: an unfinished build, or a copy that lost it")
    services = contents.get("services", 1)
    serving = f"{services} server{'s' * (services > 1)}, {contents.get('image') or 'any Triton'}"
    rows = [
        ("what", f"Triton model repository of the recipe {contents.get('recipe')}, for {contents.get('backend')}"),
        ("models", ", ".join(contents.get("models", []))),
        ("served by", serving),
        *(_rows(passport, own, verdict) if passport else ()),
    ]
    next_ = f"scalellm serve --repository {path}"
    facts = {
        "repository": contents,
        "passport": asdict(passport) if passport else None,
        "engine_version": own,
        "accuracy": asdict(verdict) if verdict else None,
    }
    return sheet("repository", path, rows, stamp=stamp, warnings=warnings, next=next_, facts=facts)


def foreign_engine(path: Path) -> Sheet:
    """An engine that ``trtllm-build`` left and scalellm has no passport of."""
    config = EngineConfig.read(path)
    ranks = sorted(file.name for file in path.glob("rank*.engine"))
    warnings = ["it has no passport: scalellm cannot say for which GPU it was built, and does not package it"]
    missing = [name for name in (f"rank{number}.engine" for number in range(config.world_size)) if name not in ranks]
    warnings += [f"{path / name} is missing" for name in missing]
    rows = [
        ("what", "TensorRT-LLM engine that scalellm did not build"),
        ("version", f"TensorRT-LLM {config.version}"),
        ("weights", f"{config.quant_algo or 'not quantized'}, cache {config.kv_algo or 'not quantized'}"),
        ("limits", _limits(asdict(config))),
        ("parallel", f"tp {config.tp} x pp {config.pp}: {', '.join(ranks)}"),
    ]
    known = {name: value for name, value in asdict(config).items() if name != "file"}
    facts = {"passport": None, "engine_version": config.version, "config": known}
    next_ = "scalellm build --recipe RECIPE   # from the model, with a recipe of the same formats"
    return sheet("engine", path, rows, stamp=None, warnings=warnings, next=next_, facts=facts)


def _passport(path: Path) -> Passport:
    try:
        return Passport.from_json(read_json(path / PASSPORT))
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path / PASSPORT}: not a passport of this scalellm: {error}", hint="scalellm build --recipe RECIPE"
        ) from error


def _own(folder: Path, passport: Passport) -> tuple[str, list[str]]:
    """The version in the engine's ``config.json``, and where that file and the passport differ."""
    if passport.backend != _RENDERED:
        return "", []
    warnings = [
        f"{folder / f'rank{rank}.engine'} is missing"
        for rank in range(passport.tp * passport.pp)
        if not (folder / f"rank{rank}.engine").is_file()
    ]
    try:
        config = EngineConfig.read(folder)
    except ArtifactError as error:
        return "", [*warnings, error.message]
    try:
        config.check(passport)
    except ArtifactError as error:
        warnings.append(error.message)
    return config.version, warnings


def _verdict(folder: Path, stamp: Stamp | None, within: str, warnings: list[str]) -> Verdict | None:
    if stamp is None:
        return None
    try:
        return accuracy.read_verdict(folder, accuracy.digest_of(stamp.files, within))
    except ArtifactError as error:
        warnings.append(error.message)
        return None


def _rows(passport: Passport, own: str, verdict: Verdict | None) -> Iterator[tuple[str, str]]:
    sm = f", SM {passport.sm // 10}.{passport.sm % 10}" if passport.sm else ""
    yield "device", passport.device + sm
    if passport.release:
        yield "release", f"TensorRT-LLM {passport.release}, TensorRT {passport.tensorrt}, image {passport.container}"
    yield f"{FILE} says", f"TensorRT-LLM {own}" if own else ""
    yield "model", f"{passport.architecture}, {passport.num_layers} layers, {passport.vocab_size} tokens"
    group = f" in groups of {passport.group_size}" if passport.group_size else ""
    yield "weights", f"{passport.weights}{group}, {passport.kv} cache"
    yield "limits", _limits(asdict(passport.limits))
    yield "parallel", f"tp {passport.tp} x pp {passport.pp}" if passport.tp * passport.pp > 1 else ""
    yield "runtime", ", ".join(f"{name} {value}" for name, value in passport.runtime.items())
    hashes = {"checkpoint": passport.checkpoint, "model": passport.model, "recipe": passport.recipe_sha256}
    yield "made from", ", ".join(f"{name} {digest[:_SHORT]}" for name, digest in hashes.items() if digest)
    yield "built by", shlex.join(passport.argv)
    yield "versions", ", ".join(f"{name} {version}" for name, version in passport.versions.items())
    yield "accuracy", _accuracy(passport, verdict)


def _limits(values: Mapping[str, Any]) -> str:
    names = {"max_batch_size": "sequences", "max_seq_len": "tokens each", "max_input_len": "of a prompt"}
    said = ", ".join(f"{values[key]} {words}" for key, words in names.items())
    return f"{said}, {values['max_num_tokens']} tokens a step"


def _accuracy(passport: Passport, verdict: Verdict | None) -> str:
    if verdict is not None:
        return f"{'passed' if verdict.passed else 'FAILED'} {verdict.made}: {verdict.summary}"
    asked = {"required": ", and required before it serves", "advised": ", and advised"}.get(passport.gate or "", "")
    return f"not verified{asked}"
