"""Programs on PATH that speak as those of a GPU machine do: nvidia-smi, trtllm-build, docker, ssh. For tests."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from toolchain.gpu import APPS, OLD_QUERY, QUERY

SYSTEM = ("sh", "cat", "df", "awk", "dirname", "sed", "tail", "tr", "printf", "uname")
"""What every Linux has, and the script of ``doctor`` needs."""


def program(folder: Path, name: str, text: str) -> Path:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def bare(folder: Path) -> Path:
    """A PATH of one folder with what every Linux has, and nothing of NVIDIA's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SYSTEM:
        found = next((Path(place) / name for place in ("/usr/bin", "/bin") if (Path(place) / name).exists()), None)
        if found and not (folder / name).exists():
            (folder / name).symlink_to(found)
    if not (folder / "python3").exists():
        (folder / "python3").symlink_to(sys.executable)
    return folder


def nvidia_smi(folder: Path, table: str, apps: str = "", listing: str = "", *, old: bool = False) -> None:
    """``table``: rows of ``QUERY``; with ``old`` of ``OLD_QUERY``, and ``compute_cap`` is refused as R470 does."""
    answers = [
        (OLD_QUERY, table) if old else (QUERY, table),
        (APPS, apps),
        (("-L",), listing),
    ]
    cases = "\n".join(
        f"{shlex.quote(' '.join(words))}) cat <<'ROWS'\n{text}\nROWS\n;;" for words, text in answers if text
    )
    refusal = "*) echo 'Field \"compute_cap\" is not a valid field to query.' ; exit 2 ;;"
    program(folder, "nvidia-smi", f'case "$*" in\n{cases}\n{refusal}\nesac')


def trtllm_build(folder: Path, version: str) -> None:
    """A builder whose first line names an interpreter that has this TensorRT-LLM and cannot be imported from."""
    site = folder / "site" / f"tensorrt_llm-{version}.dist-info"
    site.mkdir(parents=True, exist_ok=True)
    (site / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    (folder / "site" / "tensorrt_llm.py").write_text("raise SystemExit('imported: that takes a minute')\n")
    python = program(folder / "env", "python3", f'PYTHONPATH={folder / "site"} exec {sys.executable} "$@"')
    file = folder / "trtllm-build"
    file.write_text(f"#!{python}\nraise SystemExit('started')\n")
    file.chmod(0o755)


def docker(folder: Path, *images: str, refuses: str = "") -> None:
    """A docker that has these images; with ``refuses`` its daemon is down."""
    listed = " ".join(shlex.quote(image) for image in images)
    program(
        folder,
        "docker",
        f"""
case "$1 $2" in
"info "*) {f"echo {shlex.quote(refuses)} >&2; exit 1" if refuses else "exit 0"} ;;
"image inspect") for image in {listed or "''"}; do [ "$3" = "$image" ] && exit 0; done; exit 1 ;;
esac
exit 64""",
    )


def ssh(folder: Path, elsewhere: Path, log: Path) -> None:
    """An ssh that gets into a machine whose PATH is ``elsewhere``; ``log`` gets the options and the host."""
    program(
        folder,
        "ssh",
        f"""
for last; do :; done
n=$#; i=1; for word; do [ $i -lt $n ] && echo "$word" >> {log}; i=$((i + 1)); done
PATH={elsewhere} HOME={elsewhere} exec /bin/sh -c "$last\"""",
    )


def environment(*folders: Path) -> dict[str, str]:
    return {**os.environ, "PATH": ":".join(map(str, folders))}
