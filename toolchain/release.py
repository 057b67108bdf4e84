"""TensorRT-LLM releases (``facts/releases.yaml``) and what each backend accepts (``facts/backends.yaml``).

It knows which release lists which SM and which backend takes which quantization. It does not know devices by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from toolchain import workspace
from toolchain.errors import PlanError


@dataclass(frozen=True)
class Release:
    """One TensorRT-LLM release, with the Triton image that ships it."""

    version: str
    triton: tuple[str, ...]
    """Tags of NVIDIA's image, oldest first."""
    tensorrt: str
    cuda: str
    python: str
    driver: str
    """The oldest NVIDIA driver that runs the image."""
    driver_confirmed: bool
    sms: tuple[int, ...]
    engine: bool
    """Has ``trtllm-build`` and Triton's C++ backend."""
    llmapi: bool
    notes: tuple[str, ...]
    date: str
    source: str

    @property
    def container(self) -> str:
        """The newest image of this release, without its registry host."""
        return f"tritonserver:{self.triton[-1]}-trtllm-python-py3"

    def has(self, backend: str) -> bool:
        """Whether this release carries ``tensorrt_engine`` or ``tensorrt_llmapi``; False for any other backend."""
        return {"tensorrt_engine": self.engine, "tensorrt_llmapi": self.llmapi}.get(backend, False)


@dataclass(frozen=True)
class BackendFacts:
    """What a backend accepts: names of ``quantization.WEIGHTS`` and ``quantization.KV``."""

    name: str
    title: str
    weights: tuple[str, ...]
    group_sizes: tuple[int, ...]
    """Of int4 weights, best first."""
    kv: tuple[str, ...]
    source: str
    date: str


@functools.cache
def releases() -> Mapping[str, Release]:
    """Version -> release, oldest first."""
    table = workspace.facts("releases")
    return MappingProxyType(
        {
            row["version"]: Release(
                version=row["version"],
                triton=tuple(row["triton"]),
                tensorrt=row["tensorrt"],
                cuda=row["cuda"],
                python=row["python"],
                driver=row["driver"],
                driver_confirmed=row["driver_confirmed"],
                sms=tuple(row["sms"]),
                engine=row["engine"],
                llmapi=row["llmapi"],
                notes=tuple(row["notes"]),
                date=str(table["date"]),
                source=table["source"],
            )
            for row in table["releases"]
        }
    )


@functools.cache
def backends() -> Mapping[str, BackendFacts]:
    """Name -> what the backend accepts."""
    return MappingProxyType(
        {
            name: BackendFacts(
                name,
                row["title"],
                tuple(row["weights"]),
                tuple(row["group_sizes"]),
                tuple(row["kv"]),
                row["source"],
                str(row["date"]),
            )
            for name, row in workspace.facts("backends").items()
        }
    )


def usable(sm: int, backend: str) -> tuple[Release, ...]:
    """The releases that carry this backend and list this SM, oldest first."""
    return tuple(release for release in releases().values() if release.has(backend) and sm in release.sms)


def newest_release(sm: int, backend: str) -> tuple[Release, str]:
    """The newest release that carries this backend and lists this SM, and why it is that one, with the source.

    Raises PlanError when there is none. Weights and KV formats do not narrow the choice: every format of
    ``quantizations.yaml`` is older than the oldest row of the table, and what an SM lacks, the device's dtypes say.
    """
    fitting = usable(sm, backend)
    if not fitting:
        raise PlanError(
            f"no TensorRT-LLM release of the table runs {backend} on SM {sm}",
            hint="Releases and their SMs: facts/releases.yaml",
        )
    newest = fitting[-1]
    last = workspace.facts("releases")["last_with_sm"].get(sm)
    if last:
        return newest, f"the last release that supports SM {sm} ({last['source']})"
    overall = [release for release in releases().values() if release.has(backend)][-1]
    if newest == overall and backend == "tensorrt_engine":
        return newest, f"the newest release that still has trtllm-build, and it lists SM {sm} ({newest.source})"
    return newest, f"the newest release whose {backend} runtime lists SM {sm} ({newest.source})"


def pinned_release(version: str, sm: int, backend: str) -> tuple[Release, str]:
    """The release that a recipe pins. Raises PlanError when it is unknown, or does not run ``backend`` on this SM."""
    known = releases().get(version)
    fitting = [release.version for release in usable(sm, backend)]
    hint = f"SM {sm} with {backend} runs on: {', '.join(fitting) or 'no release of the table'}"
    if known is None:
        raise PlanError(f"TensorRT-LLM {version} is not in the table of releases", hint=hint)
    if not known.has(backend):
        raise PlanError(f"TensorRT-LLM {version} has no usable {backend} runtime", hint=hint)
    if sm not in known.sms:
        listed = ", ".join(str(one) for one in known.sms)
        raise PlanError(f"TensorRT-LLM {version} does not support SM {sm}: it lists {listed}", hint=hint)
    return known, "pinned by the recipe (key tensorrt_llm)"
