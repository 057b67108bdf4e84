"""Writes the golden files anew."""

from __future__ import annotations

import shutil

from tests.golden import HERE, choice_text, everything

for folder in [path for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"]:
    shutil.rmtree(folder)
for file, body in everything():
    target = HERE / file
    target.parent.mkdir(exist_ok=True)
    target.write_text(body, encoding="utf-8")
(HERE / "choice.txt").write_text(choice_text(), encoding="utf-8")
