"""Artifacts: whole or absent, whatever happens to the process or to the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain import workspace
from toolchain.errors import ArtifactError

INPUTS = {"kv": {"dtype": "int8"}, "group": 128}


def make(target: Path, inputs: dict[str, Any] | None = None, **files: str) -> workspace.Stamp:
    with workspace.draft(target, "quantize", inputs or INPUTS) as draft:
        for name, text in files.items():
            (draft.path / name).write_text(text)
        return draft.commit(versions={"scalellm": "1"}, recipe="model: x\n")


def interrupted(target: Path, inputs: dict[str, Any], work: Callable[[workspace.Draft], object]) -> None:
    """Do some of the work on a draft, and be interrupted by Ctrl-C."""
    with workspace.draft(target, "quantize", inputs) as draft:
        work(draft)
        raise KeyboardInterrupt


def partials(target: Path) -> list[Path]:
    return list(target.parent.glob(f"{target.name}.partial-*"))


# --- stamps and keys -------------------------------------------------------------------------------------------------


def test_a_committed_artifact_is_stamped_and_intact(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    stamp = make(target, weights="abc", config="{}")
    assert workspace.read_stamp(target) == workspace.require(target, "quantize") == stamp
    assert stamp.key == workspace.key_of(INPUTS)
    assert stamp.inputs == INPUTS
    assert set(stamp.files) == {"weights", "config"}
    assert stamp.files["weights"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (stamp.recipe, stamp.versions) == ("model: x\n", {"scalellm": "1"})
    assert sorted(path.name for path in target.iterdir()) == ["config", "stamp.json", "weights"]
    assert not partials(target)


def test_files_in_subfolders_are_stamped_too(tmp_path: Path) -> None:
    with workspace.draft(tmp_path / "repo", "package", INPUTS) as draft:
        (draft.path / "ensemble" / "1").mkdir(parents=True)
        (draft.path / "ensemble" / "config.pbtxt").write_text("name: x")
        stamp = draft.commit(versions={}, recipe="")
    assert list(stamp.files) == ["ensemble/config.pbtxt"]


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers())))
def test_keys_do_not_depend_on_the_order_of_names(inputs: dict[str, Any]) -> None:
    assert workspace.key_of(inputs) == workspace.key_of(dict(reversed(inputs.items())))
    assert workspace.key_of(inputs) != workspace.key_of({**inputs, "one more": 1})


def test_differences_are_said_in_words() -> None:
    new = {"kv": {"dtype": "fp8"}, "scales": "mse"}
    said = list(workspace.differences(INPUTS, new))
    assert said == ["group was 128, is absent", "kv.dtype was int8, is fp8", "scales was absent, is mse"]


def test_a_missing_a_foreign_and_a_broken_stamp(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert workspace.current(target) is None
    with pytest.raises(ArtifactError, match="no finished quantize"):
        workspace.require(target, "quantize")
    make(target, weights="abc")
    with pytest.raises(ArtifactError, match="this is a quantize, not a engine"):
        workspace.require(target, "engine")
    for damaged in ("{", "[]", '{"files": {"a": {}}}'):
        (target / "stamp.json").write_text(damaged)
        with pytest.raises(ArtifactError, match=r"stamp\.json: this stamp is damaged") as caught:
            workspace.read_stamp(target)
        assert str(target) in caught.value.hint


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damage_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "model"
    stamp = make(target, weights="abcdef", config="{}")
    file = target / "weights"
    assert workspace.damage(target, stamp) is None

    file.write_text("abcdeX")
    assert str(file) in (workspace.damage(target, stamp) or "")
    with pytest.raises(ArtifactError, match="corrupted"):
        workspace.require(target, "quantize")

    os.truncate(file, 3)
    assert f"{file} has 3 bytes, not 6" in (workspace.damage(target, stamp) or "")

    file.unlink()
    assert workspace.damage(target, stamp) == f"{file} is missing"


def test_a_copied_artifact_is_intact_though_its_time_stamps_are_new(tmp_path: Path) -> None:
    stamp = make(tmp_path / "model", weights="abcdef")
    os.utime(tmp_path / "model" / "weights", (1, 1))
    assert workspace.damage(tmp_path / "model", stamp) is None


# --- drafts ----------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_nothing_when_nothing_was_journaled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        interrupted(target, INPUTS, lambda draft: (draft.path / "half").write_text("x"))
    assert not target.exists()
    assert not partials(target)


def test_a_failure_after_a_record_is_resumed_with_the_same_inputs_only(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def first(draft: workspace.Draft) -> None:
        (draft.path / "layer0").write_text("x")
        draft.record({"layer": 0})

    with pytest.raises(KeyboardInterrupt):
        interrupted(target, INPUTS, first)
    assert workspace.current(target) is None
    with workspace.draft(target, "quantize", INPUTS) as draft:
        assert draft.journal() == [{"layer": 0}]
        assert (draft.path / "layer0").read_text() == "x"
        draft.record({"layer": 1})
        stamp = draft.commit(versions={}, recipe="")
    assert list(stamp.files) == ["layer0"]
    assert not (target / workspace.JOURNAL).exists()

    with pytest.raises(KeyboardInterrupt):
        interrupted(target, {"other": 1}, lambda draft: draft.record({"journal": draft.journal()}))
    (partial,) = partials(target)
    assert json.loads((partial / workspace.JOURNAL).read_text()) == {"journal": []}
    with workspace.draft(target, "quantize", {"third": 1}) as draft:
        assert draft.journal() == []
        assert partials(target) == [draft.path]
        draft.commit(versions={}, recipe="")


def test_a_torn_journal_line_costs_that_entry_and_none_after_it(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def torn(draft: workspace.Draft) -> None:
        draft.record({"layer": 0})
        with (draft.path / workspace.JOURNAL).open("ab") as stream:
            stream.write('{"layer": 1, "é'.encode()[:-1])

    for work in (torn, lambda draft: draft.record({"layer": 2}), lambda draft: draft.record({"layer": 3})):
        with pytest.raises(KeyboardInterrupt):
            interrupted(target, INPUTS, work)
    with workspace.draft(target, "quantize", INPUTS) as draft:
        assert draft.journal() == [{"layer": 0}, {"layer": 2}, {"layer": 3}]
        draft.commit(versions={}, recipe="")


def test_a_known_hash_is_stamped_without_reading_the_file_again(tmp_path: Path) -> None:
    with workspace.draft(tmp_path / "model", "quantize", INPUTS) as draft:
        (draft.path / "weights").write_text("abc")
        draft.known_hash("weights", "f" * 64)
        assert draft.commit(versions={}, recipe="").files["weights"].sha256 == "f" * 64


def test_a_new_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    make(target, weights="old", gone="x")
    stamp = make(target, {"kv": 2}, weights="new")
    assert list(stamp.files) == ["weights"]
    assert (target / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


# --- other processes, and kill -9 ------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from toolchain import workspace
with workspace.draft(Path(sys.argv[1]), "quantize", {"a": 1}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_at_work_is_named_and_its_death_frees_the_place(tmp_path: Path, root: Path) -> None:
    target, pipe = tmp_path / "model", subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], cwd=root, stdin=pipe, stdout=pipe)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ArtifactError, match=rf"pid {holder.pid}\)"), workspace.draft(target, "quantize", INPUTS):
            pass
    finally:
        holder.kill()
        holder.communicate()
    make(target, weights="x")
    assert workspace.require(target, "quantize").key == workspace.key_of(INPUTS)


def test_a_replacement_in_another_process_is_not_finished_by_a_reader(tmp_path: Path, root: Path) -> None:
    """Between the two renames of a commit the target is away: whoever looks then must not rename in its place."""
    target, pipe = tmp_path / "model", subprocess.PIPE
    make(target, {"old": 1}, weights="old")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], cwd=root, stdin=pipe, stdout=pipe)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        target.rename(tmp_path / "model.old")
        assert workspace.current(target) is None
        assert (tmp_path / "model.old").is_dir()
    finally:
        holder.kill()
        holder.communicate()
    stamp = workspace.current(target)
    assert stamp
    assert stamp.inputs == {"old": 1}


def test_the_old_artifact_of_a_killed_replacement_is_removed_by_the_next_look(tmp_path: Path) -> None:
    target = tmp_path / "model"
    make(target, {"old": 1}, weights="old")
    target.rename(tmp_path / "model.old")
    make(tmp_path / "other", {"new": 1}, weights="new")
    (tmp_path / "other").rename(target)
    stamp = workspace.current(target)
    assert stamp
    assert stamp.inputs == {"new": 1}
    assert not (tmp_path / "model.old").exists()


# The child is killed by the kernel at the n-th system call of one kind that its commit makes.
KILLED = """
import os, signal, sys
from pathlib import Path
from toolchain import workspace
target, event, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0
def audit(name, args):
    global seen
    if armed and name == event:
        seen += 1
        if seen == count: os.kill(os.getpid(), signal.SIGKILL)
armed = False
sys.addaudithook(audit)
with workspace.draft(target, "quantize", {"new": 1}) as draft:
    (draft.path / "weights").write_text("new")
    draft.record({"layer": 0})
    armed = True
    draft.commit(versions={}, recipe="")
armed = False
print("survived")
"""


def committed_but_killed(target: Path, root: Path, event: str, count: int) -> bool:
    """-> whether the child was killed, rather than through with its commit before."""
    command = [sys.executable, "-c", KILLED, str(target), event, str(count)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("event", ["os.rename", "open", "os.remove"])
def test_kill_9_anywhere_in_a_commit_leaves_the_old_or_the_new_artifact_and_the_work(
    tmp_path: Path, root: Path, event: str, with_old: bool
) -> None:
    for count in range(1, 12):
        target = tmp_path / str(count) / "model"
        if with_old:
            make(target, {"old": 1}, weights="old")
        killed = committed_but_killed(target, root, event, count)
        stamp = workspace.current(target)
        if stamp is not None:
            assert workspace.damage(target, stamp) is None
            assert (target / "weights").read_text() == next(iter(stamp.inputs))
        assert stamp is not None or not with_old
        if stamp is None or stamp.inputs != {"new": 1}:
            with workspace.draft(target, "quantize", {"new": 1}) as draft:
                assert draft.journal() == [{"layer": 0}]
                assert (draft.path / "weights").read_text() == "new"
                draft.commit(versions={}, recipe="")
        again = workspace.require(target, "quantize")
        assert list(again.files) == ["weights"]
        assert again.inputs == {"new": 1}
        make(target, {"later": 1}, weights="later")
        assert sorted(path.name for path in target.parent.iterdir()) == [".model.lock", "model"]
        if not killed:
            return
    pytest.fail("the commit never ended")


# --- the disk --------------------------------------------------------------------------------------------------------

FULL = """
import subprocess, sys
from pathlib import Path
from toolchain import workspace
from toolchain.errors import ArtifactError
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
def attempt(count):
    try:
        with workspace.draft(disk / "model", "quantize", {"a": 1}) as draft:
            (draft.path / "weights").write_bytes(bytes(count))
            draft.commit(versions={}, recipe="")
        print("made")
    except ArtifactError as error:
        print(error.message, "|", error.hint)
attempt(2**21)
print(sorted(path.name for path in disk.iterdir()))
filler = (disk / "filler").open("wb", buffering=0)
try:
    while True: filler.write(bytes(4096))
except OSError: pass
attempt(10)
(disk / "filler").unlink(); filler.close()
attempt(10)
"""


def test_a_full_disk_is_an_error_with_a_hint_and_leaves_no_half_artifact(tmp_path: Path, root: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs needs `unshare -rm`, which this machine does not allow")
    command = ["unshare", "-rm", sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, left, second, third = done.stdout.splitlines()
    for said in (first, second):
        assert "No space left on device" in said
        assert "Make room" in said
    assert left == "['.model.lock']"
    assert third == "made"


def test_a_place_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x", tmp_path / "file" / "deeper" / "x"):
        with pytest.raises(ArtifactError, match="file") as caught, workspace.draft(target, "s", INPUTS):
            pass
        assert caught.value.hint == "Choose another place: --work DIR"


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), workspace.disk_errors(tmp_path):
        raise FileNotFoundError(2, "No such file", "x")


def test_write_durably_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    workspace.write_durably(path, b"1")
    workspace.write_durably(path, json.dumps({"b": 2}).encode())
    assert json.loads(path.read_text()) == {"b": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_shipped_folders_and_facts_are_found() -> None:
    assert (workspace.shipped("recipes")).is_dir()
    assert set(workspace.facts("quantizations")) == {"weights", "kv", "methods"}
