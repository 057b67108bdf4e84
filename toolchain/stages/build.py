"""Turn a quantized checkpoint into an engine with the plan's backend, and write its passport."""

from __future__ import annotations

from typing import Any

from toolchain import backends
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Passport, write_passport
from toolchain.errors import ToolError
from toolchain.plan import Plan
from toolchain.progress import Progress
from toolchain.workspace import Draft


def inputs(plan: Plan, checkpoint_key: str) -> dict[str, Any]:
    """What the engine depends on, as plain JSON: its key is the hash of this."""
    backend = backends.load(plan.backend)
    return {
        **plan.slice("build"),
        "backend_version": backend.VERSION,
        "checkpoint": checkpoint_key,
    }


def refuse_if_lacking(plan: Plan, checkpoint: str, continue_with: str) -> None:
    """Raise ToolError, naming all that this machine lacks for the plan's engine and how to go on elsewhere.

    ``checkpoint`` is the folder of the finished quantized checkpoint, ``continue_with`` the commands for the machine
    that has what is missing.
    """
    lacking = backends.load(plan.backend).lacks(plan)
    if lacking:
        raise ToolError(
            f"{plan.recipe.name}: the {plan.backend} engine cannot be built on this machine. It lacks:\n"
            + "\n".join(f"  - {what}" for what in lacking)
            + f"\nNothing is lost: the plan is made and the quantized checkpoint lies in {checkpoint}",
            hint=continue_with,
        )


def build(plan: Plan, checkpoint: Checkpoint, draft: Draft, *, checkpoint_key: str, progress: Progress) -> None:
    """Write the engine of ``checkpoint`` and its passport into ``draft``.

    Raises ToolError when the backend's own tools fail, ArtifactError for a damaged checkpoint.
    """
    backend = backends.load(plan.backend)
    backend.build(checkpoint, draft.path, progress)
    write_passport(draft.path, passport(plan, checkpoint, checkpoint_key))


def passport(plan: Plan, checkpoint: Checkpoint, checkpoint_key: str) -> Passport:
    """What the engine is, for whoever packages, serves or deploys it."""
    config = checkpoint.config
    backend = backends.load(plan.backend)
    return Passport(
        backend=plan.backend,
        recipe=plan.recipe.name,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        weights=plan.weights.name,
        group_size=plan.group_size,
        kv=plan.kv.name,
        limits=plan.limits,
        device=plan.device.name,
        sm=plan.device.sm,
        runtime=backend.runtime(plan),
        versions=backend.versions(),
        checkpoint=checkpoint_key,
    )
