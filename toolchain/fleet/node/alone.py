"""A machine that is all of an endpoint: its GPUs, and whether it has room for what a deployment asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from toolchain import gpu
from toolchain.errors import RecipeError
from toolchain.fleet.control.seats import Machine, Share, offers_of
from toolchain.fleet.deployment import MOST, Deployment

LIMIT = MOST
"""Replicas on one machine: where a recipe for a CPU names no ``services``, the deployment alone bounds them."""


def gpus_of(version: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What this machine is, by the first engine that is made for it, and how CUDA names its GPUs. Where none can be
    seen, the first ones, as many as a replica needs: what then goes wrong, its server says.
    """
    offers = offers_of(version)
    device, share = next((one for one in offers if one[1].gpus), offers[0])
    if not share.gpus:
        return device, ()
    visible = [word.strip() for word in os.environ.get(gpu.VISIBLE, "").split(",") if word.strip()]
    unseen = visible[: share.gpus] or map(str, range(share.gpus))
    return device, gpu.names_of(device, os.environ) or tuple(unseen)


def machine_of(version: Mapping[str, Any]) -> Machine:
    """This machine as the node of an endpoint that begins with this version."""
    device, gpus = gpus_of(version)
    return Machine(device, len(gpus), LIMIT, turns=True)


def must_have_room(deployment: Deployment, version: Mapping[str, Any], machine: Machine) -> None:
    """Raises RecipeError where this machine cannot hold as many replicas as the deployment may want."""
    offers, most = offers_of(version), deployment.replicas.most
    room = machine.room(offers)
    if room >= most:
        return
    has = f", {_gpus(machine.gpus)}," if machine.gpus else ""
    needs = " and ".join(sorted({_told(share) for _device, share in offers}))
    raise RecipeError(
        f"replicas.max: {most}, and this machine{has} has room for {room}: the recipe says {needs}",
        hint=(f"replicas: {{max: {room}}}   # in the deployment\n" if room else "")
        + "services: N   # in the recipe: smaller parts, more of them; scalellm plan says whether they fit\n"
        "network: {host: ADDRESS}   # in the deployment, without --local: for machines that join",
    )


def _told(share: Share) -> str:
    return f"services: {share.services}" + (f" on {_gpus(share.gpus)}" if share.gpus else "")


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number != 1)}"
