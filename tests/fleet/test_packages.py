"""A repository on its way to a node: by content, through a place that nobody needs to trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolchain import workspace
from toolchain.errors import ArtifactError, RecipeError, RejectedError
from toolchain.fleet.deployment import load_deployment
from toolchain.fleet.hosts import packages
from toolchain.pipeline.packing import check_code
from toolchain.progress import Silent
from toolchain.registry import Folder, Manifest
from toolchain.stages.join import fetching


def offered(repository: Path, folder: Path) -> dict[str, str]:
    return packages.offer(repository, "parrot", "cpu", Folder(folder / "shelf"), str(folder / "registry"), Silent())


def own_code(manifest: Manifest) -> None:
    check_code(manifest, "the registry")


def version(folder: Path, *offers: dict[str, str]) -> dict[str, Any]:
    return {packages.PACKAGES: list(offers), packages.REGISTRY: str(folder / "registry")}


def test_a_node_gets_what_the_head_has_and_once(repository: Path, tmp_path: Path) -> None:
    provide = fetching(tmp_path / "node", "cpu", Silent(), check=own_code)
    wanted = version(tmp_path, offered(repository, tmp_path))
    place = provide(wanted, "r1")
    stamp = workspace.require(place, "repository")
    assert stamp == workspace.read_stamp(repository)
    assert workspace.damage(place, stamp) is None
    (tmp_path / "registry").rename(tmp_path / "gone")
    assert provide(wanted, "r2") == place
    assert offered(repository, tmp_path / "again") == wanted[packages.PACKAGES][0]  # the same content, the same name


def test_a_registry_cannot_slip_other_bytes_in(repository: Path, tmp_path: Path) -> None:
    wanted = version(tmp_path, offered(repository, tmp_path))
    blob = max((tmp_path / "registry" / "blobs").rglob("*"), key=lambda file: file.stat().st_size)
    raw = bytearray(blob.read_bytes())
    raw[len(raw) // 2] ^= 1
    blob.unlink()
    blob.write_bytes(raw)
    with pytest.raises(ArtifactError, match="corrupted"):
        fetching(tmp_path / "node", "cpu", Silent(), check=own_code)(wanted, "r1")
    assert not (tmp_path / "node" / "fetched").exists()


def test_what_cannot_be_fetched_is_told_with_what_to_do(repository: Path, tmp_path: Path) -> None:
    wanted = version(tmp_path, {"device": "h100", "package": f"parrot@{'0' * 64}"})
    with pytest.raises(ArtifactError, match="no engine for cpu; there are: h100") as found:
        fetching(tmp_path / "node", "cpu", Silent(), check=own_code)(wanted, "r1")
    assert "--recipe" in found.value.hint
    with pytest.raises(ArtifactError, match="names no registry"):
        fetching(tmp_path / "node", "h100", Silent(), check=own_code)({**wanted, packages.REGISTRY: ""}, "r1")

    def strange(_manifest: Manifest) -> None:
        raise RejectedError("code that is not ours")

    mine = version(tmp_path, offered(repository, tmp_path))
    with pytest.raises(RejectedError, match="not ours"):
        fetching(tmp_path / "node", "cpu", Silent(), check=strange)(mine, "r1")


def test_a_network_needs_four_ports(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text(
        "endpoint: a\nrecipes: [tiny]\nnetwork: {host: 10.0.0.1, names: [head.example.org]}\nregistry: /mnt/x\n"
    )
    found = load_deployment(file)
    assert found.network is not None
    assert (found.network.door, found.network.answers, found.registry) == (7600, 7603, "/mnt/x")
    file.write_text("endpoint: a\nrecipes: [tiny]\nnetwork: {host: 10.0.0.1, nats: 7601}\n")
    with pytest.raises(RecipeError) as told:
        load_deployment(file)
    assert "four different ports" in str([one.message for one in told.value.problems])
