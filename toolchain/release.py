"""TensorRT-LLM releases (``facts/releases.yaml``) and what each backend accepts (``facts/backends.yaml``).

It knows which release lists which SM with which number formats, and which backend takes which quantization. It does not
know devices or quantizations by name: the formats that one needs come in the words of ``devices.yaml`` (``dtypes``).
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from toolchain import workspace
from toolchain.errors import PlanError

IMAGES = "nvcr.io/nvidia"
"""NVIDIA's registry, and the place in it where Triton's images lie."""

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trap:
    """Something that goes wrong with a release."""

    text: str
    backend: str
    """With which; empty: with all."""
    sms: frozenset[int]
    """Where; empty: everywhere."""
    source: str
    date: str


@dataclass(frozen=True)
class RebuildStep:
    """One command of a rebuild."""

    name: str
    says: str
    where: str
    argv: tuple[str, ...]
    alternative: bool = False
    """Another way to what the steps before it make."""


@dataclass(frozen=True)
class Rebuild:
    """Kernels that the released wheels and images lack for an SM, and how NVIDIA's own scripts build them."""

    backend: str
    sms: frozenset[int]
    weights: frozenset[str]
    """Whose kernels: keys of ``quantization.WEIGHTS``."""
    architectures: str
    """As ``build_wheel.py --cuda_architectures`` takes it: ``"75-real"``."""
    text: str
    why: str
    steps: tuple[RebuildStep, ...]
    source: str
    date: str

    def told(self, weights: str) -> str:
        """What to know before building an engine of these weights, with the command of the wheel, and the source."""
        wheel = next(shlex.join(step.argv) for step in self.steps if step.name == "wheel")
        return f"{self.text.format(weights=weights, wheel=wheel)} ({self.why})"


@dataclass(frozen=True)
class Unread:
    """Something in a checkpoint that a release's loader does not read, or is not known to read."""

    feature: str
    """In the words of the facts' section ``loader``."""
    text: str
    sms: frozenset[int]
    """Where; empty: everywhere."""
    first: str
    """The release that reads it first."""
    confirmed: bool
    """Whether a source says that earlier releases do not; else nobody has tried."""
    source: str


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
    sms: tuple[int, ...]
    engine: bool
    """Has ``trtllm-build`` and Triton's C++ backend."""
    llmapi: bool
    formats: Mapping[tuple[str, int], frozenset[str]]
    """(backend, SM) -> the number formats that the release lists there."""
    fp8_context_sms: frozenset[int]
    """SMs whose fused attention of prompts can compute in FP8."""
    window_keeps: str
    """What a sequence that is longer than its attention window keeps in the cache: ``"window"`` or ``"sequence"``."""
    traps: tuple[Trap, ...]
    rebuilds: tuple[Rebuild, ...]
    unread: tuple[Unread, ...]
    """What ``trtllm-build`` of this release does not read in a checkpoint, or is not known to read."""
    unconfirmed: frozenset[str]
    """Columns that no source states for this release: ``"driver"``, ``"sms"``."""
    date: str
    source: str

    @property
    def container(self) -> str:
        """The newest image of this release, without its registry host."""
        return f"tritonserver:{self.triton[-1]}-trtllm-python-py3"

    @property
    def image(self) -> str:
        """The same with its registry."""
        return f"{IMAGES}/{self.container}"

    def has(self, backend: str) -> bool:
        """Whether this release carries ``tensorrt_engine`` or ``tensorrt_llmapi``; False for any other backend."""
        return {"tensorrt_engine": self.engine, "tensorrt_llmapi": self.llmapi}.get(backend, False)

    def runs(
        self, sm: int, backend: str, needs: frozenset[str] = _NOTHING, features: frozenset[str] = _NOTHING
    ) -> bool:
        """Whether this release carries the backend, lists the SM with the formats ``needs``, and reads ``features``."""
        lists = self.has(backend) and sm in self.sms and needs <= self.formats.get((backend, sm), _NOTHING)
        return lists and not any(one.confirmed for one in self.unread_of(backend, sm, features))

    def unread_of(self, backend: str, sm: int, features: frozenset[str]) -> tuple[Unread, ...]:
        """Which of a checkpoint's features its loader does not read, or is not known to. Empty but for engines."""
        here = (one for one in self.unread if not one.sms or sm in one.sms)
        return tuple(one for one in here if backend == "tensorrt_engine" and one.feature in features)

    def traps_of(self, backend: str, sm: int) -> tuple[Trap, ...]:
        """What goes wrong with this backend on this SM."""
        here = (trap for trap in self.traps if not trap.sms or sm in trap.sms)
        return tuple(trap for trap in here if trap.backend in ("", backend))

    def rebuild_for(self, backend: str, sm: int | None, weights: str) -> Rebuild | None:
        """What must be built from source before these weights run with this backend on this SM; None for nothing."""
        fits = (one for one in self.rebuilds if one.backend == backend and sm in one.sms and weights in one.weights)
        return next(fits, None)


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
    return MappingProxyType({row["version"]: _release(row, table) for row in table["releases"]})


def _release(row: Mapping[str, Any], table: Mapping[str, Any]) -> Release:
    version = row["version"]
    formats = {
        (span["backend"], sm): frozenset(span["dtypes"])
        for span in table["precisions"]
        if within(version, span)
        for sm in span["sms"]
    }
    return Release(
        version=version,
        triton=tuple(row["triton"]),
        tensorrt=row["tensorrt"],
        cuda=row["cuda"],
        python=row["python"],
        driver=row["driver"],
        sms=tuple(row["sms"]),
        engine=row["engine"],
        llmapi=row["llmapi"],
        formats=MappingProxyType(formats),
        fp8_context_sms=frozenset(sm for s in table["fp8_context_fmha"] if within(version, s) for sm in s["sms"]),
        window_keeps=next(span["keeps"] for span in table["kv_window"] if within(version, span)),
        traps=tuple(
            Trap(
                text=trap["text"],
                backend=trap.get("backend", ""),
                sms=frozenset(trap.get("sms", ())),
                source=trap["source"],
                date=str(trap["date"]),
            )
            for trap in table["traps"]
            if within(version, trap)
        ),
        rebuilds=tuple(_rebuild(one, version) for one in table["rebuild"] if within(version, one)),
        unread=tuple(_unread(one) for one in table["loader"] if not within(version, one)),
        unconfirmed=frozenset(row.get("unconfirmed", ())),
        date=str(table["date"]),
        source=table["source"],
    )


def _rebuild(row: Mapping[str, Any], version: str) -> Rebuild:
    def filled(text: str) -> str:
        return text.replace("{release}", version)

    return Rebuild(
        backend=row["backend"],
        sms=frozenset(row["sms"]),
        weights=frozenset(row["weights"]),
        architectures=row["architectures"],
        text=filled(row["text"]),
        why=row["why"],
        steps=tuple(
            RebuildStep(
                one["name"],
                filled(one["says"]),
                filled(one["where"]),
                tuple(map(filled, one["argv"])),
                one.get("alternative", False),
            )
            for one in row["steps"]
        ),
        source=row["source"],
        date=str(row["date"]),
    )


def _unread(row: Mapping[str, Any]) -> Unread:
    sms = frozenset(row.get("sms", ()))
    return Unread(row["feature"], row["text"], sms, row["from"], row["confirmed"], row["source"])


def order(version: str) -> tuple[int, ...]:
    """``"1.0.3.2510"`` -> (1, 0, 3, 2510), by which releases are sorted. Raises ValueError for what is no version."""
    return tuple(int(part) for part in version.split("."))


def within(version: str, span: Mapping[str, Any]) -> bool:
    """Whether a release is in a span of the facts: keys ``from`` and ``to``, both included, both optional."""
    first, last = span.get("from"), span.get("to")
    return (first is None or order(version) >= order(first)) and (last is None or order(version) <= order(last))


def without_engine(version: str) -> bool:
    """Whether it is 1.3 or later, releases without ``trtllm-build``; the table of releases ends before them."""
    try:
        return order(version) >= order(workspace.facts("releases")["engine_ends"]["first_without"])
    except ValueError:
        return False


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


def usable(
    sm: int, backend: str, needs: frozenset[str] = _NOTHING, features: frozenset[str] = _NOTHING
) -> tuple[Release, ...]:
    """The releases that carry this backend and list this SM with the number formats ``needs``, oldest first.

    ``features``: what their loader has to read in a checkpoint; a release counts unless a source says that it does not.
    """
    return tuple(release for release in releases().values() if release.runs(sm, backend, needs, features))


def newest_release(
    sm: int, backend: str, needs: frozenset[str] = _NOTHING, features: frozenset[str] = _NOTHING
) -> tuple[Release, str]:
    """The newest release that runs number formats ``needs`` with this backend on this SM, and why it is that one.

    Raises PlanError when there is none.
    """
    fitting = usable(sm, backend, needs, features)
    if not fitting:
        if listed := usable(sm, backend, needs)[-1:]:
            raise _does_not_read(listed[0], backend, sm, features)
        with_formats = f" with {' and '.join(sorted(needs))}" if usable(sm, backend) else ""
        raise PlanError(
            f"no TensorRT-LLM release of the table runs {backend} on SM {sm}{with_formats}",
            hint="Releases, their SMs and number formats: facts/releases.yaml",
        )
    newest = fitting[-1]
    table = workspace.facts("releases")
    last = table["last_with_sm"].get(sm)
    if last:
        return newest, f"the last release that supports SM {sm} ({last['source']})"
    overall = [release for release in releases().values() if release.has(backend)][-1]
    lists = f"SM {sm}" + (f" with {' and '.join(sorted(needs))}" if needs else "")
    if newest == overall and backend == "tensorrt_engine":
        later = (
            f"{table['engine_ends']['first_without']} and later have no engine path, backend tensorrt_llmapi goes on"
        )
        return newest, f"the newest release that still has trtllm-build, and it lists {lists} ({later})"
    return newest, f"the newest release whose {backend} runtime lists {lists}"


def pinned_release(
    version: str, sm: int, backend: str, needs: frozenset[str] = _NOTHING, features: frozenset[str] = _NOTHING
) -> tuple[Release, str]:
    """The release that a recipe pins. Raises PlanError when it is unknown, does not run ``backend`` on this SM, or
    does not read the checkpoint."""
    known = releases().get(version)
    fitting = ", ".join(one.version for one in usable(sm, backend, needs, features)) or "no release of the table"
    hint = f"SM {sm} with {backend} runs on: {fitting}"
    if known is None:
        raise _not_in_table(version, sm, backend, hint)
    if not known.has(backend):
        raise PlanError(f"TensorRT-LLM {version} has no usable {backend} runtime", hint=hint)
    if sm not in known.sms:
        listed = ", ".join(str(one) for one in known.sms)
        raise PlanError(f"TensorRT-LLM {version} does not support SM {sm}: it lists {listed}", hint=hint)
    missing = needs - known.formats.get((backend, sm), _NOTHING)
    if missing:
        raise PlanError(f"TensorRT-LLM {version} does not list {' or '.join(sorted(missing))} on SM {sm}", hint=hint)
    if known not in usable(sm, backend, needs, features):
        raise _does_not_read(known, backend, sm, features, hint)
    return known, "pinned by the recipe (key tensorrt_llm)"


def _does_not_read(release: Release, backend: str, sm: int, features: frozenset[str], hint: str = "") -> PlanError:
    unread = [one for one in release.unread_of(backend, sm, features) if one.confirmed]
    told = "; ".join(f"{one.text}, read from {one.first} on ({one.source})" for one in unread)
    return PlanError(f"TensorRT-LLM {release.version} does not read this model's checkpoint: {told}", hint=hint)


def _not_in_table(version: str, sm: int, backend: str, hint: str) -> PlanError:
    """The refusal of a pin that has no row; 1.3 and later are told apart, because they will never have an engine."""
    if not without_engine(version):
        return PlanError(f"TensorRT-LLM {version} is not in the table of releases", hint=hint)
    ends = workspace.facts("releases")["engine_ends"]
    if backend == "tensorrt_engine":
        llmapi = "\nOr use backend: tensorrt_llmapi without the pin" if usable(sm, "tensorrt_llmapi") else ""
        return PlanError(f"tensorrt_llm {version}: {ends['why']} ({ends['source']})", hint=hint + llmapi)
    reason = f"no stable release and image of it is confirmed ({ends['date']}), so it is not in the table of releases"
    return PlanError(f"tensorrt_llm {version}: {reason}", hint=hint)
