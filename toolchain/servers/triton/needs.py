"""What a model repository needs of a server: its backends; for a TensorRT-LLM engine the image and GPUs of its release.

Read from the models' config.pbtxt and from ``repository.json``, which a repository that others wrote does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.checkpoint import read_json
from toolchain.errors import ArtifactError
from toolchain.release import releases
from toolchain.repository import CONTENTS

_BACKEND_LINE = re.compile(r'^\s*backend\s*:\s*"([^"]+)"', re.MULTILINE)
CPP_BACKEND = "tensorrtllm"
_TAG = "NVIDIA_TRITON_SERVER_VERSION"
"""Set in NVIDIA's images to their tag, such as 25.01 (scripts/launch_triton_server.py of tensorrtllm_backend @v0.19.0
compares it with one)."""


@dataclass(frozen=True)
class Needs:
    """What must be there to serve one repository."""

    backends: frozenset[str] = frozenset({"python"})
    release: str | None = None
    """TensorRT-LLM; None where no engine of it is served."""
    image: str | None = None
    """The image that has it, with its registry host."""
    gpus: int = 0
    """Of one service; also its ranks."""
    sm: int | None = None
    """Compute capability of the GPUs, times ten: an engine runs on its own kind only."""
    services: int = 1
    recipe: str = "RECIPE"

    @property
    def ranks(self) -> int:
        """Processes under mpirun: one for each GPU of the C++ backend; TensorRT-LLM's Python runtime starts its own."""
        return self.gpus if self.gpus and CPP_BACKEND in self.backends else 1

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the images that ship the release, newest last."""
        row = releases().get(self.release or "")
        return row.triton if row else ()

    def devices(self, environ: Mapping[str, str]) -> str | None:
        """The GPUs of a container, as docker names them: the first that CUDA_VISIBLE_DEVICES leaves; None for none."""
        if not self.gpus:
            return None
        visible = [word.strip() for word in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
        chosen = visible[: self.gpus] or [str(number) for number in range(self.gpus)]
        return f"device={','.join(chosen)}"

    def refusal(self, environ: Mapping[str, str]) -> str:
        """Why a tritonserver with this environment cannot serve it; empty where it can, or does not say what it is."""
        tag = environ.get(_TAG, "")
        if not self.release or not tag or tag in self.tags:
            return ""
        theirs = next((row.version for row in releases().values() if tag in row.triton), "another TensorRT-LLM")
        return (
            f"this tritonserver is of the image {tag} ({theirs}), and the engine was built by TensorRT-LLM "
            f"{self.release} ({' or '.join(self.tags)}): an engine runs with the version that built it"
        )

    def lacking_gpus(self, found: Sequence[tuple[str, int]]) -> str:
        """Why these GPUs (name, SM) do not do; empty where they do, or none could be seen."""
        fitting = [sm for _, sm in found if sm == self.sm]
        if not found or self.sm is None or len(fitting) >= self.gpus:
            return ""
        seen = ", ".join(f"{name} (SM {sm})" for name, sm in found)
        return f"the engine needs {self.gpus} GPU{'s' * (self.gpus > 1)} of SM {self.sm}, and this machine has {seen}"


def needs_of(repository: Path) -> Needs:
    """Raises ArtifactError where the folder is no model repository."""
    file = repository / CONTENTS
    raw = read_json(file) if file.is_file() else {}
    known = {name: raw[name] for name in ("release", "image", "gpus", "sm", "services", "recipe") if name in raw}
    return Needs(backends_of(repository), **known)


def backends_of(repository: Path) -> frozenset[str]:
    """The names of the backends that the models of a repository ask for, read from their config.pbtxt."""
    configs = sorted(repository.glob("*/config.pbtxt"))
    if not configs:
        raise ArtifactError(
            f"{repository} is not a Triton model repository: no */config.pbtxt in it", hint="scalellm package"
        )
    return frozenset(name for config in configs for name in _BACKEND_LINE.findall(config.read_text()))
