"""What a package of a model promises: its digest, its papers, and who is not packed, pulled or trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.registry.packages import sha256
from tests.test_admission import TEXT, repository_of
from toolchain import accuracy, running, workspace
from toolchain.admission import ENGINE, Asked, check_engine
from toolchain.engine import Engine
from toolchain.errors import ArtifactError, RecipeError, RejectedError
from toolchain.pipeline.packing import check_foreign, install, is_packed, pack, passport_in, standing
from toolchain.progress import Silent
from toolchain.registry import Card, FileEntry, Folder, Manifest, Reference, card, deployment, pull, push
from toolchain.registry.transfer import blob_path

ACCEPT = TEXT + "accept: {kl: 0.05}\n"


def built(tmp_path: Path, text: str = TEXT, **passport: Any) -> Card:
    """A model whose repository is there, as after a build."""
    found = card.create(tmp_path / "home", "parrot", text, tmp_path / "work")
    repository_of(tmp_path / "work" / "parrot", text=text, **passport)
    return found


def packed(model: Card, **more: Any) -> Manifest:
    return pack(model, card.registry_of(model.home), **more)[0]


def judged(repository: Path, *, passed: bool) -> None:
    stamp = workspace.read_stamp(repository)
    assert stamp is not None
    measured = {"weights": {"measures": {"kl": {"value": 0.01 if passed else 3.0, "error": None}}}}
    digest = accuracy.digest_of(stamp.files, ENGINE)
    accuracy.write_verdict(repository, digest, passed=passed, summary="kl 0.01", measured=measured)


def moved(model: Card, manifest: Manifest, home: Path) -> Card:
    """The model in another home, by way of a registry."""
    there = Folder(home.parent / "there")
    push(manifest, card.registry_of(model.home), there, Silent())
    meant, target = Reference.parse("parrot"), card.registry_of(home)
    got = pull(meant, there, target, Silent(), check=lambda one: check_foreign(one, "there"))
    return install(home, got.manifest, card.registry_of(home))


def test_the_same_model_has_the_same_digest_and_a_changed_one_another(tmp_path: Path) -> None:
    model = built(tmp_path)
    first = packed(model)
    assert packed(model).digest == first.digest
    judged(model.repository, passed=True)
    assert packed(model).digest != first.digest


def test_a_package_holds_repository_card_recipe_passport_and_verdict(tmp_path: Path) -> None:
    model = built(tmp_path)
    judged(model.repository, passed=True)
    manifest = packed(model)
    papers = {path for path in manifest.files if not path.startswith("repository/")}
    stamp = workspace.read_stamp(model.repository)
    assert stamp is not None
    verdict = accuracy.file_of(model.repository, accuracy.digest_of(stamp.files, ENGINE)).name
    assert papers == {"card.json", "recipe.yaml", "passport.json", verdict}
    for path in model.repository.rglob("*"):
        if path.is_file():
            entry = manifest.files[f"repository/{path.relative_to(model.repository).as_posix()}"]
            assert (entry.sha256, entry.size) == (sha256(path.read_bytes()), path.stat().st_size)


def test_a_pulled_model_is_the_one_that_was_packed(tmp_path: Path) -> None:
    model = built(tmp_path)
    judged(model.repository, passed=True)
    manifest = packed(model)
    other = moved(model, manifest, tmp_path / "home2")
    stamp = workspace.read_stamp(other.repository)
    assert stamp is not None
    assert workspace.damage(other.repository, stamp) is None
    assert other.work is None
    assert str(tmp_path / "work") not in (other.folder / "card.json").read_text()
    assert passport_in(other)["verdict"]["passed"]
    told = standing(other.home, "parrot")
    assert (told.state, told.verified, told.pulled) == ("verified", True, True)
    assert told.digest == manifest.digest == standing(model.home, "parrot").digest


def test_editing_a_pulled_recipe_does_not_change_the_package(tmp_path: Path) -> None:
    model = built(tmp_path)
    other = moved(model, packed(model), tmp_path / "home2")
    with other.recipe_file.open("a") as stream:
        stream.write("description: mine\n")
    again = pull(Reference.parse("parrot"), Folder(tmp_path / "there"), card.registry_of(other.home), Silent())
    assert again.files == 0


def test_a_recipe_that_was_edited_since_the_build_is_not_packed_with_it(tmp_path: Path) -> None:
    model = built(tmp_path)
    model.recipe_file.write_text(TEXT.replace("256", "128"))
    with pytest.raises(ArtifactError, match="max_seq_len was 256, is 128"):
        packed(model)


@pytest.mark.parametrize(
    ("text", "passport", "verdict", "told"),
    [
        (ACCEPT, {}, None, "never verified, and accept in the recipe requires that"),
        (TEXT, {"gate": "required"}, None, "never verified, and the plan of parrot requires that"),
        (TEXT, {}, False, "found wrong"),
        (ACCEPT.replace("0.05", "0.001"), {}, True, "accepts less now"),
    ],
)
def test_what_failed_or_was_not_verified_is_not_packed_unless_it_says_so(
    tmp_path: Path, text: str, passport: dict[str, Any], verdict: bool | None, told: str
) -> None:
    model = built(tmp_path, text, **passport)
    if verdict is not None:
        judged(model.repository, passed=verdict)
    with pytest.raises(RejectedError, match=told) as caught:
        packed(model)
    assert f"scalellm verify --recipe {model.recipe_file} --work {tmp_path / 'work'}" in caught.value.hint
    assert not card.registry_of(model.home).root.exists()
    with pytest.raises(RejectedError, match=told):  # its verdict lies beside the engine, too
        check_engine(Engine.open(tmp_path / "work/parrot/engine"), Asked("parrot", model.recipe))
    manifest = packed(model, allow_unverified=True)
    passport_file = card.registry_of(model.home).path(blob_path(manifest.files["passport.json"].sha256))
    assert json.loads(passport_file.read_text())["unverified"]
    assert passport_in(moved(model, manifest, tmp_path / "home2"))["unverified"]


def test_a_verified_model_is_packed_without_a_word(tmp_path: Path) -> None:
    model = built(tmp_path, ACCEPT)
    judged(model.repository, passed=True)
    _, admission = pack(model, card.registry_of(model.home))
    assert not admission.unverified


def _with(manifest: Manifest, store: Folder, path: str, data: bytes) -> Manifest:
    store.write(blob_path(sha256(data)), data)
    return Manifest(manifest.name, {**manifest.files, path: FileEntry(len(data), sha256(data))}, manifest.created)


@pytest.mark.parametrize("path", ["repository/tensorrt_llm_bls/1/model.py", "repository/other/1/model.py"])
def test_a_package_with_code_of_others_is_refused_before_it_is_fetched(tmp_path: Path, path: str) -> None:
    model = built(tmp_path)
    manifest = _with(packed(model), card.registry_of(model.home), path, b"import os\n")
    with pytest.raises(RejectedError, match=r"brings code that is not this scalellm's.*model\.py"):
        moved(model, manifest, tmp_path / "home2")
    assert not (tmp_path / "home2").exists()


Forged = Callable[[Manifest, Folder], Manifest]


@pytest.mark.parametrize(
    "forged",
    [
        lambda one, store: _with(one, store, "repository/tensorrt_llm/1/engine/rank0.engine", b"other weights"),
        lambda one, store: _with(one, store, "repository/extra/config.pbtxt", b"name: 'extra'"),
        lambda one, store: _with(one, store, "card.json", b'{"format": "scalellm-card/1", "name": "x", "created": ""}'),
        lambda one, store: _with(one, store, "recipe.yaml", b"name: x\nmodel: a/b\ndevice: cpu\n"),
        lambda one, store: _with(one, store, "recipe.yaml", b"no recipe"),
    ],
)
def test_a_package_whose_parts_do_not_belong_together_changes_nothing(tmp_path: Path, forged: Forged) -> None:
    """A verdict is found by the stamp: a stamp of other files would lend it to them."""
    model = built(tmp_path)
    manifest = forged(packed(model), card.registry_of(model.home))
    with pytest.raises((ArtifactError, RecipeError)):
        moved(model, manifest, tmp_path / "home2")
    assert card.names(tmp_path / "home2") == []
    assert list((tmp_path / "home2" / "models").iterdir()) == []


def test_a_build_after_packing_is_told(tmp_path: Path) -> None:
    model = built(tmp_path)
    packed(model)
    assert is_packed(model)
    assert standing(model.home, "parrot").state == "packaged"
    model.recipe_file.write_text(TEXT.replace("256", "128"))
    told = standing(model.home, "parrot")
    assert (told.state, told.built, told.packaged) == ("created", False, False)
    model.recipe_file.write_text(TEXT + "# only a comment\n")
    assert standing(model.home, "parrot").state == "packaged"


def test_a_damaged_card_or_recipe_is_listed_as_that(tmp_path: Path) -> None:
    model = built(tmp_path)
    model.recipe_file.write_text("name: parrot\n")
    assert standing(model.home, "parrot").state == "damaged"
    (model.folder / "card.json").write_text("{")
    assert "card.json" in standing(model.home, "parrot").problem


HOLDER = """
import sys, time
from pathlib import Path
from toolchain.registry import card, deployment
with deployment.hold(card.read(Path(sys.argv[1]), "parrot")):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(model: Card) -> Iterator[subprocess.Popen[str]]:
    """A process that deploys a model, as far as others can see."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(model.home)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_model_is_deployed_for_as_long_as_its_process_lives(tmp_path: Path) -> None:
    model = built(tmp_path)
    assert deployment.deployed(model) is None
    with holder(model) as process:
        found = deployment.deployed(model)
        assert found is not None
        assert (found.pid, found.ready) == (process.pid, False)
        with pytest.raises(ArtifactError, match=f"is deployed .pid {process.pid}"), deployment.hold(model):
            pass
        assert standing(model.home, "parrot").state == "deployed"
    assert (model.folder / running.STATE).exists()  # what a kill leaves counts for nothing
    assert deployment.deployed(model) is None
    assert not deployment.stop(model)


def test_stop_asks_a_deployment_to_end_and_waits_for_it(tmp_path: Path) -> None:
    model = built(tmp_path)
    with holder(model) as process:
        assert deployment.stop(model, timeout_s=20)
        assert process.wait(5) != 0
    assert deployment.deployed(model) is None
