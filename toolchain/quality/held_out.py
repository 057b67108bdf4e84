"""The text that quality is measured on: rows of token ids that no calibration has seen.

``builtin`` is the reference of the Python language as the interpreter brings it along (``pydoc_data.topics``, about
460 KB of English prose and examples; Python Software Foundation License). Its digest is in every report: another Python
has another text, and two reports on different texts are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import PlanError, RecipeError
from toolchain.quantizers.conversations import BUILTIN, HUB, Record, data_digest, read_records
from toolchain.quantizers.samples import Samples, cut_rows

SUFFIXES = (".jsonl", ".txt", ".parquet")
_SHORTEST = 80
"""Characters of a paragraph that is a sentence and no heading."""
_PAGE = 2000
"""Characters."""


def held_out_rows(
    text: str, model: Path, *, samples: int, tokens: int, calibration: str | None, chat_template: bool = True
) -> Samples:
    """``samples`` rows of ``tokens`` token ids of the texts that ``text`` names: ``builtin``, a file, or ``hf:NAME``.

    ``model`` has the tokenizer. ``calibration`` names the text that the model was calibrated on: what it holds too is
    left out here. Raises RecipeError for text that cannot be read or is the calibration's, PlanError for too little.
    """
    records, content = held_out_records(text, calibration)
    source = "the reference of the Python language" if text == BUILTIN else text
    return cut_rows(
        records,
        content,
        model,
        samples=samples,
        tokens=tokens,
        chat_template=chat_template,
        source=source,
        too_little=(f"--text {text}", "--samples {}"),
    )


def held_out_records(text: str, calibration: str | None) -> tuple[list[Record], str]:
    """What ``text`` names without what ``calibration`` holds too, and the sha256 of what it was read from.

    Raises RecipeError as ``held_out_rows`` does.
    """
    records, content = _records(text)
    if calibration and (text, calibration) != (BUILTIN, BUILTIN):  # the two that are built in share nothing
        records = _without(records, calibration, text)
    return records, content


def _records(text: str) -> tuple[list[Record], str]:
    if text == BUILTIN:
        return _python_reference()
    if not text.startswith(HUB):
        file = Path(text).expanduser()
        if file.suffix.lower() not in SUFFIXES:
            raise RecipeError(f"--text {text}: the file must end in {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise RecipeError(f"--text {text}: there is no such file", hint="--text builtin")
    return read_records(text)


def _without(records: list[Record], calibration: str, text: str) -> list[Record]:
    """The records that the calibration's text does not hold."""
    if text == calibration or (data_digest(text) is not None and data_digest(text) == data_digest(calibration)):
        raise RecipeError(
            f"--text {text}: this is the text that the model was calibrated on, so it says nothing about other text",
            hint="--text builtin",
        )
    if calibration.startswith(HUB) or data_digest(calibration) is None:
        return records  # not on this machine
    seen = {record.plain for record in read_records(calibration)[0]}
    left = [record for record in records if record.plain not in seen]
    if not left:
        raise RecipeError(
            f"--text {text}: the model was calibrated on all of it, so it says nothing about other text",
            hint="--text builtin",
        )
    return left


def _python_reference() -> tuple[list[Record], str]:
    """The topics of Python's reference, in the order of their names, without what is no paragraph."""
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise PlanError(
            "this Python comes without pydoc_data, whose text would be measured on", hint="--text FILE.jsonl"
        ) from error
    records = []
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = []
        for piece in str(topics[name]).split("\n\n"):
            words = " ".join(piece.split())
            if len(words) >= _SHORTEST and words not in seen:
                seen.add(words)
                paragraphs.append(words)
        records += [Record(f"topic {name}", text=piece) for piece in _pieces(paragraphs)]
    content = hashlib.sha256(json.dumps([record.text for record in records]).encode()).hexdigest()
    return records, content


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs in texts of a page, so that a few rows have many topics among them."""
    page: list[str] = []
    for paragraph in paragraphs:
        page.append(paragraph)
        if sum(map(len, page)) >= _PAGE:
            yield "\n\n".join(page)
            page = []
    if page:
        yield "\n\n".join(page)
