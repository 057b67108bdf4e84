"""What every export promises, whatever reads it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.exports import golden
from tests.exports.conftest import FLAGS, Export
from tests.exports.packages import DEPLOYMENT, push
from toolchain.cli import verbs
from toolchain.device import prices
from toolchain.errors import ArtifactError, PlanError, RecipeError, ScalellmError
from toolchain.exports import FORMATS
from toolchain.recipe import find_recipe

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize("format_", FORMATS)
def test_what_runs_is_pinned_by_its_whole_digest(export: Export, format_: str, registry: Path) -> None:
    (manifest,) = (registry / "models" / "rtx4090" / "manifests").iterdir()
    pinned = f"rtx4090@{manifest.stem}"
    found = export(format_, DEPLOYMENT, *FLAGS[format_], raw=True)
    texts = [text for name, text in found.items() if name != "README.md"]
    assert any(pinned in text for text in texts)
    assert not any(re.search(r"rtx4090:latest", text) for text in texts)


@pytest.mark.parametrize("format_", FORMATS)
def test_image_is_nvidias_of_the_release_that_built_the_engine(export: Export, format_: str, registry: Path) -> None:
    push(registry, "rtx4090", device="rtx4090", sm=89, release="1.0.0")
    found = export(format_, DEPLOYMENT, *FLAGS[format_])
    assert found["told"]["images"] == {"rtx4090": "nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3"}
    named = export(format_, DEPLOYMENT, *FLAGS[format_], "--image", "rtx4090=mine/triton:1", "--force", raw=True)
    text = "".join(named.values())
    assert "mine/triton:1" in text
    assert "nvcr.io" not in text


@pytest.mark.parametrize("format_", FORMATS)
def test_no_secret_gets_into_a_file(export: Export, format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "SCALELLM_API_KEY", "SCALELLM_GATEWAY_KEYS"):
        monkeypatch.setenv(name, SECRET)
    CliRunner().invoke(verbs, ["gateway", "keys", "add", "me", "--keys", "gateway-keys.json"], standalone_mode=False)
    hashed = re.findall(r"[0-9a-f]{32,}", Path("gateway-keys.json").read_text())
    text = "".join(export(format_, DEPLOYMENT, *FLAGS[format_], raw=True).values())
    assert hashed
    assert not [word for word in (SECRET, *hashed) if word in text]


@pytest.mark.parametrize("format_", FORMATS)
def test_an_address_with_a_password_is_refused_without_showing_it(export: Export, format_: str) -> None:
    with pytest.raises(ScalellmError) as found:
        export(format_, DEPLOYMENT, "--registry", f"memory://me:{SECRET}@host/models")
    assert SECRET not in found.value.message + found.value.hint
    assert not Path("out").exists()


def test_where_scalellm_comes_from_must_be_said_because_no_index_has_it(tmp_path: Path, registry: Path) -> None:
    (tmp_path / "D.yaml").write_text(DEPLOYMENT)
    argv = ["deploy", "export", "compose", str(tmp_path / "D.yaml"), "-o", str(tmp_path / "out"), "--registry"]
    done = CliRunner().invoke(verbs, [*argv, str(registry)], standalone_mode=False)
    assert isinstance(done.exception, RecipeError)
    assert "scalellm-toolchain[gateway] @ https://" in done.exception.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", FORMATS)
def test_an_image_that_has_scalellm_gets_no_pip(export: Export, format_: str) -> None:
    found = export(format_, DEPLOYMENT, *FLAGS[format_], "--install", "none", raw=True)
    texts = [text for name, text in found.items() if name != "README.md"]
    assert not [text for text in texts if "pip" in text or "venv" in text]


def test_a_package_of_another_recipe_is_refused_with_what_differs(export: Export, tmp_path: Path) -> None:
    text = find_recipe("rtx4090").read_text().replace("max_batch_size: 16", "max_batch_size: 32")
    (tmp_path / "rtx4090.yaml").write_text(text)
    with pytest.raises(ArtifactError, match=r"built from another recipe.*max_batch_size") as found:
        export("compose", DEPLOYMENT.replace("[rtx4090]", "[./rtx4090.yaml]"))
    assert "scalellm model package -n rtx4090" in found.value.hint


def test_a_package_may_have_another_name_than_its_recipe(export: Export, registry: Path) -> None:
    manifests = registry / "models" / "rtx4090" / "manifests"
    (digest,) = (file.stem for file in manifests.iterdir())
    found = export("compose", DEPLOYMENT, "--package", f"rtx4090=rtx4090@{digest[:12]}")
    assert found["told"]["packages"] == {"rtx4090": f"rtx4090@{digest}"}
    with pytest.raises(RecipeError, match="--package l4=x: 'l4' is not in this deployment"):
        export("compose", DEPLOYMENT, "--package", "l4=x")


def test_a_recipe_without_a_package_says_how_one_gets_there(export: Export) -> None:
    with pytest.raises(ArtifactError, match="there is no h100:latest in this registry") as found:
        export("compose", DEPLOYMENT.replace("rtx4090", "h100"))
    assert "scalellm model push -n h100" in found.value.hint


def test_an_image_whose_python_is_too_old_for_scalellm_is_refused(export: Export, registry: Path) -> None:
    push(registry, "t4", device="t4", sm=75, release="0.13.0")
    with pytest.raises(PlanError, match=r"24\.09-trtllm-python-py3 has Python 3\.10, and scalellm needs 3\.11"):
        export("compose", DEPLOYMENT.replace("rtx4090", "t4"))


def test_an_engine_without_an_image_of_its_own_needs_one_named(export: Export, registry: Path) -> None:
    push(registry, "cpu", device="cpu", sm=None, release=None)
    text = DEPLOYMENT.replace("rtx4090", "cpu")
    with pytest.raises(PlanError, match="no image is known") as found:
        export("compose", text)
    assert "--image" in found.value.hint
    compose = export("compose", text, "--image", "python:3.12-slim")["compose.yaml"]
    assert "deploy" not in compose["services"]["triton-1"]  # no GPU


def test_replicas_take_the_recipes_in_turn(export: Export) -> None:
    text = DEPLOYMENT.replace("[rtx4090]", "[rtx4090, l4, rtx4090]").replace("{min: 2, max: 6}", "{min: 4, max: 7}")
    found = export("kubernetes", text, "--claim", "models")
    numbers = {
        kind: [found[f"autoscaler-{kind}.yaml"]["spec"][key] for key in ("minReplicas", "maxReplicas")]
        for kind in ("rtx4090", "l4")
    }
    assert numbers == {"rtx4090": [3, 5], "l4": [1, 2]}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_that_somebody_changed_is_not_written_over(export: Export, format_: str, tmp_path: Path) -> None:
    flags = FLAGS[format_]
    before = export(format_, DEPLOYMENT, *flags, raw=True)
    assert export(format_, DEPLOYMENT, *flags, raw=True) == before  # the same again is no change
    name = next(name for name in sorted(before) if name.endswith(".yaml"))
    (tmp_path / "out" / "mine.txt").write_text("stays")
    (tmp_path / "out" / name).write_text("changed")
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)}.* would be another text"):
        export(format_, DEPLOYMENT.replace("max_queue: 100", "max_queue: 7"), *flags)
    now = {one: (tmp_path / "out" / one).read_text() for one in before}
    assert now == {**before, name: "changed"}  # nothing was written, the other files neither
    assert export(format_, DEPLOYMENT, *flags, "--force", raw=True) == before
    assert (tmp_path / "out" / "mine.txt").read_text() == "stays"


@pytest.mark.parametrize("format_", FORMATS)
def test_every_command_line_of_ours_is_one_that_scalellm_takes(export: Export, format_: str) -> None:
    """Read by the same parser, in whatever file and language it stands."""
    found = export(format_, DEPLOYMENT, *FLAGS[format_])
    lines = [words for words in _argvs(found) if words[0].endswith("/scalellm")]
    assert {words[1] for words in lines} >= {"model", "serve"}
    for words in lines:
        command: click.Command = verbs
        rest = words[1:]
        while isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context("scalellm", rest, resilient_parsing=False).close()


def _argvs(found: object) -> list[list[str]]:
    """Every list of words, and every line of a script, in plain data."""
    if isinstance(found, dict):
        return [argv for name, value in found.items() if name != "README.md" for argv in _argvs(value)]
    if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        script = [line for one in found if "\n" in one for line in one.splitlines()]
        return [found, *(shlex.split(line) for line in script if not line.startswith((" ", "case")))]
    if isinstance(found, list):
        return [argv for value in found for argv in _argvs(value)]
    if isinstance(found, str) and found.startswith("set -e\n"):
        lines = [line.removeprefix("exec ") for line in found.splitlines() if "scalellm " in line]
        return [shlex.split(line) for line in lines]
    return []


def test_a_budget_that_pays_for_too_little_is_refused_with_the_price(export: Export, tmp_path: Path) -> None:
    cheapest = min(row.usd_per_hour for row in prices("rtx4090"))
    text = DEPLOYMENT.replace("max_price_per_hour: 4.5", f"max_price_per_hour: {cheapest / 2}")
    with pytest.raises(PlanError, match="does not pay for 2 replicas") as found:
        export("skyserve", text, *FLAGS["skyserve"])
    assert "max_price_per_hour: " in found.value.hint
    assert not (tmp_path / "out").exists()


def test_prices_are_those_of_skypilots_catalog_where_it_is_on_this_machine(export: Export, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".sky" / "catalogs" / "v8" / "vast"
    folder.mkdir(parents=True)
    (folder / "vms.csv").write_text(
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice\n"
        "one,RTX4090,1.0,16,64,0.41,NL,,0.22\n"
        "other,RTX4090,1.0,16,64,0.39,US,,\n"
        "two,RTX4090,2.0,16,64,0.10,US,,0.05\n"
        ",RTX4090,1.0,,,0.01,US,,0.01\n"
    )
    offers = export("skyserve", DEPLOYMENT, *FLAGS["skyserve"])["told"]["offers"]
    assert [(one["kind"], one["usd_per_hour"], one["region"]) for one in offers] == [
        ("spot", 0.22, "NL"),
        ("on-demand", 0.39, "US"),
    ]
    assert os.environ["HOME"] == str(tmp_path / "home")


def test_prices_of_our_table_are_of_all_gpus_of_a_replica(export: Export, registry: Path) -> None:
    one = {
        row["kind"]: row["usd_per_hour"] for row in export("skyserve", DEPLOYMENT, *FLAGS["skyserve"])["told"]["offers"]
    }
    push(registry, "rtx4090", device="rtx4090", sm=89, gpus=2)
    two = export("skyserve", DEPLOYMENT, *FLAGS["skyserve"], "--force")["told"]["offers"]
    assert {row["kind"]: row["usd_per_hour"] for row in two} == {kind: 2 * usd for kind, usd in one.items()}


@pytest.mark.parametrize("format_", FORMATS)
def test_one_deployment_becomes_exactly_these_files(format_: str) -> None:
    folder = golden.HERE / format_
    there = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert golden.files(format_) == there, "if this is what you meant: python -m tests.exports.golden"


@pytest.mark.parametrize("format_", FORMATS)
def test_what_another_system_is_not_told_stands_in_the_readme(export: Export, format_: str) -> None:
    text = DEPLOYMENT + "conformance: true\nports: {grpc: 9001}\n"
    told = export(format_, text, *FLAGS[format_])["README.md"]
    assert "- conformance: " in told
    assert "- ports.grpc: " in told
    assert "- ports.grpc: " not in export(format_, DEPLOYMENT, *FLAGS[format_], "--force")["README.md"]
