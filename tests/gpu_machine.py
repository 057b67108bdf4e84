"""A machine with a GPU and a ``trtllm-build`` whose engines can be packaged. For tests only."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.hosts.fakes import Programs

_BUILDER = """\
#!{python}
import sys

sys.path.insert(0, {root!r})
from tests.fake_build import main

main(sys.argv[1:], {version!r}, {record!r})
"""


def gpu_machine(folder: Path, gpu: str, version: str) -> Programs:
    """The fake programs of a machine with the GPU line ``gpu`` (see ``fakes``), with that builder among them.

    ``trtllm-build.jsonl`` in ``folder`` gets a line of JSON for each of its runs.
    """
    programs = Programs(folder, "nvidia-smi", "trtllm-build", version=version, gpus=(gpu,))
    record = str(folder / "trtllm-build.jsonl")
    text = _BUILDER.format(python=sys.executable, root=str(ROOT), record=record, version=version)
    (folder / "trtllm-build").write_text(text)
    return programs
