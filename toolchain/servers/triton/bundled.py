"""The tritonserver inside the wheel ``nvidia-pytriton``: what must be true before it can run, and its staging folder.

The wheel holds the server, its Python backend and one stub per Python version, but not in the layout that the server
wants: the stub of *this* interpreter has to stand beside the backend. The staging folder puts it there, in the user's
cache, by links (and one copy), without touching site-packages.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.servers.triton.command import local_environment

_TRITON_OF_WHEEL = {"0.7.0": "2.51.0"}
"""Triton's version by the wheel's; the bundled server says so itself at start (``server_version``)."""
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Wheel:
    """Where an installed nvidia-pytriton keeps its parts."""

    root: Path
    libraries: Path
    version: str

    @property
    def triton_version(self) -> str:
        return _TRITON_OF_WHEEL.get(self.version, f"of nvidia-pytriton {self.version}")

    @property
    def stub(self) -> Path:
        return self.root / "python_backend_stubs" / _PYTHON / _STUB


@dataclass(frozen=True)
class Staging:
    """A folder laid out as tritonserver wants it."""

    executable: Path
    backends: Path
    caches: Path


def find_wheel() -> Wheel | None:
    """The wheel in this interpreter's environment, found without importing it (that would take seconds)."""
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations)))
    root = package / "tritonserver"
    if not (root / "bin" / "tritonserver").is_file():
        return None
    return Wheel(root, package.parent / "nvidia_pytriton.libs", metadata.version("nvidia-pytriton"))


def check_numpy(version: str | None = None) -> None:
    """Refuses numpy 2 beside this server: its stub (pybind11 2.10) then reads tensors wrongly without an error.

    Measured with numpy 2.4.6: int32 [[1,2,3],[4,5,6]] arrives as [[1,1,1],[1,1,1]], and a text tensor kills the stub.
    Mended upstream after this release (triton-inference-server/python_backend pull request 384, October 2024).
    """
    if version is None:
        try:
            version = metadata.version("numpy")
        except metadata.PackageNotFoundError:
            version = "none"
    if version.split(".")[0] in {"0", "1"}:
        return
    raise ToolError(
        f"the bundled Triton needs numpy 1, but this environment has {version}; with numpy 2 it returns wrong data",
        hint=f"{sys.executable} -m pip install 'numpy>=1.26.4,<2'",
    )


def environment(wheel: Wheel, base: Mapping[str, str]) -> dict[str, str]:
    """``base`` changed so that server and stubs find their libraries and this interpreter's packages."""
    libraries = [wheel.libraries, *_libpython_folders()]
    is_venv = sys.prefix != sys.base_prefix
    return local_environment(base, prefix=Path(sys.prefix), is_venv=is_venv, libraries=libraries)


def check_stub(stub: Path, env: Mapping[str, str]) -> None:
    """Refuses a stub with a missing library: tritonserver would wait for it for ever, without a word in its log."""
    listing = runner.run(["ldd", str(stub)], env=env, timeout_s=30).stdout
    missing = [line.split()[0] for line in listing.splitlines() if "not found" in line]
    if not missing:
        return
    hint = _libpython_hint() if any(name.startswith("libpython") for name in missing) else "install these libraries"
    raise ToolError(f"the Python backend of Triton cannot load {', '.join(missing)} ({stub})", hint=hint)


def stage(wheel: Wheel, cache: Path) -> Staging:
    """The staging folder for this wheel and interpreter below ``cache``; made once, by a rename."""
    if not wheel.stub.is_file():
        raise ToolError(
            f"nvidia-pytriton {wheel.version} has no Triton stub for Python {_PYTHON}",
            hint="use a Python that it has one for: " + ", ".join(sorted(_stub_versions(wheel))),
        )
    folder = cache / f"triton-{wheel.triton_version.split()[-1]}-{_digest(wheel)}"
    if not folder.is_dir():
        _build(wheel, folder)
    return Staging(folder / "bin" / "tritonserver", folder / "backends", folder / "caches")


def _build(wheel: Wheel, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        backend = made / "backends" / "python"
        backend.mkdir(parents=True)
        for part in (wheel.root / "backends" / "python").iterdir():
            if part.is_file():
                (backend / part.name).symlink_to(part)
        _place_program(wheel.stub, backend / _STUB, copy=True)
        (made / "bin").mkdir()
        server = wheel.root / "bin" / "tritonserver"
        _place_program(server, made / "bin" / "tritonserver", copy=not os.access(server, os.X_OK))
        (made / "caches").symlink_to(wheel.root / "caches")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and made the same
                raise


def _place_program(source: Path, target: Path, *, copy: bool) -> None:
    """A link, or an executable copy: some installers lose the x bit of the wheel's programs."""
    if copy:
        shutil.copyfile(source, target)
        target.chmod(0o755)
    else:
        target.symlink_to(source)


def _digest(wheel: Wheel) -> str:
    """Changes with anything that the staging folder links to or copies."""
    server = wheel.root / "bin" / "tritonserver"
    facts = [wheel.root, wheel.version, _PYTHON]
    facts += [(path.stat().st_size, path.stat().st_mtime_ns) for path in (wheel.stub, server)]
    return hashlib.sha256(repr([str(fact) for fact in facts]).encode()).hexdigest()[:12]


def _stub_versions(wheel: Wheel) -> list[str]:
    return [path.name for path in (wheel.root / "python_backend_stubs").iterdir()]


def _libpython_folders() -> list[Path]:
    """Where this interpreter's own libpython lies; empty where only the system's search path can know."""
    name = f"libpython{_PYTHON}.so.1.0"
    folders = [Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix) / "lib"]
    return [folder for folder in dict.fromkeys(folders) if (folder / name).exists()][:1]


def _libpython_hint() -> str:
    return (
        f"Debian, Ubuntu:  sudo apt install libpython{_PYTHON}\n"
        f"Fedora, RHEL:    sudo dnf install python{_PYTHON}-libs\n"
        f"pyenv:           PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force {sys.version.split()[0]}"
    )
