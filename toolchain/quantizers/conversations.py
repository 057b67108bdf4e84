"""Where calibration text comes from: the built-in conversations, a person's file, or a data set of the hub -> records.

It knows no tokenizer and no model: what becomes of the text is decided in ``samples``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, PlanError, RecipeError

BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).resolve().parent.parent / "facts" / "calibration.jsonl"
HUB = "hf:"
HUB_RECORDS = 4096
"""Records that are read from a data set of the hub: enough for a million tokens of usual conversations."""
PYARROW = "pyarrow<26"
"""The range that works with numpy 1: 26.0.1 asks for numpy 2 when it is imported (tried in November 2026)."""
ROLES = ("system", "user", "assistant")

_SHAPE = '{"messages": [{"role": "user", "content": "..."}, ...]} or {"text": "..."}'


@dataclass(frozen=True)
class Record:
    """One conversation or one plain text, and where it stands."""

    where: str
    """``"chats.jsonl:12"``: for messages."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn; empty for a plain text."""
    text: str = ""

    @property
    def plain(self) -> str:
        """The text without any template: a conversation is its turns, an empty line between them."""
        return self.text or "\n\n".join(content for _role, content in self.messages)


def data_digest(data: str) -> str | None:
    """sha256 (hex) of the file that ``data`` names; None for a data set of the hub and for a file that is not here."""
    file = _file_of(data)
    if file is None or not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_of(data: str) -> Path | None:
    if data.startswith(HUB):
        return None
    return BUILTIN_FILE if data == BUILTIN else Path(data).expanduser()


def read_records(data: str) -> tuple[list[Record], str]:
    """The records of ``data`` in their order, and the sha256 (hex) of what they were read from.

    Raises RecipeError for what cannot be read, naming the line; PlanError where a library is missing; ArtifactError
    where the hub does not answer.
    """
    file = _file_of(data)
    if file is None:
        rows = list(_from_hub(data.removeprefix(HUB)))
        content = hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return _nonempty(data, [_record(row, f"{data}, record {n}") for n, row in enumerate(rows, 1)]), content
    readers = {".jsonl": _from_jsonl, ".txt": _from_text, ".parquet": _from_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise RecipeError(f"calibration.data {data}: the file must end in {', '.join(readers)}")
    try:
        found = data_digest(data)
        if found is None:
            raise RecipeError(
                f"calibration.data: there is no file {file}",
                hint="The path is relative to the current folder. Or use the conversations of scalellm: data: builtin",
            )
        return _nonempty(data, list(reader(file))), found
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not a text file in UTF-8 (byte {error.start})") from error


def _nonempty(data: str, records: list[Record]) -> list[Record]:
    found = [record for record in records if record.plain.strip()]
    if not found:
        raise RecipeError(f"calibration.data {data}: there is no text in it")
    return found


def _from_jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{where}: not valid JSON: {error}", hint=f"Each line is {_SHAPE}") from error
            yield _record(row, where)


def _from_text(file: Path) -> Iterator[Record]:
    """Paragraphs: lines between empty lines."""
    lines: list[str] = []
    for number, line in enumerate([*file.read_text(encoding="utf-8").splitlines(), ""], 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Record(f"{file}:{number - len(lines)}", text="\n".join(lines))
            lines = []


def _from_parquet(file: Path) -> Iterator[Record]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PlanError(
            f"calibration.data {file}: reading parquet needs pyarrow, which cannot be imported: {error}",
            hint=f"pip install '{PYARROW}'   # or convert the file to .jsonl",
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [name for name in ("messages", "text") if name in table.schema_arrow.names]
        if not wanted:
            columns = ", ".join(table.schema_arrow.names)
            raise RecipeError(f"{file}: has no column messages or text; its columns are {columns}")
        rows = (row for batch in table.iter_batches(columns=wanted[:1]) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield _record(row, f"{file}, row {number}")
    except pyarrow.ArrowException as error:
        raise RecipeError(f"{file}: cannot be read as parquet: {error}") from error


def _from_hub(name: str) -> Iterator[dict[str, Any]]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise PlanError(
            f"calibration.data {HUB}{name}: a data set of the hub needs datasets, which cannot be imported: {error}",
            hint=f"pip install datasets '{PYARROW}'   # or give a file: calibration: {{data: chats.jsonl}}",
        ) from error
    try:
        splits = datasets.load_dataset(name, streaming=True)
        split = splits["train"] if "train" in splits else next(iter(splits.values()))
        rows: list[Mapping[str, Any]] = list(split.take(HUB_RECORDS))
    except Exception as error:  # the library raises errors of a dozen others: network, hub, file formats
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"calibration.data {HUB}{name}: the data set cannot be read: {first}",
            hint="Check the name and the network, or give a file: calibration: {data: chats.jsonl}",
        ) from error
    for row in rows:
        wanted = [key for key in ("messages", "text") if key in row]
        if not wanted:
            columns = ", ".join(map(str, row))
            raise RecipeError(f"{HUB}{name}: has no column messages or text; its columns are {columns}")
        yield {wanted[0]: row[wanted[0]]}


def _record(row: Any, where: str) -> Record:
    """One parsed entry -> Record. Raises RecipeError that says what is wrong with it."""
    if isinstance(row, dict) and isinstance(row.get("text"), str) and "messages" not in row:
        return Record(where, text=row["text"])
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecipeError(f"{where}: an entry is {_SHAPE}")
    messages = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise RecipeError(f"{where}: each message has a role ({', '.join(ROLES)}) and a content that is text")
        messages.append((role, content))
    return Record(where, messages=tuple(messages))
