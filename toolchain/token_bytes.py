"""Which bytes each token of a Hugging Face tokenizer stands for: what a grammar of answers must know.

Reads ``tokenizer.json`` (or lets transformers make its contents of a SentencePiece model) and looks at its ``decoder``.
Three ways of writing bytes are known: byte-level BPE (GPT-2, Llama 3, Qwen2), SentencePiece's ``▁`` with ``<0x0A>``
for single bytes (Llama 2, Mistral), and ``▁`` alone. How text is cut into tokens does not matter here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError
from toolchain.vocabulary import FAST as FILE
from toolchain.vocabulary import SLOW, tokens

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def tokenizer_text(folder: Path) -> str:
    """The text of ``tokenizer.json``; for a folder that has only ``tokenizer.model``, as transformers would write it.

    Raises ArtifactError where there is neither.
    """
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    if not (folder / SLOW).is_file():
        raise ArtifactError(f"{folder}: neither {FILE} nor {SLOW} is here", hint="Copy it beside the model")
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer.to_str())


def token_bytes(raw: Mapping[str, Any], size: int) -> list[bytes]:
    """The parsed ``tokenizer.json`` -> the bytes of the ids 0 to ``size`` - 1.

    Empty for ids without a token and for special ones, which no grammar may use. Raises ArtifactError for a decoder
    that writes bytes another way.
    """
    written = _writer(raw)
    special = {int(one["id"]) for one in raw.get("added_tokens") or () if one.get("special")}
    added = {int(one["id"]) for one in raw.get("added_tokens") or ()}
    found = [b""] * size
    for token_id, token in tokens(raw).items():
        if token_id < size and token_id not in special:
            found[token_id] = token.encode() if token_id in added else written(token)
    return found


def _writer(raw: Mapping[str, Any]) -> Callable[[str], bytes]:
    """A token -> its bytes, as the file's decoder has it."""
    steps = {str(step["type"]): step for step in _steps(raw.get("decoder") or {})}
    if "ByteLevel" in steps:
        table = _byte_level()
        return lambda token: bytes(table[letter] for letter in token) if set(token) <= set(table) else token.encode()
    fallback, space = "ByteFallback" in steps, _space(steps)
    if space is None:
        raise ArtifactError(
            f"{FILE}: a decoder of {', '.join(steps) or 'no steps'} is not known, so tokens have no bytes",
            hint="Leave guided_decoding out of the recipe",
        )

    def write(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()

    return write


def _space(steps: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The letter that stands for a space."""
    if "Metaspace" in steps:
        return str(steps["Metaspace"].get("replacement", "▁"))
    replace = steps.get("Replace", {})
    return str(replace["pattern"]["String"]) if replace.get("content") == " " else None


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _byte_level() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable ones stand for themselves, the others for U+0100 and on, in order.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (read 2026-11).
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def parse(text: str) -> dict[str, Any]:
    """The text of ``tokenizer.json`` as JSON. Raises ArtifactError."""
    try:
        found = json.loads(text)
        if isinstance(found, dict) and "vocab" in found["model"]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ArtifactError(f"{FILE}: not a tokenizer of Hugging Face's tokenizers", hint="Copy it again")


def xgrammar_info(text: str, stop_ids: Sequence[int]) -> dict[str, Any]:
    """What xgrammar in TensorRT-LLM's C++ runtime reads instead of a tokenizer: ``xgrammar_tokenizer_info.json``.

    ``text`` is that of ``tokenizer.json``. The tokens are in the order of their ids. Source: NVIDIA/TensorRT-LLM
    tensorrt_llm/llmapi/tokenizer.py ``_xgrammar_tokenizer_info`` (which examples/generate_xgrammar_tokenizer_info.py
    writes), read by triton_backend inflight_batcher_llm/src/model_instance_state.cc (1.x, 2026-11).
    """
    found = tokens(parse(text))
    return {
        "encoded_vocab": [found[token_id] for token_id in sorted(found)],
        "tokenizer_str": text,
        "stop_token_ids": list(stop_ids),
    }
