"""Which Triton is taken, and what each kind needs before it may start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine_folder import write_engine
from tests.servers.generator_repository import write_repository
from toolchain.errors import ArtifactError, ToolError
from toolchain.servers.triton import bundled
from toolchain.servers.triton.command import Settings
from toolchain.servers.triton.locate import Preference, find_server
from toolchain.servers.triton.needs import Needs, backends_of, needs_of
from toolchain.stages.package import package


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
    server = find_server("auto", environ=environ, needs=Needs(frozenset({"python", "tensorrtllm"})))
    assert (server.kind, server.version) == ("path", "2.54.0")
    assert server.command(Settings(tmp_path)).argv[0] == str(executable)


@pytest.fixture
def engine_repository(tmp_path: Path) -> Path:
    """Of a TensorRT-LLM 0.17.0 engine for two GPUs."""
    package(write_engine(tmp_path / "engine", "0.17.0", tp=2), tmp_path / "repository", services=3)
    return tmp_path / "repository"


def test_a_repository_says_which_image_gpus_and_services_it_needs(engine_repository: Path) -> None:
    needs = needs_of(engine_repository)
    assert needs.backends == {"python", "tensorrtllm"}
    assert needs.image == "nvcr.io/nvidia/tritonserver:25.02-trtllm-python-py3"
    assert (needs.release, needs.tags, needs.gpus, needs.ranks, needs.services) == (
        "0.17.0",
        ("25.01", "25.02"),
        2,
        2,
        3,
    )


def test_a_repository_that_others_wrote_needs_its_backends_only(tmp_path: Path) -> None:
    needs = needs_of(write_repository(tmp_path / "theirs"))
    assert needs == Needs(frozenset({"python"}))
    assert (needs.ranks, needs.devices({})) == (1, None)


def test_a_container_of_the_engines_own_release_is_taken(engine_repository: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin", "docker", "exit 0")
    environ = {"PATH": str(tmp_path / "bin"), "CUDA_VISIBLE_DEVICES": "4,5,6"}
    server = find_server("auto", environ=environ, needs=needs_of(engine_repository))
    argv = server.command(Settings(engine_repository, ranks=2)).argv
    assert "nvcr.io/nvidia/tritonserver:25.02-trtllm-python-py3" in argv
    assert '--gpus="device=4,5"' in argv
    assert argv.count("--model-repository=/models") == 2


@pytest.mark.parametrize("prefer", ["path", "auto"])
def test_a_tritonserver_of_another_release_is_refused_with_what_to_do(
    engine_repository: Path, tmp_path: Path, prefer: Preference
) -> None:
    program(tmp_path / "bin", "tritonserver", "exit 0")
    program(tmp_path / "bin", "mpirun", "exit 0")
    environ = {"PATH": str(tmp_path / "bin"), "NVIDIA_TRITON_SERVER_VERSION": "25.05"}
    with pytest.raises(ToolError) as caught:
        find_server(prefer, environ=environ, needs=needs_of(engine_repository))
    assert "this tritonserver is of the image 25.05 (0.19.0)" in caught.value.message
    assert "built by TensorRT-LLM 0.17.0 (25.01 or 25.02)" in caught.value.message
    assert "docker pull nvcr.io/nvidia/tritonserver:25.02-trtllm-python-py3" in caught.value.hint
    assert "tensorrt_llm in the recipe parrot" in caught.value.hint
    for tag in ("25.01", "25.02"):
        same = {**environ, "NVIDIA_TRITON_SERVER_VERSION": tag}
        assert find_server(prefer, environ=same, needs=needs_of(engine_repository)).kind == "path"


def test_another_kind_of_gpu_is_refused_before_anything_starts(
    engine_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for second, wrong in (("NVIDIA A100-SXM4-80GB, GPU-1, 8.0", True), ("NVIDIA L4, GPU-1, 8.9", False)):
        first, rest = "NVIDIA L4, GPU-0, 8.9", "580.95.05, 23034, 22000"
        program(tmp_path / "bin", "nvidia-smi", f"echo '0, {first}, {rest}'; echo '1, {second}, {rest}'")
        program(tmp_path / "bin", "docker", "exit 0")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        if wrong:
            with pytest.raises(
                ToolError, match=r"needs 2 GPUs of SM 89, and this machine has NVIDIA L4 \(SM 89\), NVIDIA A"
            ):
                find_server("container", environ=os.environ, needs=needs_of(engine_repository))
        else:
            assert find_server("container", environ=os.environ, needs=needs_of(engine_repository)).kind == "container"


def test_ranks_without_mpirun_are_refused(engine_repository: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin", "tritonserver", "exit 0")
    with pytest.raises(ToolError, match="no mpirun on PATH, which starts the 2 ranks"):
        find_server("path", environ={"PATH": str(tmp_path / "bin")}, needs=needs_of(engine_repository))


def test_the_bundled_server_is_not_taken_for_tensorrt_llms_python_runtime() -> None:
    needs = Needs(frozenset({"python"}), release="1.2.1", image="example/triton:1", gpus=2)
    assert needs.ranks == 1, "it starts its ranks itself"
    with pytest.raises(ToolError, match=r"the bundled server has no TensorRT-LLM 1\.2\.1"):
        find_server("bundled", environ=os.environ, needs=needs)


def test_nothing_found_says_what_was_tried_and_what_to_do() -> None:
    with pytest.raises(ToolError) as caught:
        find_server("auto", environ={"PATH": ""}, needs=Needs(frozenset({"tensorrtllm"})))
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
    server = find_server("container", environ={"PATH": f"{tmp_path}:/bin"}, needs=Needs(image="example/triton:1"))
    assert (server.kind, server.version) == ("container", "1")
    with pytest.raises(ToolError, match="example/triton:1 is not on this machine") as caught:
        server.command(Settings(tmp_path))
    assert caught.value.hint == "docker pull example/triton:1"


def test_a_container_runs_as_the_caller(tmp_path: Path) -> None:
    program(tmp_path, "docker", "exit 0")
    needs = Needs(image="example/triton:1", gpus=1)
    server = find_server("container", environ={"PATH": str(tmp_path)}, needs=needs)
    argv = server.command(Settings(tmp_path)).argv
    assert {f"--user={os.getuid()}:{os.getgid()}", "--gpus=device=0", f"--volume={tmp_path}:/models:ro"} <= set(argv)


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker client")
def test_the_docker_client_knows_every_flag(tmp_path: Path) -> None:
    program(tmp_path, "docker", "exit 0")
    needs = Needs(image="example.invalid/none:1", gpus=2)
    server = find_server("container", environ={"PATH": str(tmp_path)}, needs=needs)
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
