"""What `serve` refuses before it starts anything: another recipe, GPU or release, and answers that nobody verified."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SCALELLM
from tests.engine_folder import write_engine
from tests.machines import bare, environment, nvidia_smi, trtllm_build
from toolchain import accuracy, workspace
from toolchain.admission import ENGINE, Admission, Asked, admit
from toolchain.errors import ArtifactError, RejectedError
from toolchain.recipe import Recipe, parse_recipe
from toolchain.stages.package import package

TEXT = """\
# why: comments are for people
name: parrot
model: some/model
device: rtx4090
quantization: {weights: int4}
limits: {max_batch_size: 8, max_seq_len: 256}
serve: {http_port: 9000}
"""
ADA = "0, NVIDIA GeForce RTX 4090, GPU-1, 8.9, 590.44.01, 24564, 24000"
T4 = "0, Tesla T4, GPU-2, 7.5, 590.44.01, 15360, 15000"


def recipe(text: str = TEXT) -> Recipe:
    return parse_recipe(text, Path("parrot.yaml"))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder on PATH: a machine that shows no GPU and has no TensorRT-LLM."""
    folder = bare(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return folder


def repository_of(folder: Path, release: str = "1.2.1", text: str = TEXT, **passport: Any) -> Path:
    """What build and package leave in ``folder``."""
    engine = write_engine(folder / "engine", release, **passport)
    with workspace.draft(folder / "repository", "repository", {}) as draft:
        for name, digest in package(engine, draft.path).items():
            draft.known_hash(name, digest)
        draft.commit(versions={}, recipe=text)
    return folder / "repository"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return repository_of(tmp_path / "work")


def asked(text: str = TEXT, **more: Any) -> Asked:
    return Asked("parrot", recipe(text), **more)


def test_the_right_repository_is_admitted_without_a_word(path: Path, repository: Path) -> None:
    nvidia_smi(path, f"{T4}\n{ADA}".replace("0, NVIDIA", "1, NVIDIA"))
    trtllm_build(path, "1.2.1")
    assert admit(repository, asked(), environment(path)) == Admission()
    assert admit(repository, Asked(), environment(path)) == Admission()


def test_a_repository_that_others_wrote_is_admitted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert admit(tmp_path, asked()) == Admission()


class TestRecipe:
    """The text that was built against the one that is named now."""

    @pytest.mark.parametrize(
        "changed",
        [
            TEXT.replace("# why: comments are for people", "# another comment"),
            TEXT.replace("9000", "9001"),
            TEXT + "description: for people\n",
            TEXT.replace("{weights: int4}", "{weights: int4, group_size: 128}"),
        ],
    )
    def test_what_changes_nothing_that_was_built_is_admitted(self, path: Path, repository: Path, changed: str) -> None:
        assert admit(repository, asked(changed)) == Admission()

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            (TEXT.replace("int4", "fp8"), "quantization.weights was int4, is fp8"),
            (TEXT.replace("rtx4090", "l4"), "device was rtx4090, is l4"),
            (TEXT + "kv_cache: {dtype: int8}\n", "kv_cache.dtype was fp16, is int8"),
            (TEXT.replace("256", "512"), "limits.max_seq_len was 256, is 512"),
        ],
    )
    def test_what_changes_the_engine_is_refused_with_the_rebuild(
        self, path: Path, repository: Path, changed: str, told: str
    ) -> None:
        with pytest.raises(ArtifactError, match=told) as caught:
            admit(repository, asked(changed))
        assert caught.value.hint == "scalellm build --recipe parrot"

    def test_a_recipe_of_several_devices_is_compared_for_the_one_that_is_served(
        self, path: Path, tmp_path: Path
    ) -> None:
        several = TEXT + "per_device: {t4: {limits: {max_batch_size: 2}}}\n"
        repository = repository_of(tmp_path / "l4", text=several, device="l4")
        other = several.replace("max_batch_size: 2", "max_batch_size: 4")  # of the T4
        assert admit(repository, asked(other, target="l4")) == Admission()
        with pytest.raises(ArtifactError, match="max_batch_size was 2, is 4") as caught:
            admit(repository, asked(other, target="t4"))
        assert caught.value.hint == "scalellm build --recipe parrot --device t4"


class TestEngine:
    """GPU, release and the engine's own configuration."""

    def test_an_engine_of_another_sm_is_refused_with_the_rebuild_for_this_gpu(
        self, path: Path, repository: Path
    ) -> None:
        nvidia_smi(path, T4)
        with pytest.raises(ArtifactError, match=r"built for SM 89 \(rtx4090\).*Tesla T4 \(SM 75\)") as caught:
            admit(repository, asked())
        assert caught.value.hint.startswith("scalellm build --recipe parrot --device t4")

    def test_a_gpu_that_the_table_does_not_have_is_refused_too(self, path: Path, repository: Path) -> None:
        nvidia_smi(path, T4.replace("Tesla T4", "Quadro RTX 6000"))
        with pytest.raises(ArtifactError) as caught:
            admit(repository, Asked())
        assert caught.value.hint == "A machine with SM 89, such as the rtx4090"

    def test_without_a_visible_gpu_nothing_is_said_of_it(self, path: Path, repository: Path) -> None:
        assert admit(repository, asked()) == Admission()

    def test_an_engine_of_another_release_than_the_installed_one_is_refused(self, path: Path, repository: Path) -> None:
        trtllm_build(path, "1.1.0")
        with pytest.raises(ArtifactError, match=r"built by TensorRT-LLM 1\.2\.1.*installed here is 1\.1\.0") as caught:
            admit(repository, asked(), environment(path))
        assert "--server container   # in tritonserver:26.07-trtllm-python-py3" in caught.value.hint
        assert 'tensorrt_llm: "1.1.0"' in caught.value.hint
        assert admit(repository, asked(own_tensorrt_llm=False), environment(path)) == Admission()  # a container's own

    def test_weights_that_a_runtime_reads_are_bound_to_no_gpu(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "tensorrt_llm" / "1" / "engine").mkdir(parents=True)
        passport = json.loads((repository_of(tmp_path / "one") / ENGINE / "engine.json").read_text())
        file = tmp_path / ENGINE / "engine.json"
        file.write_text(json.dumps(passport | {"backend": "tensorrt_llmapi"}))
        nvidia_smi(path, T4)
        trtllm_build(path, "1.1.0")
        assert admit(tmp_path, Asked(), environment(path)) == Admission()

    def test_a_build_after_the_release_is_the_release(self, path: Path, tmp_path: Path) -> None:
        trtllm_build(path, "0.17.0.post1")
        assert admit(repository_of(tmp_path / "old", "0.17.0"), asked(), environment(path)) == Admission()

    def test_an_engine_whose_own_version_is_another_is_refused(self, path: Path, repository: Path) -> None:
        file = repository / ENGINE / "config.json"
        changed = json.loads(file.read_text()) | {"version": "1.1.0"}
        file.unlink()
        file.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=r"version is 1\.1\.0, the passport says 1\.2\.1"):
            admit(repository, asked())


class TestGate:
    """Answers that must be verified before anybody relies on them."""

    @pytest.fixture
    def required(self, path: Path, tmp_path: Path) -> Path:
        return repository_of(tmp_path / "t4", "0.13.0", gate="required", device="t4", sm=75)

    def verdict(self, repository: Path, passed: bool) -> None:
        engine = repository.parent / "engine"
        stamp = workspace.require(engine, "engine")
        digest = accuracy.digest_of(stamp.files)
        accuracy.write_verdict(engine, digest, passed=passed, summary="12 of 12 answers equal")

    def test_a_required_gate_is_closed_until_somebody_looked(self, required: Path) -> None:
        with pytest.raises(RejectedError, match="never verified, and the plan of parrot requires that") as caught:
            admit(required, Asked())
        assert "--allow-unverified" in caught.value.hint
        self.verdict(required, passed=True)
        assert admit(required, Asked()).unverified == ""
        assert "12 of 12 answers equal" in admit(required, Asked()).notes[0]

    def test_a_bad_verdict_closes_it_whatever_the_plan_said(self, path: Path, repository: Path) -> None:
        self.verdict(repository, passed=False)
        with pytest.raises(RejectedError, match="found wrong: 12 of 12"):
            admit(repository, asked())

    def test_whoever_insists_is_told_and_the_service_says_so(self, required: Path) -> None:
        admitted = admit(required, Asked(allow_unverified=True))
        assert admitted.unverified == "its answers were never verified"
        assert "--allow-unverified" in admitted.notes[0]

    def test_an_advised_gate_is_a_note(self, path: Path, tmp_path: Path) -> None:
        repository = repository_of(tmp_path / "advised", gate="advised")
        assert admit(repository, Asked()) == Admission(
            ("its answers were not verified, which is advised for this engine",)
        )

    def test_accept_in_the_recipe_requires_a_verdict_too(self, path: Path, tmp_path: Path) -> None:
        text = TEXT + "accept: {kl: 0.01}\n"
        repository = repository_of(tmp_path / "one", text=text)
        for request in (asked(text), Asked()):
            with pytest.raises(RejectedError, match="never verified, and accept in the recipe requires that") as caught:
                admit(repository, request)
            assert "scalellm verify --recipe parrot" in caught.value.hint
        self.verdict(repository, passed=True)
        assert admit(repository, asked(text)).unverified == ""

    def test_a_recipe_that_accepts_less_than_what_was_found_closes_it_again(self, path: Path, tmp_path: Path) -> None:
        repository = repository_of(tmp_path / "one")
        engine = repository.parent / "engine"
        digest = accuracy.digest_of(workspace.require(engine, "engine").files)
        part = {"passed": True, "summary": "", "measures": {"kl": {"value": 0.02, "error": 0.001}}}
        accuracy.write_verdict(engine, digest, passed=True, summary="fine", measured={"weights": part})
        assert admit(repository, asked(TEXT + "accept: {kl: 0.03}\n")).unverified == ""
        strict = asked(TEXT + "accept: {kl: 0.01}\n")
        with pytest.raises(RejectedError, match=r"accepts less now: kl is 0\.02, and accept says 0\.01 at most"):
            admit(repository, strict)

    def test_the_verdict_on_another_engine_says_nothing(self, required: Path, repository: Path) -> None:
        self.verdict(repository, passed=True)  # lies in another folder, on another engine
        for file in repository.parent.glob("accuracy-*"):
            (required.parent / file.name).write_text(file.read_text())
        with pytest.raises(RejectedError):
            admit(required, Asked())


def test_serve_refuses_as_a_person_meets_it(path: Path, tmp_path: Path) -> None:
    repository = repository_of(tmp_path / "t4", "0.13.0", gate="required", device="t4", sm=75)
    argv = [str(SCALELLM), "serve", "--repository", str(repository), "--server", "path"]
    run: Callable[..., Any] = subprocess.run
    done = run(argv, env=environment(path), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7
    assert "never verified" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(
        [*argv, "--allow-unverified"], env=environment(path), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 4  # no tritonserver here: it went on to look for one
    assert "note: --allow-unverified: its answers were never verified" in done.stderr
