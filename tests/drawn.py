"""What a drawn SVG file holds, read by an XML parser. For tests only."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"


class Picture:
    """Texts and shapes of an SVG file; shapes by the id of their group."""

    def __init__(self, file: Path) -> None:
        self._root = ElementTree.parse(file).getroot()
        self.texts = [text.text or "" for text in self._root.iter(f"{_SVG}text")]
        self.ids = {one.get("id") for one in self._root.iter(f"{_SVG}g")}

    def points(self, name: str) -> list[tuple[float, float]]:
        """The points of a shape's path, curves by their ends; none of a shape that is not there."""
        group = next((one for one in self._root.iter(f"{_SVG}g") if one.get("id") == name), None)
        path = None if group is None else group.find(f"{_SVG}path")
        steps = [] if path is None else re.findall(r"[MLQC]([^MLQCz]*)", path.get("d") or "")
        numbers = [[float(number) for number in step.split()] for step in steps]
        return [(one[-2], one[-1]) for one in numbers]

    def span(self, name: str) -> tuple[float, float]:
        """Left and right end; (0, 0) of a shape that is not there."""
        xs = [x for x, _ in self.points(name)] or [0.0]
        return min(xs), max(xs)

    def width(self, name: str) -> float:
        left, right = self.span(name)
        return right - left
