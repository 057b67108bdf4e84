"""Whether two models write with the same token ids, by the contents of their tokenizer files.

It knows ``tokenizer.json`` (ids and their tokens, added ones included) and ``tokenizer.model`` (its bytes). How text is
cut into tokens does not matter to it: two tokenizers that cut differently still mean the same by an id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import read_json

FAST, SLOW = "tokenizer.json", "tokenizer.model"


def difference(model: Path, draft: Path) -> str:
    """The first id that means something else in the folder ``draft`` than in ``model``; empty where all agree.

    Ids that only ``model`` has are no difference. Empty also where the folders share no kind of tokenizer file, so that
    nothing can be compared. Raises ArtifactError for a tokenizer file that cannot be read.
    """
    if all((folder / FAST).is_file() for folder in (model, draft)):
        return _first(tokens(read_json(model / FAST)), tokens(read_json(draft / FAST)))
    if all((folder / SLOW).is_file() for folder in (model, draft)):
        same = workspace.sha256_of(model / SLOW) == workspace.sha256_of(draft / SLOW)
        return "" if same else f"their files {SLOW} differ"
    return ""


def _first(model: Mapping[int, str], draft: Mapping[int, str]) -> str:
    for token_id in sorted(draft):
        ours, theirs = model.get(token_id), draft[token_id]
        if ours != theirs:
            meant = "nothing" if ours is None else repr(ours)
            return f"token {token_id} is {meant} in the model and {theirs!r} in the draft"
    return ""


def tokens(raw: Mapping[str, Any]) -> dict[int, str]:
    """Id -> token, of a parsed ``tokenizer.json``: BPE and WordPiece have a table, Unigram a list of pairs."""
    vocabulary: Any = raw.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        found = {int(token_id): str(token) for token, token_id in vocabulary.items()}
    else:
        found = {token_id: str(pair[0]) for token_id, pair in enumerate(vocabulary)}
    return found | {int(token["id"]): str(token["content"]) for token in raw.get("added_tokens") or ()}
