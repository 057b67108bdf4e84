"""Promises about chat templates, held against transformers' own rendering of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chatml import write_chatml_tokenizer
from toolchain.chat import ChatTemplate
from toolchain.errors import ArtifactError, RejectedError

TALK = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "  Grüße, 世界!  "},
    {"role": "assistant", "content": "Good morning."},
    {"role": "user", "content": 'Say "a\\b".'},
]
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "blocks and loop controls": (
        "{{ bos_token }}\n{%- for m in messages %}\n    {% if m.role == 'system' %}\n    {% continue %}\n"
        "    {% endif %}\n"
        "    {% set c = m.content | trim %}\n[{{ loop.index0 }}|{{ m.role }}] {{ c }}{{ eos_token }}\n"
        "{% if loop.index0 == 2 %}{% break %}{% endif %}\n{% endfor %}"
    ),
    "json and generation": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "unknown names are empty": "{{ tools }}{% if documents is defined %}D{% endif %}{{ pad_token }}|{{ bos_token }}|x",
}


def folder_with(folder: Path, template: Any, *, as_file: bool = False) -> Path:
    write_chatml_tokenizer(folder, ["Be kind. Good morning."])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if as_file:
        (folder / "chat_template.jinja").write_text(template)
        template = "the file counts, not this"
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path, messages: list[dict[str, str]]) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(tmp_path: Path, name: str, as_file: bool) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name], as_file=as_file)
    assert ChatTemplate.of(folder).render(TALK) == by_transformers(folder, TALK)


def test_of_several_named_templates_the_default_counts(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    folder = folder_with(tmp_path, named)
    assert ChatTemplate.of(folder).render(TALK) == by_transformers(folder, TALK) == TALK[0]["content"]


def test_without_a_template_a_conversation_is_llama_2s(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of(folder)
    assert not template.own
    assert template.render(TALK[:2]) == "<s>[INST] <<SYS>>\nBe <kind> & brief.\n<</SYS>>\n\nGrüße, 世界! [/INST]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ raise_exception('not like this') }}",
        "{{ messages[99].content.x }}",
    ],
)
def test_a_template_that_fails_or_wants_out_of_its_sandbox_is_a_refusal(tmp_path: Path, template: str) -> None:
    with pytest.raises(RejectedError, match="chat template refuses"):
        ChatTemplate.of(folder_with(tmp_path, template)).render(TALK)


def test_a_broken_template_is_refused_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="chat template is not valid"):
        ChatTemplate.of(folder_with(tmp_path, "{% for m in messages %}"))
