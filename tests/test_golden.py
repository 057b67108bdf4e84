"""Each shipped recipe with each release becomes exactly the files in ``golden``, or is refused as there."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests import golden

AGAIN = "if this is what you meant: python -m tests.golden"


@pytest.mark.parametrize("release", golden.RELEASES)
@pytest.mark.parametrize("name", golden.recipes())
def test_shipped_recipe_becomes_this_command_checkpoint_and_repository(name: str, release: str) -> None:
    body, shared = golden.text(name, release)
    assert body == (golden.HERE / name / f"{release}.txt").read_text(encoding="utf-8"), AGAIN
    for file, part in shared.items():
        assert part == (golden.HERE / file).read_text(encoding="utf-8"), AGAIN


@pytest.mark.parametrize("name", [*golden.recipes(), *golden.VARIED])
def test_recipe_has_this_plan(name: str) -> None:
    assert golden.plan_text(name) == (golden.HERE / "plans" / f"{name}.txt").read_text(encoding="utf-8"), AGAIN


def test_no_golden_file_is_left_over() -> None:
    there = {str(file.relative_to(golden.HERE)) for kind in ("*/*.txt", "*/*.pbtxt") for file in golden.HERE.glob(kind)}
    assert there == {file for file, _ in golden.everything()}, AGAIN


@pytest.mark.parametrize("file", sorted(golden.HERE.glob("models/*.pbtxt")), ids=lambda file: file.stem)
def test_each_configuration_is_one_that_triton_reads(file: Path) -> None:
    found = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    assert found.input
    assert found.output


def test_what_no_release_can_do_is_refused_in_words() -> None:
    """The T4 has no release after 0.13, a CPU none at all."""
    for name, release in (("t4", "0.16.0"), ("t4", "1.2.1"), ("cpu", "1.2.1"), ("llama2-13b@t4", "0.17.0")):
        assert (golden.HERE / name / f"{release}.txt").read_text().startswith("refused: ")
    for name, release in (("t4", "0.13.0"), ("rtx4090", "1.2.1"), ("a100-x3", "0.12.0")):
        assert (golden.HERE / name / f"{release}.txt").read_text().startswith("== trtllm-build\n")
