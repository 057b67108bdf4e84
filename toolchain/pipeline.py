"""The order of the stages, and what is stale. Nothing else knows the order.

    recipe + model  ->  checkpoint (quantize)  ->  engine (build)  ->  repository (package)

A TensorRT-LLM engine is built from ``trtllm-checkpoint`` (convert), which stands between the first two. Each artifact
lies in ``WORK/RECIPE/NAME``. Its key is the hash of its slice of the plan and of the key of what it is made from; same
key and intact files: skipped.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import __version__, workspace
from toolchain import checkpoint as checkpoints
from toolchain.backends import Order
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Engine
from toolchain.errors import ArtifactError, PlanError
from toolchain.family import LlamaConfig, published, read_config
from toolchain.host import Host
from toolchain.plan import Plan, make_plan
from toolchain.progress import Progress
from toolchain.quantizers import conversations, foreign, report_html, samples
from toolchain.quantizers.foreign import Foreign
from toolchain.quantizers.place import ON_CPU, Place
from toolchain.quantizers.report import REPORT
from toolchain.recipe import Recipe
from toolchain.stages import adopt as adopt_stage
from toolchain.stages import build as build_stage
from toolchain.stages import convert as convert_stage
from toolchain.stages import package as package_stage
from toolchain.stages import quantize as quantize_stage
from toolchain.workspace import Draft, Stamp

NAMES = ("checkpoint", "trtllm-checkpoint", "engine", "repository")
"""The artifacts, in order; the second is of the backend tensorrt_engine alone."""

STAGE_OF = {"checkpoint": "quantize", "trtllm-checkpoint": "convert", "engine": "build", "repository": "package"}


@dataclass(frozen=True)
class State:
    """One artifact as it is now: whether it can be used, and if not, why."""

    name: str
    folder: Path
    fresh: bool
    reasons: tuple[str, ...]
    """``("there is none yet",)``, ``("kv was int8, is fp8",)``, ``("... is truncated",)`` or, when fresh, empty."""

    @property
    def stage(self) -> str:
        return STAGE_OF[self.name]


@dataclass(frozen=True)
class Result:
    """One artifact after a run: what was done to it and how long that took."""

    state: State
    action: str
    """``"kept"`` or ``"made"``."""
    seconds: float
    key: str


class Job:
    """A recipe, a model and a work folder, from which the artifacts are made."""

    def __init__(
        self,
        recipe: Recipe,
        model: str | None,
        work: Path,
        progress: Progress,
        place: Place = ON_CPU,
        host: Host | None = None,
    ) -> None:
        self.recipe = recipe
        self.place = place
        self.host = host
        self.source = model or recipe.model
        self.folder = work / recipe.name
        self.work = work
        self.progress = progress
        self._model = _Model(self.source, self.folder, progress)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.plan: Plan = make_plan(recipe, self._model.config, host_memory_bytes=memory)
        self._model.check(self.plan)

    @property
    def names(self) -> tuple[str, ...]:
        """The artifacts of this plan's backend, in order."""
        return tuple(name for name in NAMES if name != "trtllm-checkpoint" or self.plan.backend == "tensorrt_engine")

    def states(self) -> list[State]:
        """What is fresh and what is stale, without making anything. Stale inputs make stale all that follows."""
        found, inputs_key = [], ""
        for name in self.names:
            inputs = self._inputs(name, inputs_key)
            state = _state(name, self.folder / name, inputs)
            found.append(state)
            inputs_key = workspace.key_of(inputs)
        return found

    def run(self, until: str, *, on_result: Callable[[Result], None] = lambda _result: None) -> list[Result]:
        """Make every artifact up to ``until`` (one of ``NAMES``) that is not fresh.

        Raises PlanError where the plan's backend has no ``until``, and the stages' errors. Finished artifacts and
        journaled work stay for the next run.
        """
        results: list[Result] = []
        inputs_key = ""
        if until not in self.names:
            raise PlanError(
                f"{self.recipe.name}: the backend {self.plan.backend} takes the quantized checkpoint as it is",
                hint=f"scalellm build --recipe {self.spoken}",
            )
        for name in self.names[: self.names.index(until) + 1]:
            inputs = self._inputs(name, inputs_key)
            state = _state(name, self.folder / name, inputs)
            started = time.perf_counter()
            if not state.fresh:
                if name == "checkpoint" and self._reads_the_hub:
                    _ = self._samples  # its digest is part of the inputs
                    inputs = self._inputs(name, inputs_key)
                self._make(name, inputs)
            inputs_key = workspace.key_of(inputs)
            result = Result(state, "kept" if state.fresh else "made", time.perf_counter() - started, inputs_key)
            results.append(result)
            on_result(result)
        return results

    @property
    def _reads_the_hub(self) -> bool:
        """Whether the checkpoint is calibrated on a data set of the hub; a quantized model is not calibrated again."""
        data = self.recipe.calibration.data
        return self.plan.calibrates and data.startswith(conversations.HUB) and self._model.opened().quantization is None

    def _inputs(self, name: str, inputs_key: str) -> dict[str, Any]:
        if name == "checkpoint":
            return quantize_inputs(self.plan, self._model.fingerprint, self._calibration_digest)
        if name == "trtllm-checkpoint":
            return convert_stage.inputs(self.plan, inputs_key)
        if name == "engine":
            return build_stage.inputs(self.plan, inputs_key)
        return package_stage.inputs(self.plan, inputs_key)

    def _make(self, name: str, inputs: Mapping[str, Any]) -> None:
        if name == "engine":
            order = self._order(self.folder / name, workspace.key_of(inputs))
            build_stage.refuse_if_lacking(order, self._continue_elsewhere())
        makers = {
            "checkpoint": self._make_checkpoint,
            "trtllm-checkpoint": self._make_trtllm_checkpoint,
            "engine": self._make_engine,
            "repository": self._make_repository,
        }
        with workspace.draft(self.folder / name, name, inputs) as draft:
            extra = makers[name](draft)
            draft.commit(versions={"scalellm": __version__}, recipe=self.recipe.text, extra=extra)

    def _make_checkpoint(self, draft: Draft) -> dict[str, Any]:
        """-> where it was computed."""
        plan, asked, model = self.plan, self.plan.recipe.quantization, self._model.opened()
        calibrated = plan.calibrates and model.quantization is None
        how = quantize_stage.quantize(
            model,
            draft,
            weights=plan.weights.name,
            group_size=plan.group_size or 128,
            scales=asked.scales,
            kv=plan.checkpoint_kv,
            progress=self.progress,
            method=asked.method if calibrated else "rtn",
            clip=asked.clip,
            fp8_scales=asked.fp8_scales,
            propagate=asked.propagate,
            smoothquant_alpha=asked.smoothquant_alpha,
            samples=self._samples if calibrated else None,
            place=self.place,
        )
        report = draft.path / REPORT
        if calibrated and report.is_file():
            page = report_html.render(json.loads(report.read_text(encoding="utf-8")), title=self.recipe.name)
            workspace.write_durably(draft.path / report_html.FILE, page.encode())
        return how

    @functools.cached_property
    def _samples(self) -> samples.Samples:
        """The rows of text that the model is calibrated on."""
        given, model = self.recipe.calibration, self._model.opened()
        with self.progress.task("quantize: read the calibration text", given.samples, "samples") as task:
            found = samples.load_samples(
                given.data,
                model.path,
                samples=given.samples,
                tokens=given.tokens,
                chat_template=given.chat_template,
            )
            task.advance(given.samples)
        return found

    @property
    def _calibration_digest(self) -> str | None:
        """Of the file with the text; where it is not on this machine, from the stamp of a checkpoint brought along.

        A data set of the hub may change without a word, so its rows are what counts: those of the checkpoint that is
        there, which needs no network, until it has to be made again. Then it is those that were read for it.
        """
        if not self.plan.calibrates:
            return None
        given = self.recipe.calibration
        if given.data.startswith(conversations.HUB):
            if "_samples" in self.__dict__:
                return self._samples.digest
            return _stamped_rows(self.folder / "checkpoint", given.model_dump())
        return self._file_digest or self._model.calibration_digest(given.data)

    @functools.cached_property
    def _file_digest(self) -> str | None:
        return conversations.data_digest(self.recipe.calibration.data)

    def _make_trtllm_checkpoint(self, draft: Draft) -> None:
        convert_stage.convert(self.plan, Checkpoint.open(self._quantized), draft, progress=self.progress)

    def _make_engine(self, draft: Draft) -> None:
        order = self._order(draft.path, draft.key)
        stamp = workspace.require(self._quantized, "checkpoint")
        build_stage.build(order, Checkpoint.open(self._quantized), checkpoint_key=stamp.key)

    @property
    def _quantized(self) -> Path:
        return self.folder / "checkpoint"

    def _order(self, out: Path, key: str) -> Order:
        """The engine to be built; a foreign builder's words go to ``WORK/RECIPE/build.log``."""
        source = self.folder / self.names[self.names.index("engine") - 1]
        return Order(self.plan, source, out, self.progress, key, self.host, self.folder / "build.log")

    def _make_repository(self, draft: Draft) -> None:
        hashes = package_stage.package(Engine.open(self.folder / "engine"), draft.path)
        for file, digest in hashes.items():
            draft.known_hash(file, digest)

    def _continue_elsewhere(self) -> str:
        work = self.work
        return (
            f"rsync -a --mkpath {self.folder}/ GPU-HOST:{work}/{self.recipe.name}/   # the checkpoint and its stamp\n"
            f"scalellm build --recipe {self.spoken} --work {work}   # there; it continues from the checkpoint"
        )

    @property
    def spoken(self) -> str:
        """The recipe as a person would name it on the command line: a shipped one by its name, else its path."""
        shipped = self.recipe.path.resolve().parent == workspace.shipped("recipes").resolve()
        return self.recipe.path.stem if shipped else str(self.recipe.path)


class _Model:
    """The model behind a job, opened only as far as is needed.

    ``config`` comes from the model's folder; where that is not on this machine, from a quantized checkpoint that was
    brought along, else from what is published of a model of that name. ``opened`` fetches the model if it must, and
    imports one that another tool wrote into ``WORK/RECIPE/imported`` first.
    """

    def __init__(self, source: str, folder: Path, progress: Progress) -> None:
        self._source = source
        self._quantized = folder / "checkpoint"
        self._imported = folder / "imported"
        self._progress = progress
        self._opened: Checkpoint | None = None
        self._stamp: Stamp | None = None
        found = checkpoints.find(source)
        if found is None:
            self._stamp = workspace.current(self._quantized)
        if found is None and self._stamp is None and published(source) is None:
            found = checkpoints.download(source)
        self._foreign = foreign.open_foreign(found) if found else None
        self.config: LlamaConfig = self._foreign.config if self._foreign else self._config(found)

    def check(self, plan: Plan) -> None:
        """Raises PlanError where the weights of a foreign model are not those that the recipe asks for."""
        if self._foreign:
            adopt_stage.check(
                Path(self._source),
                self._foreign,
                weights=plan.weights.name,
                group_size=plan.group_size,
                static_inputs=plan.backend != "openvino",
            )

    def _config(self, folder: Path | None) -> LlamaConfig:
        folder = folder or (self._quantized if self._stamp else None)
        known = None if folder else published(self._source)
        if known is not None:
            return known
        file = (folder or checkpoints.download(self._source)) / "config.json"
        return read_config(checkpoints.read_json(file, hint=_NAME_A_MODEL), str(file))

    @property
    def fingerprint(self) -> str | None:
        """Of the model's files; from the checkpoint's stamp where the model is not here; None where neither is."""
        if self._stamp is not None:
            return str(self._stamp.inputs["model"])
        if self._foreign is not None:
            return workspace.key_of(adopt_stage.inputs(self._foreign))
        return self.opened().fingerprint if self._opened or checkpoints.find(self._source) else None

    def calibration_digest(self, data: str) -> str | None:
        """Of the text that the checkpoint which was brought along was calibrated on, if that was ``data``."""
        known = self._stamp.inputs.get("calibration") if self._stamp else None
        return str(known["digest"]) if known and known["data"] == data and known["digest"] else None

    def opened(self) -> Checkpoint:
        """The checked model, downloaded if need be."""
        if self._stamp is not None:
            raise ArtifactError(
                f"{self._quantized}: must be made again, and the model it was made from is not on this machine",
                hint=_NAME_A_MODEL,
            )
        if self._opened is None and self._foreign is not None:
            import_model(self._foreign, self._imported, self._progress)
            self._opened = Checkpoint.open(self._imported)
        elif self._opened is None:
            self._opened = Checkpoint.open(checkpoints.download(self._source))
        return self._opened


_NAME_A_MODEL = "Give the folder of a Hugging Face model: --model DIR"


def import_model(model: Foreign, target: Path, progress: Progress, tokenizer: Path | None = None) -> State:
    """A foreign model as a stamped checkpoint in ``target``, made unless it is there. -> its state before.

    Raises ArtifactError where ``target`` is a folder of something else.
    """
    inputs = adopt_stage.inputs(model, tokenizer)
    state = _state("imported", target, inputs)
    if state.fresh:
        return state
    stamp = workspace.read_stamp(target)
    if (
        target.exists()
        and not (target.is_dir() and not any(target.iterdir()))
        and (not stamp or stamp.stage != "imported")
    ):
        raise ArtifactError(
            f"{target}: exists and is no import of scalellm's", hint="Name a folder that is not there yet."
        )
    with workspace.draft(target, "imported", inputs) as draft:
        adopt_stage.adopt(model, draft, progress=progress, tokenizer=tokenizer)
        draft.commit(versions={"scalellm": __version__}, recipe="")
    return state


def quantize_inputs(plan: Plan, fingerprint: str | None, calibration_digest: str | None = None) -> dict[str, Any]:
    """What the quantized checkpoint depends on, as plain JSON; ``calibration_digest`` is of the file with the text."""
    inputs = {**plan.slice("quantize"), "quantizer_version": quantize_stage.VERSION, "model": fingerprint}
    if "calibration" in inputs:
        inputs["calibration"] = {**inputs["calibration"], "digest": calibration_digest}
    return inputs


def _stamped_rows(folder: Path, calibration: Mapping[str, Any]) -> str | None:
    """The digest of the rows that the checkpoint in ``folder`` was calibrated on, if that was asked for so."""
    try:
        stamp = workspace.current(folder)
    except ArtifactError:
        return None
    known = dict((stamp.inputs.get("calibration") or {}) if stamp else {})
    digest = known.pop("digest", None)
    return str(digest) if digest and known == calibration else None


def _state(name: str, folder: Path, inputs: Mapping[str, Any]) -> State:
    try:
        stamp = workspace.current(folder)
    except ArtifactError as error:
        return State(name, folder, False, (error.message,))
    if stamp is None:
        return State(name, folder, False, ("there is none yet",))
    if stamp.key != workspace.key_of(inputs):
        return State(name, folder, False, tuple(_readable(workspace.differences(stamp.inputs, inputs))))
    wrong = workspace.damage(folder, stamp)
    return State(name, folder, wrong is None, (wrong,) if wrong else ())


_HASHES = {
    "model": "the model's files changed",
    "checkpoint": "its checkpoint changed",
    "engine": "its engine changed",
    "templates": "the templates changed",
    "calibration.digest": "the text that it is calibrated on changed",
}


def _readable(differences: Iterable[str]) -> list[str]:
    """Hashes mean nothing to a person: say which input changed instead of from what to what."""
    return [_HASHES.get(line.split(" was ")[0], line) for line in differences]
