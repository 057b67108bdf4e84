"""Draw docs/pipeline.svg, the picture in README: ``python scripts/draw_pipeline.py docs/pipeline.svg``."""

from __future__ import annotations

import sys
from pathlib import Path

STEPS = (
    ("recipe", "rtx4090.yaml", "what, for whom"),
    ("plan", "every decision", "with its reason"),
    ("quantize", "int4 / FP8", "a layer at a time"),
    ("build", "engine", "+ passport"),
    ("package", "Triton models", "one client contract"),
    ("serve", "tritonserver", "watched, drained"),
)
LANES = (
    ("GPU", "TensorRT-LLM recipes: up to the quantized checkpoint, today", "#76b900"),
    (
        "CPU",
        "OpenVINO, from the very same int4 codes and scales: the whole way, on any x86 machine, behind a real Triton",
        "#0068b5",
    ),
)
BOX, GAP, TOP = 132, 26, 24


def box(index: int, title: str, first: str, second: str) -> str:
    """One stage, and the arrow to the next."""
    x = 20 + index * (BOX + GAP)
    arrow = (
        f'<path d="M{x + BOX + 4} {TOP + 41} h{GAP - 12}" class="arrow" marker-end="url(#tip)"/>'
        if index < len(STEPS) - 1
        else ""
    )
    return (
        f'<g><rect x="{x}" y="{TOP}" width="{BOX}" height="82" rx="10" class="box"/>'
        f'<text x="{x + BOX / 2}" y="{TOP + 27}" class="title">{title}</text>'
        f'<text x="{x + BOX / 2}" y="{TOP + 49}" class="small">{first}</text>'
        f'<text x="{x + BOX / 2}" y="{TOP + 67}" class="small">{second}</text>{arrow}</g>'
    )


def lane(index: int, name: str, text: str, color: str) -> str:
    """One kind of machine, and how far it goes."""
    y = TOP + 106 + index * 40
    width = (BOX + GAP) * (3 if name == "GPU" else len(STEPS)) - GAP
    return (
        f'<g><rect x="20" y="{y}" width="{width}" height="30" rx="8" fill="{color}" opacity="0.16"/>'
        f'<rect x="20" y="{y}" width="6" height="30" rx="3" fill="{color}"/>'
        f'<text x="36" y="{y + 20}" class="lane"><tspan class="bold">{name}</tspan>  {text}</text></g>'
    )


def main(target: Path) -> None:
    """Write the SVG; it follows the reader's light or dark theme."""
    width, height = 40 + len(STEPS) * (BOX + GAP) - GAP, TOP + 196
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="recipe, plan, quantize, build, package, serve">',
        "<style>text{font-family:system-ui,sans-serif;fill:#1f2328}.title{font-size:16px;font-weight:600;"
        "text-anchor:middle}.small{font-size:12px;text-anchor:middle;fill:#57606a}.lane{font-size:12.5px}"
        ".bold{font-weight:700}.box{fill:#f6f8fa;stroke:#8c959f;stroke-width:1.2}"
        ".arrow{stroke:#8c959f;stroke-width:2;fill:none}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b3}"
        ".box{fill:#161b22;stroke:#6e7681}}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#8c959f"/></marker></defs>',
        *(box(index, *step) for index, step in enumerate(STEPS)),
        *(lane(index, *row) for index, row in enumerate(LANES)),
        "</svg>\n",
    ]
    target.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
