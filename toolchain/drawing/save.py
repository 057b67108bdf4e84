"""Figures into a file whose ending says what it is. Nothing half written, and no file where drawing fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from toolchain.drawing.chart import Figure, Table
from toolchain.errors import ArtifactError, RecipeError, ToolError

ENDINGS = (".svg", ".png", ".html")


def check(path: Path) -> None:
    """What can be said before the work is done: raises RecipeError for another ending, ArtifactError where no file can
    be written, ToolError where matplotlib is not installed."""
    if path.suffix.lower() not in ENDINGS:
        raise RecipeError(
            f"{path}: pictures end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}",
            hint=f"{path.with_suffix('.svg') if path.name.strip('.') else path / 'plot.svg'}",
        )
    folder = path.absolute().parent
    why = "is a folder" if path.is_dir() else "" if folder.is_dir() else f"there is no folder {folder}"
    why = why or ("" if os.access(folder, os.W_OK) else f"{folder} is not writable")
    if why:
        raise ArtifactError(f"{path}: cannot be written: {why}", hint=f"give another place, such as {path.name}")
    if find_spec("matplotlib") is None:
        raise ToolError("pictures need matplotlib", hint="pip install 'scalellm-toolchain[plot]'")


def save(parts: Sequence[Figure | Table], path: Path, *, title: str, about: Sequence[str] = ()) -> None:
    """Write figures to ``path``: one picture (.svg, .png; tables are left out) or one page (.html).

    ``title`` heads a page and a picture of several figures; ``about``: sentences below a page's heading. Raises as
    ``check`` does, and ArtifactError where writing fails.
    """
    check(path)
    data = _drawn(parts, path.suffix.lower(), title, about)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}", hint="give another place") from error
    finally:
        draft.unlink(missing_ok=True)


def _drawn(parts: Sequence[Figure | Table], ending: str, title: str, about: Sequence[str]) -> bytes:
    from toolchain.drawing.page import page
    from toolchain.drawing.sheet import picture

    if ending == ".html":
        return page(parts, title, about).encode()
    canvas = picture([part for part in parts if isinstance(part, Figure)], title)
    return canvas.png() if ending == ".png" else canvas.svg().encode()
