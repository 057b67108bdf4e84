"""Packages between stores: a folder and fsspec's memory. What is there is not moved again, what is wrong is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from tests.registry.packages import FILES, WEIGHTS, blob_of, package, sha256
from toolchain import workspace
from toolchain.errors import ArtifactError, EndpointError, RecipeError, ToolError
from toolchain.progress import Silent
from toolchain.registry import Folder, Reference, Store, check_out, has, open_store, pull, push, resolve
from toolchain.registry.transfer import blob_path, forget, manifest_path, tag_path, tags

LLAMA = Reference.parse("llama")


@pytest.fixture(params=["folder", "file", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """The same promises hold at every kind of registry."""
    place = f"memory://{uuid4().hex}/models"
    addresses = {"folder": str(tmp_path / "registry"), "file": f"file://{tmp_path / 'registry'}", "memory": place}
    yield open_store(addresses[request.param])
    if request.param == "memory":
        fsspec.filesystem("memory").rm(place.removeprefix("memory:/").rpartition("/")[0], recursive=True)


class Broken:
    """A registry whose line is cut after so many bytes of a file."""

    def __init__(self, store: Store, after: int) -> None:
        self.url, self._store, self._after = store.url, store, after
        self.offsets: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def open(self, path: str) -> Any:
        stream, left, offsets = self._store.open(path), self._after, self.offsets
        if not path.startswith("blobs/"):
            return stream

        class Cut:
            def read(self, size: int) -> bytes:
                nonlocal left
                if not left:
                    raise EndpointError("the line is cut")
                data = stream.read(min(size, left))
                left -= len(data)
                return bytes(data)

            def seek(self, offset: int) -> None:
                offsets.append(offset)
                stream.seek(offset)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_error: object) -> None:
                stream.close()

        return Cut()


def sent(tmp_path: Path, registry: Store) -> tuple[Any, Folder]:
    manifest, source = package(tmp_path / "source")
    push(manifest, source, registry, Silent())
    return manifest, Folder(tmp_path / "target")


def test_what_was_pushed_is_pulled_byte_for_byte(tmp_path: Path, registry: Store) -> None:
    manifest, target = sent(tmp_path, registry)
    moved = pull(LLAMA, registry, target, Silent())
    assert moved.manifest == manifest
    check_out(moved.manifest, target, tmp_path / "out")
    assert {path: (tmp_path / "out" / path).read_bytes() for path in FILES} == FILES
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted({"out", "source", "target"} | _folder(registry))


def _folder(registry: Store) -> set[str]:
    return {"registry"} if isinstance(registry, Folder) else set()


def test_a_second_push_and_a_second_pull_move_nothing(tmp_path: Path, registry: Store) -> None:
    manifest, source = package(tmp_path / "source")
    first = push(manifest, source, registry, Silent())
    assert first.files == 4  # two of the five have the same bytes
    assert first.bytes == sum(len(data) for data in set(FILES.values()))
    again = push(manifest, source, registry, Silent(), ["v1"])
    assert (again.files, again.bytes, again.kept) == (0, 0, first.bytes)
    target = Folder(tmp_path / "target")
    assert pull(LLAMA, registry, target, Silent()).files == 4
    assert pull(Reference.parse("llama:v1"), registry, target, Silent()).files == 0


def test_another_model_with_the_same_weights_sends_only_what_differs(tmp_path: Path, registry: Store) -> None:
    sent(tmp_path, registry)
    other = {**FILES, "card.json": b'{"name": "other"}'}
    manifest, source = package(tmp_path / "other", "other", other)
    assert push(manifest, source, registry, Silent()).bytes == len(other["card.json"])


def test_a_package_is_meant_by_tag_digest_or_the_start_of_one(tmp_path: Path, registry: Store) -> None:
    manifest, source = package(tmp_path / "source")
    push(manifest, source, registry, Silent(), ["v1"])
    newer, source = package(tmp_path / "newer", files={**FILES, "card.json": b"{}"})
    push(newer, source, registry, Silent())
    assert tags(registry, "llama") == {"latest": newer.digest, "v1": manifest.digest}
    for words in ("llama:v1", f"llama@{manifest.digest}", f"llama@sha256:{manifest.digest[:8]}"):
        assert resolve(registry, Reference.parse(words)) == manifest
    assert resolve(registry, LLAMA) == newer
    for words in ("llama:v2", "llama@00000000", "other"):
        with pytest.raises(ArtifactError, match="there is no"):
            resolve(registry, Reference.parse(words))


def test_a_corrupted_blob_is_refused_by_name_and_nothing_is_pulled(tmp_path: Path, registry: Store) -> None:
    manifest, target = sent(tmp_path, registry)
    data = FILES[WEIGHTS]
    registry.write(blob_of(FILES, WEIGHTS), data[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"model\.safetensors.*is corrupted"):
        pull(LLAMA, registry, target, Silent())
    assert not has(target, sha256(data), len(data))
    assert not list(target.root.rglob("*.part"))
    assert not target.path(manifest_path("llama", manifest.digest)).exists()


def test_a_blob_that_is_missing_from_the_registry_is_named(tmp_path: Path, registry: Store) -> None:
    _, target = sent(tmp_path, registry)
    registry.remove(blob_of(FILES, WEIGHTS))
    with pytest.raises(ArtifactError, match=r"model\.safetensors.*missing"):
        pull(LLAMA, registry, target, Silent())


def test_a_truncated_blob_in_the_registry_is_sent_again(tmp_path: Path, registry: Store) -> None:
    manifest, target = sent(tmp_path, registry)
    registry.write(blob_of(FILES, WEIGHTS), FILES[WEIGHTS][:100])
    assert push(manifest, Folder(tmp_path / "source"), registry, Silent()).files == 1
    assert pull(LLAMA, registry, target, Silent()).files == 4


def test_a_source_that_is_damaged_is_not_pushed(tmp_path: Path, registry: Store) -> None:
    manifest, source = package(tmp_path / "source")
    file = source.path(blob_of(FILES, WEIGHTS))
    file.write_bytes(FILES[WEIGHTS][:-1] + b"!")
    with pytest.raises(ArtifactError, match="is corrupted"):
        push(manifest, source, registry, Silent())
    assert not has(registry, sha256(FILES[WEIGHTS]), len(FILES[WEIGHTS]))
    with pytest.raises(ArtifactError, match="there is no llama:latest"):
        resolve(registry, LLAMA)


def test_a_pull_that_was_cut_goes_on_inside_the_file(tmp_path: Path, registry: Store) -> None:
    manifest, target = sent(tmp_path, registry)
    half = len(FILES[WEIGHTS]) // 2
    with pytest.raises(EndpointError, match="cut"):
        pull(LLAMA, Broken(registry, half), target, Silent())
    assert not target.path(manifest_path("llama", manifest.digest)).exists()
    whole = Broken(registry, 10**9)
    pull(LLAMA, whole, target, Silent())
    assert whole.offsets == [half]
    assert target.path(blob_of(FILES, WEIGHTS)).read_bytes() == FILES[WEIGHTS]


def test_a_part_of_a_file_that_went_wrong_is_fetched_again(tmp_path: Path, registry: Store) -> None:
    _, target = sent(tmp_path, registry)
    blob = blob_of(FILES, WEIGHTS)
    target.write(f"{blob}.part", b"what a broken disk left")
    pull(LLAMA, registry, target, Silent())
    assert target.path(blob).read_bytes() == FILES[WEIGHTS]


def test_a_blob_that_is_here_already_is_hashed_too(tmp_path: Path, registry: Store) -> None:
    manifest, target = sent(tmp_path, registry)
    pull(LLAMA, registry, target, Silent())
    blob = target.path(blob_of(FILES, WEIGHTS))
    blob.write_bytes(FILES[WEIGHTS][:-1] + b"!")
    target.write(tag_path("llama", "latest"), manifest.digest.encode())
    with pytest.raises(ArtifactError, match=r"model\.safetensors.*is corrupted"):
        pull(LLAMA, target, target, Silent())
    assert pull(LLAMA, registry, target, Silent()).files == 1
    assert blob.read_bytes() == FILES[WEIGHTS]


def test_a_push_that_is_killed_leaves_no_package_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """kill -9 at some moment of the copy: the registry has the package whole, or does not have it."""
    many = {f"repository/m/1/{n}.safetensors": n.to_bytes(4, "big") * 500_000 for n in range(40)}
    manifest, source = package(tmp_path / "source", files=many)
    file = tmp_path / "manifest.json"
    file.write_text(manifest.to_json())
    code = (
        "import sys; from toolchain.progress import Silent\n"
        "from toolchain.registry import Folder, Manifest, push; from pathlib import Path\n"
        "text = Path(sys.argv[1]).read_bytes()\n"
        f"manifest = Manifest.from_json(text, 'm', name='llama', digest={manifest.digest!r})\n"
        "push(manifest, Folder(Path(sys.argv[2])), Folder(Path(sys.argv[3])), Silent())\n"
    )
    registry = Folder(tmp_path / "registry")
    with subprocess.Popen([sys.executable, "-c", code, str(file), str(source.root), str(registry.root)]) as process:
        blobs = registry.path("blobs")
        while not blobs.is_dir() or sum(one.is_file() for one in blobs.rglob("*")) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    whole = {path.name for path in blobs.rglob("*") if path.is_file() and not path.name.endswith(".part")}
    assert 1 <= len(whole) < 40
    assert all(sha256((registry.path(blob_path(name))).read_bytes()) == name for name in whole)
    with pytest.raises(ArtifactError, match="there is no llama:latest"):
        resolve(registry, LLAMA)
    assert push(manifest, source, registry, Silent()).files == 40 - len(whole)
    assert pull(LLAMA, registry, Folder(tmp_path / "target"), Silent()).files == 40


def test_two_pulls_of_one_file_at_a_time_do_not_mix(tmp_path: Path) -> None:
    manifest, source = package(tmp_path / "source")
    push(manifest, source, source, Silent())
    target = Folder(tmp_path / "target")
    refused: list[str] = []

    def meanwhile(_count: int) -> None:
        if not refused:
            try:
                pull(LLAMA, source, target, Silent())
            except ArtifactError as error:
                refused.append(error.message)

    with source.open(blob_of(FILES, WEIGHTS)) as stream:
        target.receive(blob_of(FILES, WEIGHTS), stream, sha256(FILES[WEIGHTS]), "weights", meanwhile)
    assert "another process fetches this file" in refused[0]
    assert pull(LLAMA, source, target, Silent()).manifest == manifest


def test_forgetting_a_model_keeps_what_another_one_needs(tmp_path: Path) -> None:
    store = Folder(tmp_path / "home")
    for name, card in (("llama", b"{}"), ("other", b"[]")):
        manifest, _ = package(tmp_path / "home", name, {**FILES, "card.json": card})
        push(manifest, store, store, Silent())
    assert forget(store, "llama") == len(b"{}")
    with pytest.raises(ArtifactError, match="there is no"):
        resolve(store, LLAMA)
    assert pull(Reference.parse("other"), store, Folder(tmp_path / "target"), Silent()).files == 4


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("s3://bucket/models", ToolError, "pip install s3fs"),
        ("gs://bucket/models", ToolError, "pip install gcsfs"),
        ("nothing://bucket", RecipeError, "--registry"),
        ("", RecipeError, "--registry"),
    ],
)
def test_an_address_that_cannot_be_opened_says_what_to_type(
    address: str, error: type[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(error) as caught:
        open_store(address)
    assert told in caught.value.hint


def test_a_registry_that_fails_is_told_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://user:secret@host/models")
    assert "secret" not in store.url

    def fail(*_words: object, **_more: object) -> None:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(fsspec.filesystem("memory"), "open", fail)
    manifest, source = package(tmp_path / "source")
    with pytest.raises(EndpointError, match="disk quota exceeded"):
        push(manifest, source, store, Silent())


Change = Callable[[dict[str, Any]], None]


def _rename(path: str) -> Change:
    def change(raw: dict[str, Any]) -> None:
        raw["files"][path] = raw["files"].pop("card.json")

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(
            _rename,
            (
                "../card.json",
                "repository/../../card.json",
                "/etc/card.json",
                "repository//card.json",
                "repository/.ssh/a.json",
                "repository\\a.json",
                "repository/a.json\n",
                "repository/pytorch_model.bin",
                "repository/weights.pt",
                "repository/model.pkl",
                "repository/env.tar.gz",
                "repository/weights.npy",
                "repository/libtriton_x.so",
                "run.py",
                "deployment.json",
                "",
            ),
        ),
        lambda raw: raw["files"]["card.json"].update(sha256="../../x"),
        lambda raw: raw["files"]["card.json"].update(sha256="0" * 64),
        lambda raw: raw["files"]["card.json"].update(size=-1),
        lambda raw: raw["files"]["card.json"].update(size=True),
        lambda raw: raw["files"]["card.json"].pop("size"),
        lambda raw: raw["files"].update({WEIGHTS + "/a.json": raw["files"]["card.json"]}),
        lambda raw: raw.update(files=[]),
        lambda raw: raw.update(name="../llama"),
        lambda raw: raw.update(name="other"),
        lambda raw: raw.update(format="another/2"),
        lambda raw: raw.clear(),
    ],
)
def test_a_manifest_that_was_made_up_is_refused_before_anything_is_fetched(tmp_path: Path, change: Change) -> None:
    """Even where its digest is made to fit."""
    manifest, source = package(tmp_path / "source")
    raw = json.loads(manifest.to_json())
    change(raw)
    files = raw.get("files") or {}
    fitting = workspace.key_of({path: [one.get("size"), one["sha256"]] for path, one in files.items()})
    for digest in {manifest.digest, fitting}:
        source.write(manifest_path("llama", digest), json.dumps(raw).encode())
        target = Folder(tmp_path / "target")
        with pytest.raises((ArtifactError, RecipeError)):
            pull(Reference("llama", "", digest), source, target, Silent())
        assert not target.root.exists()


@pytest.mark.parametrize(
    "words", ["../llama", "a/b", "", ".hidden", "llama:", "llama:../x", "llama@xyz", "a" * 65, "a\n"]
)
def test_names_that_could_leave_a_folder_are_no_names(words: str) -> None:
    with pytest.raises(RecipeError):
        Reference.parse(words)


@pytest.mark.parametrize(
    "path",
    [
        "repository/ensemble/1/.gitkeep",
        "repository/tensorrt_llm/1/engine/rank0.engine",
        "repository/tensorrt_llm/1/engine/model-00001-of-00002.safetensors",
        "repository/tensorrt_llm/1/engine/openvino_model.bin",
        "repository/tensorrt_llm/1/engine/lora/1/model.lora_weights.npy",
        "repository/tensorrt_llm/1/model.yaml",
        "accuracy-0123456789ab.json",
    ],
)
def test_what_scalellm_writes_may_be_in_a_package(tmp_path: Path, path: str) -> None:
    manifest, source = package(tmp_path, files={path: b"x"})
    push(manifest, source, source, Silent())
    assert resolve(source, LLAMA) == manifest
