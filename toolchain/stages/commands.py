"""The command lines of a plan, ready to paste: scalellm's own and those of foreign programs. Runs and writes nothing.

What builds a TensorRT-LLM engine comes from the host that was named. It does not look at the machine, and nothing here
was run on a GPU.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.backends.tensorrt_llmapi import settings
from toolchain.host import HostCommand
from toolchain.planning.plan import Plan


@dataclass(frozen=True)
class Step:
    """One step of the lane. ``argv`` is empty where this release has no command for it."""

    name: str
    says: str
    """What it makes, or why there is no command."""
    where: str
    argv: tuple[str, ...] = ()
    alternative: bool = False
    """Another way to what the steps before it make: its command is a comment, for whoever takes it."""

    def lines(self) -> Iterator[str]:
        """Lines for a shell: a comment, then the command, one flag a line."""
        yield f"# {self.name} ({self.where}): {self.says}"
        if self.alternative:
            yield f"#   {shlex.join(self.argv)}"
        elif self.argv:
            yield paste(self.argv)


@dataclass(frozen=True)
class Lane:
    """Every step from the model to the engine, and what to know about them."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    def with_draft(self, draft: Lane) -> Lane:
        """With the foreign commands of the draft model's own lane; scalellm's own commands make both."""
        steps = (step for step in draft.steps if step.argv[:1] != ("scalellm",))
        named = (replace(step, name=f"{step.name} of the draft model") for step in steps)
        return Lane((*self.steps, *named), (*self.notes, *(note for note in draft.notes if note not in self.notes)))


def commands(plan: Plan, spoken: str, model: str | None, work: Path, built: Sequence[HostCommand] = ()) -> Lane:
    """The steps of the plan's backend. ``spoken``: the recipe as it is named; ``model``: what replaces the recipe's;

    ``built``: what a host runs to build the engine.
    """
    home = ("--recipe", spoken, "--work", str(work))
    place = ("--recipe", spoken, *(("--model", model) if model else ()), "--work", str(work))
    if plan.backend == "openvino":
        says = "scalellm makes the engine and the Triton repository itself; there is no foreign command"
        return Lane((Step("build", says, "this machine", ("scalellm", "build", *place)),), plan.warnings)
    folder = work / plan.recipe.name
    says = f"the quantized checkpoint, {folder / 'checkpoint'}"
    steps = [Step("quantize", says, "any machine", ("scalellm", "quantize", *place))]
    if plan.backend == "tensorrt_engine":
        steps += _engine(plan, folder, place, built)
    else:
        steps += _llmapi(plan, folder, place, home)
    return Lane(tuple(steps), tuple(_notes(plan)))


def _engine(plan: Plan, folder: Path, place: tuple[str, ...], built: Sequence[HostCommand]) -> Iterator[Step]:
    """The TensorRT-LLM checkpoint, what must be compiled first, and what the host runs."""
    says = f"the TensorRT-LLM checkpoint, {folder / 'trtllm-checkpoint'}, with tp {plan.tp} and pp {plan.pp}"
    yield Step("convert", says, "any machine", ("scalellm", "convert", *place))
    rebuild = plan.release.rebuild_for(plan.backend, plan.device.sm, plan.weights.name) if plan.release else None
    for step in rebuild.steps if rebuild else ():
        yield Step(step.name, step.says, step.where, step.argv, step.alternative)
    for one in built:
        where = f"{one.where}; in the image made above, not the released one" if rebuild else one.where
        yield Step("build", one.says, where, one.argv)


def _llmapi(plan: Plan, folder: Path, place: tuple[str, ...], home: tuple[str, ...]) -> Iterator[Step]:
    """The folder that the PyTorch runtime serves, behind Triton, or by a server that speaks OpenAI's API alone."""
    engine = str(folder / "engine")
    says = f"the runtime's folder, {engine}, and the Triton repository; nothing is computed, the weights are linked"
    yield Step("build", says, "any machine", ("scalellm", "build", *place))
    says = "Triton, with the tensors and texts that every scalellm server has"
    yield Step("serve", says, _gpu(plan), ("scalellm", "serve", *home, "--server", "container"))
    argv = settings.serve_command(plan, engine)
    yield Step("trtllm-serve", "instead, without Triton: OpenAI's API only", _gpu(plan), argv)
    if plan.release:
        mounted = str((folder / "engine").absolute())
        argv = settings.container_command(plan.release.image, mounted, settings.serve_command(plan, mounted))
        yield Step("trtllm-serve", "the same from outside the image", f"on a GPU of SM {plan.device.sm}", argv)
    for title, command, source in settings.others(plan, engine):
        says = f"{title} loads the same folder, by its source text ({source}); not run by us"
        yield Step("serve", says, f"with {title}, on a GPU of SM {plan.device.sm}", command)


def _gpu(plan: Plan) -> str:
    image = f"in {plan.release.container}, " if plan.release else ""
    return f"{image}on a GPU of SM {plan.device.sm}"


def _notes(plan: Plan) -> Iterator[str]:
    release = plan.release
    if release:
        taken_over = ", not confirmed to the last digit" if "driver" in release.unconfirmed else ""
        yield (
            f"TensorRT-LLM {release.version} needs driver {release.driver} or newer{taken_over}; its image has CUDA "
            + (f"{release.cuda}, TensorRT {release.tensorrt} and Python {release.python}")
        )
        for trap in release.traps_of(plan.backend, plan.device.sm or 0):
            yield f"{trap.text} ({trap.source})"
    if plan.backend == "tensorrt_engine" and not plan.paged_context_fmha:
        yield "this engine cannot reuse cached prompts: serve it with enable_kv_cache_reuse false, chunked context off"
    yield from plan.warnings


def paste(argv: tuple[str, ...]) -> str:
    """A command for a shell, one flag a line, which the shell joins and splits into the same argv."""
    first = next((index for index, word in enumerate(argv) if word.startswith("--")), len(argv))
    lines = [shlex.join(argv[:first])]
    for word in argv[first:]:
        if word.startswith("--"):
            lines.append(f"  {shlex.quote(word)}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)
