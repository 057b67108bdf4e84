"""Which Triton is taken, and what each kind needs before it may start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.servers.generator_repository import write_repository
from toolchain.errors import ArtifactError, ToolError
from toolchain.servers.triton import bundled
from toolchain.servers.triton.command import Settings
from toolchain.servers.triton.locate import backends_of, find_server


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script, to stand for a program that this machine lacks."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def wheel() -> bundled.Wheel:
    found = bundled.find_wheel()
    assert found is not None
    return found


def test_auto_takes_the_bundled_server_for_python_models() -> None:
    server = find_server("auto", environ=os.environ)
    assert (server.kind, server.version) == ("bundled", "2.51.0")


def test_a_server_on_path_is_taken_where_the_bundled_one_lacks_the_backend(tmp_path: Path) -> None:
    executable = program(tmp_path, "tritonserver", "exit 0")
    environ = {"PATH": str(tmp_path), "TRITON_SERVER_VERSION": "2.54.0"}
    server = find_server("auto", environ=environ, needs=["python", "tensorrtllm"])
    assert (server.kind, server.version) == ("path", "2.54.0")
    assert server.command(Settings(tmp_path)).argv[0] == str(executable)


def test_nothing_found_says_what_was_tried_and_what_to_do() -> None:
    with pytest.raises(ToolError) as caught:
        find_server("auto", environ={"PATH": ""}, needs=["tensorrtllm"])
    for reason in ("lacks the backend tensorrtllm", "no tritonserver on PATH", "no docker or podman on PATH"):
        assert reason in caught.value.message
    assert "container" in caught.value.hint or "image" in caught.value.hint
    with pytest.raises(ToolError) as caught:
        find_server("path", environ={"PATH": ""})
    assert "pip install 'nvidia-pytriton" in caught.value.hint


def test_a_container_engine_that_does_not_answer_is_no_server(tmp_path: Path) -> None:
    program(tmp_path, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    with pytest.raises(ToolError, match="docker does not answer: Cannot connect to the Docker daemon"):
        find_server("container", environ={"PATH": str(tmp_path)})


def test_an_image_that_is_not_here_is_refused_with_the_pull_command(tmp_path: Path) -> None:
    program(tmp_path, "docker", '[ "$1" = info ]')
    server = find_server("container", environ={"PATH": f"{tmp_path}:/bin"}, image="example/triton:1")
    assert (server.kind, server.version) == ("container", "1")
    with pytest.raises(ToolError, match="example/triton:1 is not on this machine") as caught:
        server.command(Settings(tmp_path))
    assert caught.value.hint == "docker pull example/triton:1"


def test_a_container_runs_as_the_caller(tmp_path: Path) -> None:
    program(tmp_path, "docker", "exit 0")
    server = find_server("container", environ={"PATH": str(tmp_path)}, image="example/triton:1", gpus="all")
    argv = server.command(Settings(tmp_path)).argv
    assert {f"--user={os.getuid()}:{os.getgid()}", "--gpus=all", f"--volume={tmp_path}:/models:ro"} <= set(argv)


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker client")
def test_the_docker_client_knows_every_flag(tmp_path: Path) -> None:
    program(tmp_path, "docker", "exit 0")
    server = find_server("container", environ={"PATH": str(tmp_path)}, image="example.invalid/none:1", gpus="all")
    argv = ["docker", *server.command(Settings(tmp_path)).argv[1:]]
    nowhere = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    refused = subprocess.run(argv, env=nowhere, capture_output=True, text=True, timeout=60, check=False)
    assert "connect" in refused.stderr
    assert "unknown flag" not in refused.stderr


@pytest.mark.parametrize("version", ["2.0.0", "2.4.6", "none"])
def test_numpy_2_is_refused_with_the_command_that_mends_it(version: str) -> None:
    with pytest.raises(ToolError, match="wrong data") as caught:
        bundled.check_numpy(version)
    assert "-m pip install 'numpy>=1.26.4,<2'" in caught.value.hint


def test_this_environment_has_the_numpy_that_the_server_needs() -> None:
    bundled.check_numpy()


def test_a_stub_without_its_libpython_is_refused_instead_of_hanging(wheel: bundled.Wheel, tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_bytes(re.sub(rb"libpython3\.\d\d\.so", b"libpython3.99.so", wheel.stub.read_bytes()))
    stub.chmod(0o755)
    with pytest.raises(ToolError, match=r"cannot load libpython3\.99\.so\.1\.0") as caught:
        bundled.check_stub(stub, bundled.environment(wheel, os.environ))
    assert "sudo apt install libpython3." in caught.value.hint
    assert "sudo dnf install python3." in caught.value.hint


def test_the_stub_finds_this_interpreters_own_libpython(wheel: bundled.Wheel) -> None:
    bundled.check_stub(wheel.stub, bundled.environment(wheel, os.environ))


def test_staging_happens_once_and_leaves_no_scraps(wheel: bundled.Wheel, tmp_path: Path) -> None:
    first = bundled.stage(wheel, tmp_path)
    inode = first.executable.parent.stat().st_ino
    assert bundled.stage(wheel, tmp_path) == first
    assert first.executable.parent.stat().st_ino == inode
    assert len(list(tmp_path.iterdir())) == 1
    assert all(path.exists() for path in tmp_path.rglob("*")), "a link that leads nowhere"


def test_staging_mends_lost_x_bits_without_touching_the_wheel(wheel: bundled.Wheel, tmp_path: Path) -> None:
    root = tmp_path / "site" / "pytriton" / "tritonserver"
    shutil.copytree(wheel.root, root, copy_function=shutil.copyfile)  # copies no mode bits, as some unzippers do
    staged = bundled.stage(replace(wheel, root=root), tmp_path / "cache")
    env = bundled.environment(wheel, os.environ)
    done = subprocess.run([staged.executable, "--help"], env=env, capture_output=True, text=True, check=False)
    assert "--model-repository" in done.stdout + done.stderr
    assert os.access(staged.backends / "python" / "triton_python_backend_stub", os.X_OK)
    assert not os.access(root / "bin" / "tritonserver", os.X_OK)


def test_a_python_without_a_stub_is_told_which_have_one(wheel: bundled.Wheel, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no Triton stub for Python") as caught:
        bundled.stage(replace(wheel, root=_without_stubs(wheel.root, tmp_path)), tmp_path / "cache")
    assert "3.12" in caught.value.hint


def _without_stubs(root: Path, folder: Path) -> Path:
    (folder / "bin").mkdir()
    (folder / "python_backend_stubs" / "3.12").mkdir(parents=True)
    (folder / "bin" / "tritonserver").symlink_to(root / "bin" / "tritonserver")
    return folder


def test_backends_are_read_from_the_models_configurations(tmp_path: Path) -> None:
    write_repository(tmp_path)
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "config.pbtxt").write_text('name: "tensorrt_llm"\nbackend: "tensorrtllm"\n')
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "config.pbtxt").write_text('name: "ensemble"\nplatform: "ensemble"\n')
    assert backends_of(tmp_path) == {"python", "tensorrtllm"}
    with pytest.raises(ArtifactError, match="not a Triton model repository"):
        backends_of(tmp_path / "ensemble")
