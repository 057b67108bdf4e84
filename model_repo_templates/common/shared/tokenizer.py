"""A Hugging Face tokenizer folder as three verbs: encode, decode, and the ids that matter.

``tokenizer.json`` is read with the ``tokenizers`` library alone: the same Rust code that transformers wraps, without
the seconds and the hundreds of MiB that importing transformers (and torch with it) costs each of Triton's processes.
Folders without that file (SentencePiece only) go through ``transformers.AutoTokenizer``. Code from the folder is never
run. It knows nothing of Triton.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tokenizer:
    """A tokenizer folder. ``bos_id``, ``eos_id`` and ``pad_id`` are None where the folder names none (pad: eos)."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError when the folder holds no tokenizer."""
        self._config = _read(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            self._backend: _Backend = _Fast(folder)
        elif (folder / "tokenizer.model").is_file():
            self._backend = _Slow(folder)
        else:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model is here")
        names = {**_read(folder / "special_tokens_map.json"), **self._config}
        self.bos_id = self._id_of(names.get("bos_token"))
        self.eos_id = self._id_of(names.get("eos_token"))
        pad_id = self._id_of(names.get("pad_token"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = self._backend.vocab_size()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Text -> ids. With ``special``, BOS stands in front exactly once if this tokenizer uses one, also where the
        text itself already begins with it (a chat prompt, say)."""
        ids = self._backend.encode(text, special)
        if not special or self.bos_id is None:
            return ids
        while ids[:2] == [self.bos_id, self.bos_id]:
            ids = ids[1:]
        wanted = self._config.get("add_bos_token")
        if wanted is True and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Ids -> text, nothing cleaned up. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special)

    def _id_of(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return self._backend.id_of(text) if isinstance(text, str) else None


class _Backend:
    """What the two libraries have in common."""

    def encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: list[int], skip_special: bool) -> str:
        raise NotImplementedError

    def id_of(self, token: str) -> int | None:
        raise NotImplementedError

    def vocab_size(self) -> int:
        raise NotImplementedError


class _Fast(_Backend):
    def __init__(self, folder: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        extra = [
            tokenizers.AddedToken(entry["content"], special=True)
            for _id, entry in sorted(added.items(), key=lambda item: int(item[0]))
            if entry.get("special") and entry["content"] not in known
        ]
        self._tokenizer.add_special_tokens(extra)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int | None:
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))


class _Slow(_Backend):
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, legacy=False)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.get_vocab().get(token)

    def vocab_size(self) -> int:
        return len(self._tokenizer)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
