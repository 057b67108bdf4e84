"""Whether a repository may be served here: of this recipe, for these GPUs and this TensorRT-LLM, verified if need be.

``serve`` asks before it starts anything, and whatever packages or deploys does. A mismatch is refused with the command
that mends it. What the server's own image is, ``servers.triton`` compares; a repository that others wrote is admitted
as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import accuracy, gpu, installed, workspace
from toolchain.checkpoint import read_json
from toolchain.engine import PASSPORT, Engine, Passport
from toolchain.engine_config import EngineConfig
from toolchain.errors import ArtifactError, RecipeError, RejectedError
from toolchain.recipe import Accept, Recipe, parse_recipe
from toolchain.variant import for_device

ENGINE = "tensorrt_llm/1/engine/"
"""Where a repository has the engine's files (``stages.package``)."""

BOUND = "tensorrt_engine"
"""The backend whose engines run on one SM and with one release; the others read weights, not compiled code."""
_NOT_BUILT = {"serve", "description", "per_device", "accept"}
"""Keys of a recipe that change nothing about what was built for one device."""


@dataclass(frozen=True)
class Admission:
    """A repository that may be served."""

    notes: tuple[str, ...] = ()
    """What to say all the same."""
    unverified: str = ""
    """Why its answers are not to be trusted; empty where nothing speaks against them."""


@dataclass(frozen=True)
class Asked:
    """What the person asked for."""

    spoken: str = ""
    """The recipe as it was named; empty where a repository was."""
    recipe: Recipe | None = None
    target: str | None = None
    """The device that ``--device`` names."""
    allow_unverified: bool = False
    own_tensorrt_llm: bool = True
    """Whether the server may be the one on PATH, with the TensorRT-LLM that is installed here; not in a container."""

    def build(self, passport: Passport, device: str | None = None) -> str:
        """The command that builds again, for another device if one is named."""
        chosen = device or self.target
        return f"scalellm build --recipe {self.spoken or passport.recipe}" + (f" --device {chosen}" if chosen else "")


def admit(repository: Path, asked: Asked, environ: Mapping[str, str] = os.environ) -> Admission:
    """Raises ArtifactError for an engine that is not what is asked for or does not run here, RejectedError for one
    whose answers must be verified first and were not, or were found wrong.
    """
    passport = passport_of(repository)
    if passport is None:
        return Admission()
    stamp = workspace.read_stamp(repository)
    if stamp:
        _same_recipe(repository, stamp.recipe, passport, asked)
    if passport.backend == BOUND:
        EngineConfig.read(repository / ENGINE).check(passport)
        _same_gpu(repository, passport, asked)
        if asked.own_tensorrt_llm:
            _same_release(repository, passport, asked, environ)
    return check_verified(repository, asked)


def check_verified(repository: Path, asked: Asked) -> Admission:
    """The gate alone, for whoever passes a repository on: whether its answers may be trusted. Raises RejectedError."""
    passport = passport_of(repository)
    if passport is None:
        return Admission()
    stamp = workspace.read_stamp(repository)
    verdict = accuracy.read_verdict(repository, accuracy.digest_of(stamp.files, ENGINE)) if stamp else None
    return _verified(repository, passport, verdict, asked, _accept(stamp, asked))


def check_engine(engine: Engine, asked: Asked) -> Admission:
    """The same gate for an engine that is not packaged yet: its verdict lies beside it. Raises RejectedError."""
    verdict = accuracy.read_verdict(engine.path, accuracy.digest_of(engine.stamp.files))
    return _verified(engine.path, engine.passport, verdict, asked, _accept(engine.stamp, asked))


def passport_of(repository: Path) -> Passport | None:
    """Of the engine in a repository; None in one that others wrote. Raises ArtifactError for one that is damaged."""
    file = repository / ENGINE / PASSPORT
    if not file.is_file():
        return None
    try:
        return Passport.from_json(read_json(file))
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file}: not a passport of this scalellm: {error}", hint="scalellm build --recipe RECIPE"
        ) from error


def _same_recipe(repository: Path, text: str, passport: Passport, asked: Asked) -> None:
    """The recipe's text at the time it was built against the one that is named now."""
    if asked.recipe is None or not text:
        return
    if changed := recipe_changes(text, asked.recipe, asked.target):
        raise ArtifactError(
            f"{repository}: was built from another text of the recipe {asked.recipe.name}: " + "; ".join(changed),
            hint=asked.build(passport),
        )


def recipe_changes(text: str, recipe: Recipe, target: str | None = None) -> list[str]:
    """What is built otherwise by ``recipe`` than by the one with that text, in words; comments do not count."""
    try:
        before = parse_recipe(text, recipe.path)
    except RecipeError:
        return ["it was built from a recipe that this scalellm does not read"]
    return list(workspace.differences(_built_by(before, target), _built_by(recipe, target)))


def _built_by(recipe: Recipe, target: str | None) -> dict[str, Any]:
    """The keys that decide what is built."""
    return for_device(recipe, target or recipe.device).model_dump(mode="json", exclude=_NOT_BUILT)


def _same_gpu(repository: Path, passport: Passport, asked: Asked) -> None:
    """The engine's compute capability against those of this machine, where it shows any."""
    seen = gpu.gpus() if passport.sm is not None else ()
    known = [one for one in seen if one.sm is not None]
    if not known or any(one.sm == passport.sm for one in known):
        return
    names = ", ".join(f"{one.name} (SM {one.sm})" for one in known)
    device = next((one.device.name for one in known if one.device), None)
    hint = asked.build(passport, device) + f" --on local   # and serve it with --device {device}" if device else ""
    raise ArtifactError(
        f"{repository}: its engine was built for SM {passport.sm} ({passport.device}), and runs nowhere else; this "
        f"machine has {names}",
        hint=hint or f"A machine with SM {passport.sm}, such as the {passport.device}",
    )


def _same_release(repository: Path, passport: Passport, asked: Asked, environ: Mapping[str, str]) -> None:
    """The engine's TensorRT-LLM against the one that is installed, where one is."""
    if passport.release is None:
        return
    _builder, found = installed.tensorrt_llm(environ)
    if found is None or installed.is_release(found, passport.release):
        return
    image = f" --server container   # in {passport.container}" if passport.container else ""
    raise ArtifactError(
        f"{repository}: its engine was built by TensorRT-LLM {passport.release}, and runs with no other; "
        f"installed here is {found}",
        hint=(f"scalellm serve --repository {repository}{image}\n" if image else "")
        + f'{asked.build(passport)}   # after writing tensorrt_llm: "{found}" into the recipe',
    )


def _accept(stamp: workspace.Stamp | None, asked: Asked) -> Accept | None:
    """What the recipe that is named now, or else the one that was built, wants to be found first."""
    if asked.recipe is not None:
        return asked.recipe.accept
    try:
        return parse_recipe(stamp.recipe, Path("recipe.yaml")).accept if stamp and stamp.recipe else None
    except RecipeError:  # of another scalellm
        return None


def _verified(
    repository: Path, passport: Passport, verdict: accuracy.Verdict | None, asked: Asked, accept: Accept | None
) -> Admission:
    """The gate: a bad verdict always closes it, none does where the plan or the recipe asked for one."""
    why, reason = _doubt(passport, verdict, accept)
    if not why:
        if verdict is not None:
            return Admission((f"verified {verdict.made}: {verdict.summary}",))
        advice = "its answers were not verified, which is advised for this engine"
        return Admission(tuple(_advised(passport, advice)))
    if not asked.allow_unverified:
        device = f" --device {asked.target}" if asked.target else ""
        command = f"scalellm verify --recipe {asked.spoken or passport.recipe}{device}"
        raise RejectedError(
            f"{repository}: {why}{reason} ({passport.weights} weights on {passport.device})",
            hint=f"{command}   # what quantization changed\n"
            f"{command} --endpoint http://HOST:PORT   # what the running engine answers\n"
            "For that comparison only: --allow-unverified",
        )
    return Admission((f"--allow-unverified: {why}. Let nobody rely on them.",), why)


def _doubt(passport: Passport, verdict: accuracy.Verdict | None, accept: Accept | None) -> tuple[str, str]:
    """Why its answers are not to be trusted, and who says so; empty where nothing speaks against them."""
    if verdict is None:
        if passport.gate == "required":
            return "its answers were never verified", f", and the plan of {passport.recipe} requires that"
        required = ", and accept in the recipe requires that"
        return ("its answers were never verified", required) if accept else ("", "")
    if not verdict.passed:
        return f"its answers were found wrong: {verdict.summary}", ""
    parts = [part for part in verdict.measured.values() if isinstance(part, dict)]
    failures = [one for part in parts for one in accept.failures(part.get("measures", {}))] if accept else []
    return ("it was verified, and the recipe accepts less now: " + "; ".join(failures), "") if failures else ("", "")


def _advised(passport: Passport, text: str) -> Iterator[str]:
    if passport.gate == "advised":
        yield text
