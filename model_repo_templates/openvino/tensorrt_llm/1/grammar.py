"""A guide in the words of OpenVINO GenAI 2026.4, whose compiler of grammars is xgrammar."""

from __future__ import annotations

import openvino_genai as genai

_FIELDS = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}


def grammar(kind: str, text: str) -> genai.StructuredOutputConfig:
    """One of ``guides.guide``."""
    config = genai.StructuredOutputConfig()
    setattr(config, _FIELDS[kind], text)
    return config
