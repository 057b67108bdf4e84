"""Promises about recipes: found by name, read strictly, and every problem told at once with its line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.device import devices
from toolchain.errors import RecipeError
from toolchain.problems import MarkedYaml, Name, Port, Section
from toolchain.quantization import KV, METHODS, WEIGHTS
from toolchain.recipe import Recipe, available, load_recipe, parse_recipe, schema
from toolchain.release import backends

GOOD = "model: some/folder\ndevice: rtx4090\n"
FILE = Path("mine.yaml")


def problems(text: str) -> list[str]:
    """Every problem of a text, as a person reads it."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, FILE)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def only(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def test_smallest_recipe_has_the_documented_defaults() -> None:
    recipe = parse_recipe(GOOD, FILE)
    assert (recipe.name, recipe.path, recipe.text) == ("mine", FILE, GOOD)
    assert (recipe.quantization.weights, recipe.quantization.group_size, recipe.quantization.scales) == (
        "none",
        128,
        "mse",
    )
    assert (recipe.kv_cache.dtype, recipe.limits.max_batch_size, recipe.services) == ("fp16", 8, 1)
    assert (recipe.serve.host, recipe.serve.http_port, recipe.serve.grpc_port) == ("127.0.0.1", 8000, 8001)
    assert recipe.backend is None
    assert (recipe.quantization.method, recipe.quantization.clip) == ("rtn", False)
    assert (recipe.quantization.fp8_scales, recipe.quantization.propagate) == ("shared", "clean")
    assert recipe.calibration.model_dump() == {"data": "builtin", "samples": 64, "tokens": 256, "chat_template": True}
    assert recipe.parallel.tp == recipe.parallel.pp == 1


def test_device_may_be_written_as_people_write_it() -> None:
    assert parse_recipe("model: m\ndevice: RTX 4090", FILE).device == "rtx4090"


FIVE_MISTAKES = """\
# a comment
model: some/folder
device: rtx4099
quantization:
  weights: int-4
  group_sise: 64

limits:
  max_batch_size: "8"
  max_seq_len: 1024
  max_input_len: 2048
"""


def test_recipe_with_five_mistakes_reports_all_five_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FIVE_MISTAKES)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    found = [(p.line, p.path, p.suggestion) for p in caught.value.problems]
    assert found == [
        (3, "device", "rtx4090"),
        (5, "quantization.weights", "int4"),
        (6, "quantization.group_sise", "group_size"),
        (9, "limits.max_batch_size", ""),
        (11, "limits.max_input_len", ""),
    ]
    assert all(p.file == str(file) for p in caught.value.problems)
    assert "5 problems" in caught.value.message
    assert str(caught.value.problems[3]).endswith(":9: limits.max_batch_size: must be a whole number, not '8'")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mine.yaml:1: the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "list of keys with values"),
        ("just words", "list of keys with values"),
        ("model: [a\ndevice: t4", "mine.yaml:2: not valid YAML"),
        ("model: m\n\tdevice: t4", "mine.yaml:2: not valid YAML"),
        ("model: m\n---\nmodel: n\n", "not valid YAML: but found another document"),
        ("model: \x00", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        (GOOD + "model: other\n", "mine.yaml:3: model: given twice, first on line 1"),
        (
            GOOD + "limits:\n  max_seq_len: 1\n  max_seq_len: 2\n",
            ":5: limits.max_seq_len: given twice, first on line 4",
        ),
        (GOOD + "quantisation: {}\n", "quantisation: unknown key (did you mean 'quantization'?)"),
        (GOOD + "1: 2\n", ":3: 1: unknown key"),
        (GOOD + "? [a]\n: 2\n", ":3: (a key that is not a word): unknown key"),
        (GOOD + "limits: 3\n", "limits: must be a list of keys with values, not 3"),
        (GOOD + "services: true\n", "services: must be a whole number, not True"),
        (GOOD + "services: 1.0\n", "services: must be a whole number, not 1.0"),
        (GOOD + "services: 0\n", "services: must be at least 1, not 0"),
        (GOOD + f"services: {'9' * 5000}\n", "cannot be read as int"),
        (GOOD + "serve: {http_port: 70000}\n", "serve.http_port: must be at most 65535"),
        (GOOD + "serve: {http_port: 8001}\n", "http_port and grpc_port are both 8001"),
        (GOOD + "tensorrt_llm: 1.2\n", "tensorrt_llm: must be text (put it in quotes), not 1.2"),
        (GOOD + 'tensorrt_llm: "1.2.2"\n', "(did you mean '1.2.1'?)"),
        (GOOD + "backend: tensorrt-engine\n", "(did you mean 'tensorrt_engine'?)"),
        (GOOD + "kv_cache: {dtype: f8}\n", "is not one of fp16, auto, int8, fp8, fp32 (did you mean 'fp8'?)"),
        (GOOD + "kv_cache: {size: lots}\n", "kv_cache.size: 'lots' is not a size; write it as 2GiB"),
        (GOOD + f"kv_cache: {{size: '{'9' * 400}GiB'}}\n", "is not a size"),
        (GOOD + "kv_cache: {size: 1GiB, max_tokens: 4096}\n", "give max_tokens or size, not both"),
        (GOOD + "kv_cache: {max_tokens: 10}\nlimits: {max_seq_len: 20}\n", "holds not even one sequence"),
        (GOOD + "quantization: {group_size: 64}\n", "quantization.group_size: only with weights: int4"),
        (GOOD + "quantization: {weights: fp8, scales: mse}\n", "quantization.scales: only with weights: int4"),
        (GOOD + "quantization: {weights: int4, group_size: 48}\n", "48 is not one of 32, 64, 128"),
        (GOOD + "quantization: {weights: fp8, method: awq}\n", "quantization.method: only with weights: int4"),
        (GOOD + "quantization: {method: rtn}\n", "quantization.method: only with weights: int4"),
        (GOOD + "quantization: {weights: int4, method: awk}\n", "not one of rtn, awq, gptq (did you mean 'awq'?)"),
        (GOOD + "quantization: {weights: int4, clip: true}\n", "quantization.clip: only with method: awq"),
        (GOOD + "quantization: {weights: int4, method: gptq, clip: true}\n", "clip: only with method: awq"),
        (GOOD + "quantization: {weights: fp8, clip: true}\n", "quantization.clip: only with weights: int4"),
        (GOOD + "quantization: {weights: int4, method: awq, clip: 1}\n", "clip: must be true or false, not 1"),
        (GOOD + "quantization: {weights: int4, fp8_scales: shared}\n", "fp8_scales: only with weights: fp8"),
        (
            GOOD + "quantization:\n  weights: int4_fp8\n  group_size: 64\n",
            ":5: quantization.group_size: only 128 with weights: int4_fp8",
        ),
        (GOOD + "quantization: {weights: int8, group_size: 128}\n", "only with weights: int4 or int4_fp8"),
        (GOOD + "quantization: {weights: int4_fp8, method: gptq}\n", "quantization.method: only with weights: int4"),
        (GOOD + "quantization: {weights: int8_sq, clip: true}\n", "clip: only with weights: int4 or int4_fp8"),
        (GOOD + "quantization: {weights: int8, smoothquant_alpha: 0.5}\n", "only with weights: int8_sq"),
        (
            GOOD + "quantization: {weights: int8_sq, smoothquant_alpha: 1.5}\n",
            ":3: quantization.smoothquant_alpha: must",
        ),
        (GOOD + "quantization: {weights: int8_sq, smoothquant_alpha: .nan}\n", "quantization.smoothquant_alpha: must"),
        (GOOD + "quantization: {weights: int8_sq, smoothquant_alpha: half}\n", "smoothquant_alpha: must be a number"),
        (GOOD + "quantization: {weights: int8_qs}\n", "(did you mean 'int8_sq'?)"),
        (GOOD + "quantization: {propagate: clean}\n", "quantization.propagate: only with weights: fp8 or int4"),
        (GOOD + "calibration: {data: chats.csv}\n", "'chats.csv' is not one of builtin, hf:ORG/NAME or a file"),
        (GOOD + "calibration: {data: 'hf:'}\n", "calibration.data: 'hf:' is not one of builtin"),
        (GOOD + "calibration: {samples: 0}\n", "calibration.samples: must be at least 1, not 0"),
        (GOOD + "calibration: {token: 9}\n", "calibration.token: unknown key (did you mean 'tokens'?)"),
        (GOOD + "calibration: {chat_template: 'yes'}\n", "chat_template: must be true or false, not 'yes'"),
        (GOOD + "kv_cache: {sinks: 4}\n", "mine.yaml:3: kv_cache.sinks: only with window"),
        (GOOD + "kv_cache: {window: 4, sinks: 4}\n", "kv_cache.sinks: 4 sinks fill the window of 4"),
        (GOOD + "kv_cache: {window: 512}\nlimits: {max_seq_len: 512}\n", "kv_cache.window: 512 hides nothing"),
        (GOOD + "kv_cache: {window: 0}\n", "kv_cache.window: must be at least 1, not 0"),
        (
            GOOD + "speculative: {tokens: 4}\n",
            "mine.yaml:3: speculative: give draft: FOLDER (a small model) or lookup: 3",
        ),
        (GOOD + "speculative: {draft: d, lookup: 3}\n", "speculative.lookup: give draft or lookup, not both"),
        (GOOD + "speculative: {lookup: 17}\n", "speculative.lookup: must be at most 16, not 17"),
        (GOOD + "speculative: {lookup: true}\n", "speculative.lookup: must be"),
        (GOOD + "kv_cache: {reuse: 1}\n", "kv_cache.reuse: must be true or false, not 1"),
        (GOOD + "speculative: {draft: d, tokens: 0}\n", "speculative.tokens: must be at least 1, not 0"),
        (GOOD + "speculative: {draft: d, tokens: 33}\n", "speculative.tokens: must be at most 32, not 33"),
        (GOOD + "speculative: {draft: d, token: 4}\n", "speculative.token: unknown key (did you mean 'tokens'?)"),
        (GOOD + "cpu: {threads: 2}\n", "mine.yaml:3: cpu: only with device: cpu, not rtx4090"),
        (GOOD + "name: not a name\n", "name: 'not a name' may hold letters"),
        (GOOD + "name: ../../up\n", "name: '../../up' may hold letters"),
        (GOOD + "limits: &a {max_seq_len: 9}\nserve: *a\n", "anchors and aliases are not used in recipes"),
        (GOOD + "services: !!python/object:os.system 1\n", "cannot be read as"),
        ("device: t4\n", "mine.yaml:1: model: is required"),
        ("model:\ndevice: t4\n", "mine.yaml:1: model: is required"),
    ],
)
def test_mistake_is_told_with_its_line_and_what_was_meant(text: str, said: str) -> None:
    assert said in only(text)


@pytest.mark.parametrize("data", ["builtin", "hf:org/name", "chats.jsonl", "~/some/Book.TXT", "/data/a.parquet"])
def test_calibration_takes_the_built_in_set_files_and_the_hub(data: str) -> None:
    assert parse_recipe(f"{GOOD}calibration: {{data: {data}}}", FILE).calibration.data == data


@pytest.mark.parametrize(
    "text",
    [
        "{weights: int8, propagate: quantized}",
        "{weights: int8_sq, smoothquant_alpha: 0.8}",
        "{weights: int8_sq, smoothquant_alpha: 1}",
        "{weights: int4_fp8, clip: true, scales: modelopt, group_size: 128}",
    ],
)
def test_keys_of_the_eight_bit_formats_are_taken(text: str) -> None:
    recipe = parse_recipe(f"{GOOD}quantization: {text}\n", FILE)
    assert recipe.quantization.weights in text
    assert parse_recipe(GOOD + "quantization: {weights: int8_sq}\n", FILE).quantization.smoothquant_alpha == 0.5


def test_section_that_is_left_empty_keeps_its_defaults() -> None:
    assert parse_recipe(GOOD + "limits:\nserve:\n", FILE).limits.max_batch_size == 8


def test_alias_that_contains_itself_is_refused_and_does_not_hang() -> None:
    assert any("anchors and aliases" in line for line in problems("&a {model: *a}"))


# -- another strict file ----------------------------------------------------------------------------------------------


class Node(Section):
    device: Name
    mode: Literal["fast", "small"] = "fast"
    port: Port = 8000


class Deployment(Section):
    nodes: list[Node]
    main: Node | None = None


def test_another_strict_file_gets_the_same_problems_from_its_own_model() -> None:
    text = "nodes:\n- device: a\n- devise: b\n  mode: fsat\nmain:\n  device: a b\n  port: 0\n"
    tree = MarkedYaml("fleet.yaml", noun="deployment", needs="nodes", example="nodes: []")
    data = tree.read(text)
    assert data is not None
    assert tree.validate(data, Deployment) is None
    error = tree.error("look")
    assert error.message == "fleet.yaml: 5 problems in this deployment"
    assert [str(problem) for problem in error.problems] == [
        "fleet.yaml:3: nodes.1.device: is required",
        "fleet.yaml:3: nodes.1.devise: unknown key (did you mean 'device'?)",
        "fleet.yaml:4: nodes.1.mode: 'fsat' is not one of fast, small (did you mean 'fast'?)",
        "fleet.yaml:6: main.device: 'a b' may hold letters, digits, dots, dashes and underscores only",
        "fleet.yaml:7: main.port: must be at least 1, not 0",
    ]


def test_another_strict_file_that_is_empty_is_told_what_it_needs() -> None:
    tree = MarkedYaml("fleet.yaml", noun="deployment", needs="nodes", example="nodes: []")
    assert tree.read("") is None
    assert str(tree.error("").problems[0]) == "fleet.yaml:1: the file is empty; a deployment needs at least nodes"


# -- finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["mine", "mine.yaml", "./mine.yaml"])
def test_recipe_is_found_here_by_name_and_by_path(here: Path, name: str) -> None:
    (here / "mine.yaml").write_text(GOOD)
    assert load_recipe(name).name == "mine"


def test_own_recipe_hides_the_shipped_one_of_the_same_name(here: Path) -> None:
    assert load_recipe("tiny").device == "cpu"
    (here / "recipes" / "tiny.yaml").write_text(GOOD)
    assert load_recipe("tiny").device == "rtx4090"
    (here / "tiny.yml").write_text("model: m\ndevice: t4\n")
    assert load_recipe("tiny").device == "t4"


STRAYS = {
    "docker-compose.yml": "services:\n  web:\n    image: models/device\n    devices: []\n",
    "nested.yaml": "job:\n  model: m\n  device: t4\n",
    "list.yaml": "- model\n- device\n",
    "broken.yaml": "model: [m\ndevice: t4\n",
    "bytes.yaml": b"model: \xff\ndevice: t4\n",
    "huge.yaml": b"model: m\ndevice: t4\n" + b"#" * 2**20,
}


def test_yaml_files_of_other_programs_here_are_not_listed_as_recipes(here: Path) -> None:
    shipped = set(available())
    for name, text in STRAYS.items():
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (here / "mine.yaml").write_text("{device: t4, model: m, a_typo: 1}")
    assert set(available()) == shipped | {"mine"}
    with pytest.raises(RecipeError) as caught:
        load_recipe("docker-compos")
    assert "docker-compose" not in caught.value.message + caught.value.hint


def test_every_yaml_file_in_the_recipes_folder_is_listed(here: Path) -> None:
    for name in STRAYS:
        (here / "recipes" / name).write_text("")
    assert {Path(name).stem for name in STRAYS} <= set(available())


def test_own_recipe_that_lacks_a_key_is_refused_and_not_passed_over_for_the_shipped_one(here: Path) -> None:
    (here / "tiny.yaml").write_text("model: m\n")
    with pytest.raises(RecipeError, match=r"tiny\.yaml: 1 problem"):
        load_recipe("tiny")


def test_unknown_recipe_gets_the_nearest_name_and_the_list(here: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'rtx4090'") as caught:
        load_recipe("rtx4099")
    assert "a100-x3" in caught.value.hint
    with pytest.raises(RecipeError, match="no recipe 'sub/rtx4090'"):
        load_recipe("sub/rtx4090")


def test_search_replaces_the_usual_folders(here: Path) -> None:
    (here / "only.yaml").write_text(GOOD)
    assert set(available([here])) == {"only"}
    with pytest.raises(RecipeError):
        load_recipe("tiny", search=[here])


def test_folder_of_the_same_name_is_not_taken_for_a_recipe(here: Path) -> None:
    (here / "tiny").mkdir()
    (here / "tiny.yaml").mkdir()
    assert load_recipe("tiny").device == "cpu"


def test_file_that_is_not_text_or_not_readable_is_refused_by_name(here: Path) -> None:
    (here / "bytes.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"bytes\.yaml: not a text file"):
        load_recipe("bytes")
    (here / "huge.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match=r"huge\.yaml: larger than 1 MiB"):
        load_recipe("huge")
    if os.getuid():
        (here / "locked.yaml").write_text(GOOD)
        (here / "locked.yaml").chmod(0)
        with pytest.raises(RecipeError, match=r"locked\.yaml: cannot be read"):
            load_recipe("locked")


# -- schema -----------------------------------------------------------------------------------------------------------


def _described(node: Any) -> list[str]:
    """Names of properties without a description, anywhere in the schema."""
    found = []
    for name, entry in node.get("properties", {}).items():
        if not entry.get("description"):
            found.append(name)
    for entry in node.get("$defs", {}).values():
        found += _described(entry)
    return found


def test_schema_describes_every_key_and_takes_no_others() -> None:
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert _described(schema()) == []
    assert schema()["additionalProperties"] is False
    assert all(entry["additionalProperties"] is False for entry in schema()["$defs"].values())
    assert set(schema()["required"]) == {"model", "device"}


def test_choices_of_the_schema_are_those_of_the_facts() -> None:
    parts = schema()["$defs"]
    assert set(parts["Quantization"]["properties"]["weights"]["enum"]) == {*WEIGHTS, "auto"}
    assert set(parts["Quantization"]["properties"]["method"]["enum"]) == set(METHODS)
    assert set(parts["KvCache"]["properties"]["dtype"]["enum"]) == {*KV, "auto"}
    assert set(parts["Quantization"]["properties"]["group_size"]["enum"]) == set(WEIGHTS["int4"].group_sizes)
    assert set(schema()["properties"]["backend"]["anyOf"][0]["enum"]) == set(backends())
    assert schema()["properties"]["device"]["anyOf"][0]["enum"] == list(devices())


def _values(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema allows."""
    if "$ref" in node:
        return _values(schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return st.one_of([_values(option) for option in node["anyOf"]])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    kind = node.get("type")
    if kind == "object" and "properties" not in node:
        keys = st.sampled_from([*devices(), "RTX 4090", "no device"])
        return st.dictionaries(keys, _values(node["additionalProperties"]), max_size=2)
    if kind == "object":
        required = {k: _values(v) for k, v in node["properties"].items() if k in node.get("required", [])}
        optional = {k: _values(v) for k, v in node["properties"].items() if k not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if kind == "integer":
        return st.integers(node["minimum"], node["maximum"])
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if "pattern" in node:
        return st.from_regex(node["pattern"], fullmatch=True)
    examples = node.get("examples", [])
    return st.one_of(st.sampled_from(examples), st.text(min_size=1)) if examples else st.text(min_size=1)


def _read(text: str) -> Recipe | None:
    try:
        return parse_recipe(text, FILE)
    except RecipeError as error:
        told = error.problems
    assert told
    assert all(problem.line >= 1 and problem.message for problem in told)
    return None


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_the_schema_allows_is_a_recipe_or_a_list_of_problems(data: st.DataObject) -> None:
    wanted = data.draw(_values(schema()))
    recipe = _read(yaml.safe_dump(wanted))  # escaped: PyYAML writes a bare U+0085, then reads it as a line break
    if recipe is not None:
        assert recipe.model == wanted["model"]
        assert recipe.device in devices()


@settings(max_examples=80, deadline=None)
@given(st.text())
def test_any_text_at_all_is_a_recipe_or_a_list_of_problems(text: str) -> None:
    _read(text)
    _read(GOOD + text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(Recipe.model_fields)), JSON)
def test_any_value_under_any_key_is_a_recipe_or_a_list_of_problems(key: str, value: Any) -> None:
    _read(yaml.safe_dump({"model": "m", "device": "t4", key: value}, allow_unicode=True))
