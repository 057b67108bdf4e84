"""A job: a recipe, a model and a work folder, and the artifacts that come of them, in order."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain import __version__, variant, workspace
from toolchain.backends import Order
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Engine
from toolchain.errors import PlanError
from toolchain.host import Host, HostCommand
from toolchain.pipeline import drafts
from toolchain.pipeline.source import Model
from toolchain.pipeline.state import NAMES, Result, State, stamped_rows, state_of
from toolchain.planning import build_peaks
from toolchain.planning.build_peaks import Peak
from toolchain.planning.plan import Plan, make_plan
from toolchain.progress import Progress
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import conversations, report_html, samples
from toolchain.quantizers import peaks as quantizer_peaks
from toolchain.quantizers.place import ON_CPU, Place
from toolchain.quantizers.report import REPORT
from toolchain.recipe import Recipe
from toolchain.stages import build as build_stage
from toolchain.stages import convert as convert_stage
from toolchain.stages import package as package_stage
from toolchain.stages import quantize as quantize_stage
from toolchain.workspace import Draft


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
        target: str | None = None,
        parent: Job | None = None,
    ) -> None:
        """``target``: build for this device instead of the recipe's; its artifacts lie in ``WORK/RECIPE/DEVICE``, and
        the quantized checkpoint beside it, for every device of the same formats. ``parent`` is the job of the model for
        which this one makes the draft, in ``WORK/RECIPE/draft``.
        """
        recipe = recipe if parent else variant.for_device(recipe, target or recipe.device)
        self.recipe = recipe
        self.target = recipe.device if target else None
        self.parent = parent
        self.place = place
        self.host = host
        self.source = model or recipe.model
        self.work = work
        self.folder = folder_of(recipe, work, self.target)
        self.progress = progress
        common = work / recipe.name
        self._quantized = common / _checkpoint_name(recipe) if target else common / "checkpoint"
        self._model = Model(self.source, self._quantized, common / "imported", progress)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        drafting = drafts.open_model(recipe, self.folder, progress)
        self.plan: Plan = make_plan(
            recipe, self._model.config, draft=drafting.config if drafting else None, host_memory_bytes=memory
        )
        self._model.check(self.plan)
        self.draft: Job | None = None
        """The job of the draft model, where the recipe names one; its artifacts come right after this one's."""
        if drafting:
            drafts.check_tokenizers(self.recipe, self._model.folder, drafting.folder)
            self.draft = Job(drafts.recipe_of(self.plan), None, self.folder, progress, place, host, parent=self)

    @property
    def names(self) -> tuple[str, ...]:
        """The artifacts of this plan's backend, in order."""
        return tuple(name for name in NAMES if name != "trtllm-checkpoint" or self.plan.backend == "tensorrt_engine")

    def path(self, name: str) -> Path:
        """Where the artifact ``name`` lies."""
        return self._quantized if name == "checkpoint" else self.folder / name

    @property
    def peaks(self) -> tuple[Peak, ...]:
        """What making the artifacts takes at the most."""
        return (*quantizer_peaks.peaks(self.plan), *build_peaks.peaks(self.plan))

    def original(self) -> Checkpoint:
        """The model that is quantized, downloaded or imported if need be."""
        return self._model.opened()

    def states(self) -> list[State]:
        """What is fresh and what is stale, without making anything. Stale inputs make stale all that follows."""
        return [
            state_of(job._label(name), job.path(name), inputs) for job, name, inputs in self._wanted(self.names[-1])
        ]

    def host_commands(self, out: Path | None = None) -> tuple[HostCommand, ...]:
        """The command lines that build the engine on the job's host, to the letter; with ``out``, into that folder.

        Empty where scalellm builds it itself. Raises PlanError where the builder would not build what the plan says.
        """
        key = next(
            workspace.key_of(inputs) for job, name, inputs in self._wanted("engine") if (job, name) == (self, "engine")
        )
        return build_stage.commands(self._order(out or workspace.partial_of(self.path("engine"), key), key))

    def run(self, until: str, *, on_result: Callable[[Result], None] = lambda _result: None) -> list[Result]:
        """Make every artifact up to ``until`` (one of ``NAMES``) that is not fresh; a draft model's as well.

        Raises PlanError where the plan's backend has no ``until``, and the stages' errors. Finished artifacts and
        journaled work stay for the next run.
        """
        results: list[Result] = []
        keys: dict[Job, str] = {}
        if until not in self.names:
            raise PlanError(
                f"{self.recipe.name}: the backend {self.plan.backend} takes the quantized checkpoint as it is",
                hint=f"scalellm build --recipe {self.spoken}",
            )
        for job, name in self._sequence(until):
            result = job._step(name, keys)
            keys[job] = result.key
            results.append(result)
            on_result(result)
        return results

    def _sequence(self, until: str) -> Iterator[tuple[Job, str]]:
        """The artifacts up to ``until`` with the jobs that make them: each of this one's, then the draft model's."""
        for name in self.names[: self.names.index(until) + 1]:
            yield self, name
            if self.draft and name != "repository":
                yield self.draft, name

    def _wanted(self, until: str) -> Iterator[tuple[Job, str, dict[str, Any]]]:
        """The same with the inputs of each, as they would be if all before it were made."""
        keys: dict[Job, str] = {}
        for job, name in self._sequence(until):
            inputs = job._inputs(name, keys)
            keys[job] = workspace.key_of(inputs)
            yield job, name, inputs

    def _label(self, name: str) -> str:
        return f"{self.recipe.name}/{name}" if self.parent else name

    def _step(self, name: str, keys: Mapping[Job, str]) -> Result:
        """Make one artifact unless it is fresh. ``keys``: of what each job has made so far."""
        inputs = self._inputs(name, keys)
        state = state_of(self._label(name), self.path(name), inputs)
        started = time.perf_counter()
        if not state.fresh:
            if name == "checkpoint" and self._reads_the_hub:
                _ = self._samples  # its digest is part of the inputs
                inputs = self._inputs(name, keys)
            self._make(name, inputs)
        action = "kept" if state.fresh else "made"
        return Result(state, action, time.perf_counter() - started, workspace.key_of(inputs))

    @property
    def _reads_the_hub(self) -> bool:
        """Whether the checkpoint is calibrated on a data set of the hub; a quantized model is not calibrated again."""
        data = self.recipe.calibration.data
        return self.plan.calibrates and data.startswith(conversations.HUB) and self._model.opened().quantization is None

    def _inputs(self, name: str, keys: Mapping[Job, str]) -> dict[str, Any]:
        """``keys``: of the artifact that each job has made last."""
        inputs_key = keys.get(self, "")
        if name == "checkpoint":
            return quantize_inputs(self.plan, self._model.fingerprint, self._calibration_digest)
        if name == "trtllm-checkpoint":
            return convert_stage.inputs(self.plan, inputs_key)
        if name == "engine":
            return build_stage.inputs(self.plan, inputs_key)
        drafted = {"draft": keys[self.draft]} if self.draft else {}
        return {**package_stage.inputs(self.plan, inputs_key), **drafted}

    def _make(self, name: str, inputs: Mapping[str, Any]) -> None:
        if name == "engine":
            order = self._order(self.path(name), workspace.key_of(inputs))
            build_stage.refuse_if_lacking(order, self._continue_elsewhere())
        makers = {
            "checkpoint": self._make_checkpoint,
            "trtllm-checkpoint": self._make_trtllm_checkpoint,
            "engine": self._make_engine,
            "repository": self._make_repository,
        }
        with workspace.draft(self.path(name), name, inputs) as draft:
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
            return stamped_rows(self._quantized, given.model_dump())
        return self._file_digest or self._model.calibration_digest(given.data)

    @functools.cached_property
    def _file_digest(self) -> str | None:
        return conversations.data_digest(self.recipe.calibration.data)

    def _make_trtllm_checkpoint(self, draft: Draft) -> None:
        convert_stage.convert(self.plan, Checkpoint.open(self._quantized), draft, progress=self.progress)

    def _make_engine(self, draft: Draft) -> None:
        order = self._order(draft.path, draft.key)
        stamp = workspace.require(self._quantized, "checkpoint")
        build_stage.build(order, Checkpoint.open(self._quantized), source=stamp)
        for name, record in stamp.files.items():  # what was linked from the checkpoint need not be read again
            if (draft.path / name).is_file() and (draft.path / name).samefile(self._quantized / name):
                draft.known_hash(name, record.sha256)

    def _order(self, out: Path, key: str) -> Order:
        """The engine to be built; a foreign builder's words go to ``WORK/RECIPE/build.log``."""
        source = self.path(self.names[self.names.index("engine") - 1])
        return Order(self.plan, source, out, self.progress, key, self.host, self.folder / "build.log")

    def _make_repository(self, draft: Draft) -> None:
        second = Engine.open(self.draft.folder / "engine") if self.draft else None
        engine, services = Engine.open(self.folder / "engine"), self.plan.services
        hashes = package_stage.package(engine, draft.path, services=services, draft=second)
        for file, digest in hashes.items():
            draft.known_hash(file, digest)

    def _continue_elsewhere(self) -> str:
        if self.parent:
            return self.parent._continue_elsewhere()
        common, device = self.work / self.recipe.name, f" --device {self.target}" if self.target else ""
        return (
            f"rsync -a --mkpath {common}/ GPU-HOST:{common}/   # the checkpoints and their stamps\n"
            f"scalellm build --recipe {self.spoken}{device} --work {self.work}   # there; it continues from them"
        )

    @property
    def spoken(self) -> str:
        """The recipe as a person would name it on the command line: a shipped one by its name, else its path."""
        shipped = self.recipe.path.resolve().parent == workspace.shipped("recipes").resolve()
        return self.recipe.path.stem if shipped else str(self.recipe.path)


def folder_of(recipe: Recipe, work: Path, target: str | None = None) -> Path:
    """Where a recipe's engine and repository lie; ``target``: the device, of several, that it is built for."""
    return work / recipe.name / target if target else work / recipe.name


def _checkpoint_name(recipe: Recipe) -> str:
    """``"checkpoint-int4-g128-kv-int8"``: what devices of the same formats share."""
    settled, _ = variant.settle(recipe)
    asked = settled.quantization
    group = f"-g{asked.group_size}" if WEIGHTS[asked.weights].group_sizes else ""
    openvino = recipe.chosen_backend == "openvino"
    changes = recipe.per_device.get(recipe.device)
    own = f"-{recipe.device}" if changes and changes.quantization else ""
    return f"checkpoint-{asked.weights}{group}" + ("" if openvino else f"-kv-{settled.kv_cache.dtype}") + own


def quantize_inputs(plan: Plan, fingerprint: str | None, calibration_digest: str | None = None) -> dict[str, Any]:
    """What the quantized checkpoint depends on, as plain JSON; ``calibration_digest`` is of the file with the text."""
    inputs = {**plan.slice("quantize"), "quantizer_version": quantize_stage.VERSION, "model": fingerprint}
    if "calibration" in inputs:
        inputs["calibration"] = {**inputs["calibration"], "digest": calibration_digest}
    return inputs
