"""Strict YAML files that people write: YAML with the line of every key, and pydantic's complaints in our words.

Holds what every such file needs: the base of its models, the reading of YAML that keeps lines and hides no mistake, and
the wording of each problem. It does not know which files there are: the root model is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from toolchain.errors import Problem, RecipeError

_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_MAX_FILE_BYTES = 2**20

Name = Annotated[str, Field(pattern=_NAME_PATTERN, max_length=64)]
"""Of a service or an artifact: it becomes the name of a folder."""
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Few = Annotated[int, Field(ge=1, le=64)]
Text = Annotated[str, Field(min_length=1)]
M = TypeVar("M", bound=BaseModel)

Where = tuple[str | int, ...]
"""The path of a key: names, and positions in lists."""

_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "int_parsing_size": "a smaller number",
    "string_type": "text (put it in quotes)",
    "model_type": "a list of keys with values",
    "model_attributes_type": "a list of keys with values",
}


class Section(BaseModel):
    """Base of every model of such a file: no unknown keys, no conversion of types, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, title=None)


def not_a_choice(value: str, what: str, choices: Iterable[str], suggestion: str = "") -> PydanticCustomError:
    """For validators: ``value`` is not a known ``what``; ``suggestion`` is the one that was probably meant."""
    return PydanticCustomError(
        "choice",
        f"{{value}} is not a known {what}; choose one of " + ", ".join(choices),
        {"value": repr(value), "suggestion": suggestion},
    )


def read_text(path: Path, noun: str) -> str:
    """The text of a file that a person wrote. Raises RecipeError if it is no readable UTF-8 text of at most 1 MiB."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RecipeError(f"{path}: larger than 1 MiB, so it is not a {noun}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error


def has_keys(path: Path, keys: Iterable[str]) -> bool:
    """Whether a file is a YAML mapping with all of ``keys`` outermost; False for any other file, readable or not."""
    try:
        text = read_text(path, "mapping")
        if not all(key in text for key in keys):
            return False  # most files of other programs need no parsing
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (RecipeError, yaml.YAMLError, RecursionError):
        return False
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return set(keys) <= {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}


class MarkedYaml:
    """YAML -> plain data, with the line of every key and all problems that plain YAML loading would hide or raise.

    ``noun`` names the kind of file in messages, ``needs`` the keys that it cannot do without, ``example`` a line of it.
    """

    def __init__(self, file: str, *, noun: str, needs: str, example: str) -> None:
        self.file, self.noun, self.needs, self.example = file, noun, needs, example
        self.lines: dict[Where, int] = {(): 1}
        self.problems: list[Problem] = []
        self._seen: set[int] = set()
        self._loader = yaml.SafeLoader("")

    def line(self, where: Sequence[str | int]) -> int:
        """The line of a key, or of the nearest enclosing one; 1-based."""
        return next(self.lines[tuple(where[:n])] for n in range(len(where), -1, -1) if tuple(where[:n]) in self.lines)

    def problem(self, where: Sequence[str | int], message: str, suggestion: str = "") -> Problem:
        """A problem of the key at ``where``, with its file and line. It is returned, not added to ``problems``."""
        return Problem(".".join(map(str, where)), message, self.file, self.line(where), suggestion)

    def read(self, text: str) -> dict[str, Any] | None:
        """The data; None where the text is no mapping. What is wrong with the YAML is in ``problems`` afterwards."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.lines[()] = mark.line + 1 if mark else 1
            self.complain((), f"not valid YAML: {error.problem or error.context}")
            return None
        except (yaml.YAMLError, RecursionError) as error:
            self.complain((), f"not valid YAML: {str(error).splitlines()[0]}")
            return None
        if isinstance(node, yaml.MappingNode):
            self._seen.add(id(node))
            return self._mapping(node, ())
        if node is None:
            self.complain((), f"the file is empty; a {self.noun} needs at least {self.needs}")
        else:
            self.complain((), f"a {self.noun} is a list of keys with values, such as {self.example}")
        return None

    def validate(self, data: Mapping[str, Any], model: type[M]) -> M | None:
        """What ``read`` gave -> an instance of ``model``; or None, and pydantic's complaints are in ``problems``."""
        try:
            return model.model_validate(data)
        except ValidationError as error:
            told = {problem.path for problem in self.problems}
            found = [problem_of(dict(one), self, model) for one in error.errors(include_url=False)]
            self.problems += [problem for problem in found if problem.path not in told]
            return None

    def complain(self, where: Sequence[str | int], message: str) -> None:
        """Add a problem of the key at ``where``."""
        self.problems.append(self.problem(where, message))

    def error(self, hint: str) -> RecipeError:
        """All problems in the order of the file, as one error to raise."""
        ordered = sorted(self.problems, key=lambda problem: problem.line)
        count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
        return RecipeError(f"{self.file}: {count} in this {self.noun}", hint=hint, problems=ordered)

    def _value(self, node: yaml.Node, where: Where) -> Any:
        if isinstance(node, yaml.ScalarNode):
            try:
                return self._loader.construct_object(node)
            except (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError):
                self.complain(where, f"{_show(node.value)} cannot be read as {node.tag.rpartition(':')[2]}")
                return node.value
        if id(node) in self._seen:
            self.complain(where, f"anchors and aliases are not used in {self.noun}s")
            return None
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        for index, item in enumerate(node.value):
            if id(item) not in self._seen:  # an alias carries the mark of its anchor, elsewhere
                self.lines[(*where, index)] = item.start_mark.line + 1
        return [self._value(item, (*where, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        """Keys become text. A key that is left empty counts as absent, so that its default holds."""
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a key that is not a word)"
            here = (*where, key)
            if here in self.lines:
                first = self.lines[here]
                self.lines[here] = key_node.start_mark.line + 1
                self.complain(here, f"given twice, first on line {first}")
                self.lines[here] = first
                continue
            self.lines[here] = key_node.start_mark.line + 1
            value = self._value(value_node, here)
            if value is not None:
                data[key] = value
        return data


def problem_of(error: Mapping[str, Any], tree: MarkedYaml, model: type[BaseModel]) -> Problem:
    """One entry of pydantic's ``ValidationError.errors()`` -> a Problem in our words; ``model`` is the file's root."""
    where: Where = error["loc"]
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        near = get_close_matches(str(where[-1]), _keys(model, where[:-1]), n=1)
        return tree.problem(where, "unknown key", near[0] if near else "")
    if kind == "missing":
        return tree.problem(where, "is required")
    if kind == "literal_error":
        choices = _choices(model, where)
        near = get_close_matches(str(given), choices, n=1)
        listed = ", ".join(choices) or context["expected"]
        return tree.problem(where, f"{_show(given)} is not one of {listed}", near[0] if near else "")
    if kind in _TYPES:
        return tree.problem(where, f"must be {_TYPES[kind]}, not {_show(given)}")
    if kind in ("choice", "size"):
        return tree.problem(where, error["msg"], context.get("suggestion", ""))
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
        return tree.problem(where, f"must be {bound}, not {_show(given)}")
    if kind == "string_pattern_mismatch" and context["pattern"] == _NAME_PATTERN:
        return tree.problem(where, f"{_show(given)} may hold letters, digits, dots, dashes and underscores only")
    return tree.problem(where, error["msg"][:1].lower() + error["msg"][1:])


def _show(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number this large"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _model_at(root: type[BaseModel], where: Sequence[str | int]) -> type[BaseModel] | None:
    """The model of the section at ``where``; a position in a list leads to the model of the list's items."""
    model: type[BaseModel] | None = root
    for key in where:
        if isinstance(key, str):
            field = model.model_fields.get(key) if model else None
            model = _section_of(field.annotation) if field else None
    return model


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model``, ``Model | None`` or ``list[Model]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_of(inner))), None)


def _keys(root: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    model = _model_at(root, where)
    return list(model.model_fields) if model else []


def _choices(root: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """The values that a key may have, from the published schema."""
    model = _model_at(root, where[:-1])
    found = model.model_json_schema()["properties"].get(where[-1], {}) if model else {}
    options = [found, *found.get("anyOf", [])]
    return [str(value) for option in options for value in option.get("enum", [])]
