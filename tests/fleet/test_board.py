"""The board in a folder: what its readers and writers rely on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from toolchain.errors import EndpointError
from toolchain.fleet.board import FolderBoard


def test_a_board_gives_back_the_values_whose_keys_begin_as_asked(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path / "board")
    assert board.read("") == {}
    board.put("spec", {"min": 1})
    board.put("nodes/b", {"node": "b"})
    board.put("nodes/a.example", {"node": "a"})
    assert FolderBoard(tmp_path / "board").read("nodes/") == {
        "nodes/a.example": {"node": "a"},
        "nodes/b": {"node": "b"},
    }
    board.put("nodes/b", {"node": "b", "state": "draining"})
    board.remove("nodes/a.example")
    board.remove("nodes/a.example")
    assert list(board.read("")) == ["nodes/b", "spec"]
    assert board.read("nodes/b")["nodes/b"]["state"] == "draining"


def test_a_value_whose_time_has_run_out_is_gone_until_it_is_put_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    board = FolderBoard(tmp_path)
    board.put("nodes/a", {"node": "a"}, ttl_s=10)
    board.put("spec", {"min": 1})
    now[0] += 9
    assert "nodes/a" in board.read("")
    now[0] += 2
    assert list(board.read("")) == ["spec"]
    board.put("nodes/a", {"node": "a"}, ttl_s=10)
    assert "nodes/a" in board.read("")
    now[0] += 1000
    assert list(board.read("")) == ["spec"]
    assert not (tmp_path / "nodes" / "a.json").exists(), "the file of what nobody renews goes too"


def test_a_reader_never_meets_half_a_value(tmp_path: Path) -> None:
    board, done = FolderBoard(tmp_path), threading.Event()

    def write() -> None:
        for number in range(60):
            board.put("nodes/a", {"text": "x" * (1 + 5000 * (number % 2))})
        done.set()

    board.put("nodes/a", {"text": "x"})
    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert len(board.read("nodes/")["nodes/a"]["text"]) in (1, 5001)
    writer.join()


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../spec", "nodes/../spec", "nodes//a", ".hidden", "nodes/a/"])
def test_a_key_cannot_leave_the_board(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        FolderBoard(tmp_path).put(key, {})


def test_a_board_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    (tmp_path / "board").write_text("")
    with pytest.raises(EndpointError, match="cannot be read or written"):
        FolderBoard(tmp_path / "board").put("spec", {})


def test_a_file_that_is_no_value_is_named(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    board.put("spec", {"min": 1})
    (tmp_path / "spec.json").write_text("[1")
    with pytest.raises(EndpointError, match=r"spec\.json: not a file of a board"):
        board.read("")
