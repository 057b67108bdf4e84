"""Turn a quantized checkpoint into an engine with the plan's backend, and write its passport."""

from __future__ import annotations

import hashlib
from typing import Any

from toolchain import backends
from toolchain.backends import Order, tensorrt_engine
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Passport, write_passport
from toolchain.errors import ToolError
from toolchain.host import HostCommand
from toolchain.planning.plan import Plan
from toolchain.workspace import Stamp


def inputs(plan: Plan, source_key: str) -> dict[str, Any]:
    """What the engine depends on, as plain JSON: its key is the hash of this."""
    backend = backends.load(plan.backend)
    return {
        **plan.slice("build"),
        **backend.inputs(plan),
        "backend_version": backend.VERSION,
        "checkpoint": source_key,
    }


def commands(order: Order) -> tuple[HostCommand, ...]:
    """The foreign command lines that ``build`` would run for this order; none where the backend has no host."""
    if order.plan.backend != tensorrt_engine.name or order.host is None:
        return ()
    return order.host.commands(tensorrt_engine.job(order))


def refuse_if_lacking(order: Order, continue_with: str) -> None:
    """Raise ToolError, naming all that is missing for the engine and how to go on elsewhere.

    ``continue_with`` holds the commands for the machine that has what is missing.
    """
    lacking = backends.load(order.plan.backend).lacks(order)
    if lacking:
        raise ToolError(
            f"{order.plan.recipe.name}: the {order.plan.backend} engine cannot be built {_where(order)}. It lacks:\n"
            + "\n".join(f"  - {what}" for what in lacking)
            + f"\nNothing is lost: the plan is made and what the engine is built from lies in {order.source}",
            hint=continue_with,
        )


def _where(order: Order) -> str:
    name = order.host.name if order.host else "local"
    spoken = {"local": "on this machine", "container": "in a container on this machine"}
    return spoken.get(name.partition(":")[0], f"on {name}")


def build(order: Order, checkpoint: Checkpoint, *, source: Stamp) -> None:
    """Write the engine and its passport into the order's draft folder.

    ``checkpoint`` is the quantized one and ``source`` its stamp. Raises ToolError when the backend's own tools fail,
    ArtifactError for a damaged checkpoint.
    """
    backends.load(order.plan.backend).build(order)
    write_passport(order.out, passport(order.plan, checkpoint, source))


def passport(plan: Plan, checkpoint: Checkpoint, source: Stamp) -> Passport:
    """What the engine is, for whoever packages, serves or deploys it."""
    config, release = checkpoint.config, plan.release
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
        checkpoint=source.key,
        release=release.version if release else None,
        tensorrt=release.tensorrt if release else None,
        container=release.container if release else None,
        tp=plan.tp,
        pp=plan.pp,
        argv=tuple(backend.inputs(plan).get("argv", ())),
        gate=plan.gate,
        model=source.inputs.get("model"),
        recipe_sha256=hashlib.sha256(plan.recipe.text.encode()).hexdigest(),
    )
