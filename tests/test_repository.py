"""Templates are rendered strictly, and a repository is only opened whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.repository import CONTENTS, Repository, placeholders, render, render_all


def test_placeholders_are_filled() -> None:
    text = 'count: ${count}\nvalue: { string_value: "${folder}" }\nflag: ${flag}'
    assert placeholders(text) == {"count", "folder", "flag"}
    assert (
        render(text, {"count": 2, "folder": "a/b", "flag": True, "unused": 1}, "x")
        == 'count: 2\nvalue: { string_value: "a/b" }\nflag: true'
    )


def test_value_cannot_break_out_of_its_quotes() -> None:
    assert render('"${x}"', {"x": 'a"b\\c'}, "x") == '"a\\"b\\\\c"'
    with pytest.raises(ArtifactError, match="one line"):
        render('"${x}"', {"x": "a\nb"}, "x")


def test_missing_value_is_refused_with_file_and_name() -> None:
    with pytest.raises(ArtifactError, match=r"some/config\.pbtxt: .*\$\{count\}"):
        render("${count}", {}, "some/config.pbtxt")


def test_parameter_that_no_template_has_is_refused_with_a_guess() -> None:
    with pytest.raises(ArtifactError, match=r"'conut' \(did you mean 'count'\?\)") as error:
        render_all({"a": "${count}", "b": "${other}"}, {"count": 1, "other": 2, "conut": 3})
    assert "count, other" in error.value.hint


def write(target: Path, contents: str | None = None) -> Path:
    with workspace.draft(target, "repository", {}) as draft:
        (draft.path / "ensemble" / "1").mkdir(parents=True)
        (draft.path / "ensemble" / "config.pbtxt").write_text("x")
        good = {"backend": "openvino", "models": ["ensemble"], "parameters": {"max_queue_size": 3}}
        (draft.path / CONTENTS).write_text(contents or json.dumps(good))
        draft.commit(versions={}, recipe="")
    return target


def test_repository_says_what_it_holds(tmp_path: Path) -> None:
    repository = Repository.open(write(tmp_path / "r"))
    assert repository.backend == "openvino"
    assert repository.models == ("ensemble",)
    assert repository.parameters == {"max_queue_size": 3}
    assert repository.stamp.stage == "repository"


def test_repository_without_a_version_folder_is_refused(tmp_path: Path) -> None:
    (write(tmp_path / "r") / "ensemble" / "1").rmdir()
    with pytest.raises(ArtifactError, match=r"ensemble/1 is missing"):
        Repository.open(tmp_path / "r")


def test_changed_configuration_is_refused(tmp_path: Path) -> None:
    (write(tmp_path / "r") / "ensemble" / "config.pbtxt").write_text("yy")
    with pytest.raises(ArtifactError, match=r"config\.pbtxt"):
        Repository.open(tmp_path / "r")


def test_repository_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a repository of this scalellm"):
        Repository.open(write(tmp_path / "r", "{}"))
    with pytest.raises(ArtifactError, match="no finished repository"):
        Repository.open(tmp_path / "nothing")
