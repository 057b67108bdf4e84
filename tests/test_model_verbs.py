"""``scalellm model`` as a person meets it: cards, packages and registries, without a server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from toolchain import accuracy, workspace
from toolchain.admission import ENGINE
from toolchain.cli import verbs
from toolchain.cli.model_endpoint import endpoint_name
from toolchain.errors import ArtifactError, EndpointError, PlanError, RecipeError, RejectedError
from toolchain.fleet.deployment import Deployment
from toolchain.recipe import parse_recipe

RECIPE = """\
# a comment that stays
device: cpu
model: some/model
name: other
quantization: {weights: int8}
limits: {max_batch_size: 2, max_seq_len: 256} # small
"""
Verb = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SCALELLM_WORK", "SCALELLM_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCALELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


@pytest.fixture
def verb(home: Path) -> Verb:
    """``verb("list")`` -> what ``scalellm model list --json`` prints; its errors are raised."""

    def run(*words: object, text: bool = False, **more: Any) -> Any:
        argv = ["model", *map(str, words), *([] if text else ["--json"])]
        done = CliRunner().invoke(verbs, argv, standalone_mode=False, **more)
        if done.exception:
            raise done.exception
        return done.output if text else json.loads(done.stdout)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def model(random_llama: Callable[..., Path]) -> Path:
    return random_llama()


def test_a_card_holds_the_whole_recipe_with_its_own_name_and_model(
    verb: Verb, home: Path, recipe: Path, model: Path
) -> None:
    said = verb("create", "-n", "mine", "-m", model, "--recipe", recipe)
    assert said["state"] == "created"
    text = Path(said["recipe"]).read_text()
    card = parse_recipe(text, Path("x.yaml"))
    assert (card.name, card.model) == ("mine", str(model))
    rest = parse_recipe(RECIPE, Path("x.yaml")).model_dump(exclude={"name", "model"})
    assert card.model_dump(exclude={"name", "model"}) == rest
    assert "# a comment that stays" in text
    assert "# small" in text
    assert [one["name"] for one in verb("list")] == ["mine"]
    assert verb("show", "mine")["recipe_text"] == verb("show", "-n", "mine")["recipe_text"] == text


@pytest.mark.parametrize(
    "style", ["{device: cpu, model: some/model, quantization: {weights: int8}}", "model:\n  some/x\ndevice: cpu\n"]
)
def test_a_recipe_in_another_style_of_yaml_is_copied_too(verb: Verb, recipe: Path, model: Path, style: str) -> None:
    recipe.write_text(style)
    text = verb("create", "-n", "true", "-m", model, "-r", recipe)["recipe_text"]
    assert parse_recipe(text, Path("x.yaml")).name == "true"
    assert parse_recipe(text, Path("x.yaml")).model == str(model)


def test_without_a_recipe_the_device_of_this_machine_is_taken(
    verb: Verb, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.machines import bare, nvidia_smi

    path = bare(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    said = verb("create", "-n", "here", "-m", model)
    assert (said["device"], parse_recipe(said["recipe_text"], Path("x.yaml")).quantization.weights) == ("cpu", "auto")
    nvidia_smi(path, "0, NVIDIA L4, GPU-1, 8.9, 590.44.01, 23034, 22000")
    assert verb("create", "-n", "there", "-m", "hf:meta-llama/Llama-2-13b-chat-hf")["device"] == "l4"


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (("-n", "../x", "-m", "MODEL"), RecipeError, "no name for a model"),
        (("-n", "x/y", "-m", "MODEL"), RecipeError, "no name for a model"),
        (("-n", "x", "-m", "./nowhere"), RecipeError, "no such folder"),
        (("-n", "x", "-m", "hf:one/two/three"), RecipeError, "no such folder"),
        (("-n", "x", "-m", "MODEL", "-r", "nonesuch"), RecipeError, "no recipe 'nonesuch'"),
        (("-n", "x", "-m", "EMPTY"), ArtifactError, "config.json"),
    ],
)
def test_what_cannot_be_a_model_is_refused_and_nothing_is_written(
    verb: Verb, home: Path, model: Path, tmp_path: Path, words: tuple[str, ...], error: type[Exception], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(model), "EMPTY": str(tmp_path / "empty")}
    with pytest.raises(error, match=told):
        verb("create", *(places.get(word, word) for word in words))
    assert not home.exists()


def test_all_problems_of_a_recipe_are_told_at_once(verb: Verb, home: Path, recipe: Path, model: Path) -> None:
    recipe.write_text("model: a/b\ndevice: rtx409\nquantisation: {}\nlimits: {max_seq_len: -1}\n")
    with pytest.raises(RecipeError) as caught:
        verb("create", "-n", "x", "-m", model, "-r", recipe)
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4]
    assert not home.exists()


def test_a_model_that_does_not_fit_is_refused_at_once(verb: Verb, home: Path) -> None:
    with pytest.raises(PlanError):
        verb("create", "-n", "x", "-m", "meta-llama/Llama-2-70b-hf", "-r", "t4")
    assert not home.exists()


@pytest.mark.parametrize("line", ["calibration: {data: my.jsonl}", "lora: [{name: one, path: my.jsonl}]"])
def test_a_recipe_with_a_relative_path_is_refused_because_a_card_is_used_anywhere(
    verb: Verb, recipe: Path, model: Path, line: str
) -> None:
    recipe.write_text(f"{RECIPE}{line}\n")
    with pytest.raises(RecipeError, match=r"my\.jsonl is relative") as caught:
        verb("create", "-n", "x", "-m", model, "-r", recipe)
    assert str(Path("my.jsonl").absolute()) in caught.value.hint


def test_a_name_is_given_once_and_only_once(verb: Verb, recipe: Path, model: Path) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    with pytest.raises(ArtifactError, match="there is a model mine already"):
        verb("create", "-n", "mine", "-m", model, "-r", recipe)
    for words in ((), ("mine", "-n", "mine")):
        with pytest.raises(click.UsageError, match="Name the model"):
            verb("show", *words)
    with pytest.raises(ArtifactError, match=r"there is no model yours.*models: mine"):
        verb("show", "yours")


def test_delete_asks_and_keeps_what_was_built(verb: Verb, home: Path, recipe: Path, model: Path) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    verb("package", "mine")
    with pytest.raises(click.UsageError, match="--yes"):
        verb("delete", "mine")
    assert verb("delete", "mine", "--yes")["freed_bytes"] == 0
    assert verb("list") == []
    assert (home / "work" / "mine" / "repository" / workspace.STAMP).exists()
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    assert verb("show", "mine")["state"] == "built"
    assert verb("delete", "mine", "--artifacts", "--yes")["freed_bytes"] > 100_000
    assert not (home / "work" / "mine").exists()
    assert not [one for one in (home / "registry").rglob("*") if one.is_file()]


def test_create_package_push_delete_pull(
    verb: Verb, home: Path, recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    with pytest.raises(ArtifactError, match="not packaged yet") as caught:
        verb("push", "mine")
    assert caught.value.hint == "scalellm model package -n mine"
    digest = verb("package", "mine")["digest"]
    assert verb("show", "mine")["state"] == "packaged"
    assert verb("package", "mine")["digest"] == digest  # nothing was made again
    monkeypatch.setenv("SCALELLM_REGISTRY", f"file://{tmp_path}/there")
    assert verb("push", "mine", "--tag", "v1")["moved_files"] > 10
    assert verb("push", "mine")["moved_files"] == 0
    with pytest.raises(ArtifactError, match="was created here"):
        verb("pull", "-n", "mine")
    verb("delete", "mine", "--yes")
    monkeypatch.setenv("SCALELLM_HOME", str(tmp_path / "home2"))
    said = verb("pull", "-n", "mine:v1")
    assert said["digest"] == digest
    told = verb("show", "mine")
    assert (told["state"], told["pulled"], told["digest"]) == ("packaged", True, digest)
    assert verb("pull", "-n", f"mine@{digest[:10]}")["moved_files"] == 0
    monkeypatch.setenv("SCALELLM_HOME", str(home))
    assert verb("pull", "-n", "mine", "--registry", tmp_path / "there")["moved_files"] == 0


def test_an_engine_that_was_found_wrong_is_neither_packaged_nor_deployed(
    verb: Verb, home: Path, recipe: Path, model: Path
) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    verb("package", "mine")
    repository = home / "work" / "mine" / "repository"
    stamp = workspace.read_stamp(repository)
    assert stamp is not None
    accuracy.write_verdict(repository, accuracy.digest_of(stamp.files, ENGINE), passed=False, summary="garbage")
    for words in (("package", "mine"), ("deploy", "mine", "--local")):
        with pytest.raises(RejectedError, match="found wrong: garbage"):
            verb(*words)
    said = verb("package", "mine", "--allow-unverified")
    assert "found wrong" in said["unverified"]
    package = ["package", "-r", str(home / "models/mine/recipe.yaml"), "-w", str(home / "work")]
    for words in (package, [*package, "--allow-unverified"]):
        done = CliRunner().invoke(verbs, words, standalone_mode=False)
        assert isinstance(done.exception, RejectedError) == (words is package)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--local", "--replicas", "2"), "--replicas does not go with --local"),
        (("--local", "--deployment", "x.yaml"), "--deployment does not go with --local"),
        (("--server", "path"), "--server goes with --local"),
    ],
)
def test_flags_of_one_way_to_deploy_are_refused_for_the_other(verb: Verb, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        verb("deploy", "-n", "mine", *words)


def test_a_deployment_must_name_the_model(verb: Verb, recipe: Path, model: Path, tmp_path: Path) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    file = tmp_path / "DEPLOYMENT.yaml"
    file.write_text("endpoint: mine\nrecipes: [tiny]\n")
    with pytest.raises(RecipeError, match=r"recipes: mine is none of them \(tiny\)"):
        verb("deploy", "-n", "mine", "--deployment", file)


@pytest.mark.parametrize(("name", "endpoint"), [("llama", "llama"), ("Llama_2.13B", "llama-2-13b"), ("7b", "m-7b")])
def test_a_models_endpoint_has_a_name_that_dynamo_takes(name: str, endpoint: str) -> None:
    assert endpoint_name(name) == endpoint
    assert Deployment(endpoint=endpoint, recipes=(name,)).endpoint == endpoint


def test_a_model_that_is_not_deployed_cannot_be_asked(verb: Verb, recipe: Path, model: Path) -> None:
    verb("create", "-n", "mine", "-m", model, "-r", recipe)
    with pytest.raises(EndpointError, match="mine is not deployed") as caught:
        verb("run", "-n", "mine", "Hello")
    assert caught.value.hint == "scalellm model deploy -n mine --local"
    assert verb("undeploy", "mine") == {"name": "mine", "stopped": False}


def test_the_home_is_where_xdg_says(scalellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    for env in ({"XDG_DATA_HOME": str(tmp_path)}, {"HOME": str(tmp_path), "XDG_DATA_HOME": ""}):
        done = scalellm("model", "list", SCALELLM_HOME="", **env)
        folder = tmp_path / "scalellm" if env["XDG_DATA_HOME"] else tmp_path / ".local" / "share" / "scalellm"
        assert f"There are no models in {folder}." in done.stdout
        assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["create", "list", "show", "delete", "package", "push", "pull", "deploy", "undeploy", "run"]
)
def test_every_verb_has_help_with_an_example(verb: Verb, name: str) -> None:
    assert f"scalellm model {name}" in verb(name, "--help", text=True).split("Example")[1]
