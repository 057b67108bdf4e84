"""The exact command lines: what they bind, load and clean up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from toolchain.servers.triton.command import (
    Ports,
    Settings,
    container_command,
    local_command,
    local_environment,
    server_flags,
)

SETTINGS = Settings(Path("/srv/repository"), Ports(9000, 9001, 9002), exit_timeout_s=7, name="scalellm-1-ab")
FLAGS = (
    "--model-control-mode=explicit",
    "--disable-auto-complete-config",
    "--http-address=127.0.0.1",
    "--http-port=9000",
    "--grpc-address=127.0.0.1",
    "--grpc-port=9001",
    "--metrics-address=127.0.0.1",
    "--metrics-port=9002",
    "--exit-timeout-secs=7",
    "--backend-config=python,shm-region-prefix-name=scalellm-1-ab",
    "--log-format=default",
    "--log-verbose=0",
    "--load-model=*",
)


def test_every_listener_binds_loopback_unless_told_otherwise() -> None:
    assert server_flags(SETTINGS, "/r") == ("--model-repository=/r", *FLAGS)
    opened = server_flags(Settings(Path("/r"), host="0.0.0.0"), "/r")
    assert {flag for flag in opened if "-address" in flag} == {
        f"--{listener}-address=0.0.0.0" for listener in ("http", "grpc", "metrics")
    }


def test_load_none_names_no_model() -> None:
    assert not any("--load-model" in flag for flag in server_flags(Settings(Path("/r"), load="none"), "/r"))


def test_local_command_is_exact_and_deletes_its_shared_memory() -> None:
    command = local_command(Path("/t/tritonserver"), SETTINGS, {"A": "1"}, backends=Path("/t/b"), caches=Path("/t/c"))
    assert command.argv == (
        "/t/tritonserver",
        "--model-repository=/srv/repository",
        *FLAGS,
        "--backend-directory=/t/b",
        "--cache-directory=/t/c",
    )
    assert command.env == {"A": "1"}
    assert command.delete == ("/dev/shm/scalellm-1-ab*",)
    assert command.afterwards == ()


def test_docker_command_is_exact() -> None:
    command = container_command("/usr/bin/docker", "img:24.10", SETTINGS, {}, user=(1000, 100), gpus="all")
    assert command.argv == (
        "/usr/bin/docker",
        "run",
        "--rm",
        "--name=scalellm-1-ab",
        "--pull=never",
        "--network=host",
        "--user=1000:100",
        "--env=HOME=/tmp",
        "--shm-size=1g",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        "--volume=/srv/repository:/models:ro",
        "--workdir=/models",
        "--gpus=all",
        "img:24.10",
        "tritonserver",
        "--model-repository=/models",
        *FLAGS,
    )
    assert command.afterwards == ("/usr/bin/docker", "rm", "--force", "scalellm-1-ab")


RANKS = Settings(Path("/srv/repository"), Ports(9000, 9001, 9002), exit_timeout_s=7, name="scalellm-1-ab", ranks=2)
SECOND = tuple(
    flag.replace("name=scalellm-1-ab", "name=scalellm-1-ab-rank1").replace("load-model=*", "load-model=tensorrt_llm")
    for flag in FLAGS
)


def test_ranks_run_under_mpirun_and_all_but_the_first_load_the_engine_alone() -> None:
    command = local_command(Path("/t/tritonserver"), RANKS, {"A": "1"})
    assert command.argv == (
        *("mpirun", "--allow-run-as-root"),
        *("-n", "1", "/t/tritonserver", "--model-repository=/srv/repository", *FLAGS),
        *(":", "-n", "1", "/t/tritonserver", "--model-repository=/srv/repository", *SECOND),
    )
    assert command.env["OMPI_MCA_odls_base_sigkill_timeout"] == "8", "mpirun leaves its ranks time to drain"
    assert command.delete == ("/dev/shm/scalellm-1-ab*",), "of every rank"


def test_every_rank_loads_the_engine_of_a_draft_model_too() -> None:
    """As ``launch_triton_server.py --tensorrt_llm_model_name=tensorrt_llm,tensorrt_llm_draft`` does."""
    command = local_command(
        Path("/t/tritonserver"), replace(RANKS, engines=("tensorrt_llm", "tensorrt_llm_draft")), {"A": "1"}
    )
    first, second = " ".join(command.argv).split(" : ")
    assert first.count("--load-model=") == 1
    assert second.endswith("--load-model=tensorrt_llm --load-model=tensorrt_llm_draft")


def test_ranks_in_a_container_get_a_gpu_each() -> None:
    command = container_command("docker", "img", RANKS, {}, user=(1000, 100), gpus="device=2,3")
    at = command.argv.index("img")
    assert command.argv[at + 1 : at + 5] == ("mpirun", "--allow-run-as-root", "-n", "1")
    assert '--gpus="device=2,3"' in command.argv, "docker reads the value as CSV"
    assert "--env=OMPI_MCA_odls_base_sigkill_timeout=8" in command.argv
    podman = container_command("podman", "img", RANKS, {}, user=(1000, 100), gpus="device=2,3").argv
    assert {"--device=nvidia.com/gpu=2", "--device=nvidia.com/gpu=3"} <= set(podman)


def test_a_server_starts_in_its_repository_so_that_paths_in_it_may_be_relative() -> None:
    assert local_command(Path("/t/tritonserver"), SETTINGS, {}).cwd == Path("/srv/repository")
    assert "--workdir=/models" in container_command("docker", "img", SETTINGS, {}, user=(0, 0), gpus=None).argv


def test_podman_keeps_the_callers_uid_and_names_gpus_its_own_way() -> None:
    argv = container_command("podman", "img", SETTINGS, {}, user=(1000, 100), gpus="device=0").argv
    assert {"--userns=keep-id", "--device=nvidia.com/gpu=0", "--security-opt=label=disable"} <= set(argv)
    assert not any(flag.startswith("--gpus") for flag in argv)
    argv = container_command("podman", "img", SETTINGS, {}, user=(0, 0), gpus=None).argv
    assert not any("gpu" in flag or "userns" in flag for flag in argv)


def test_local_environment_puts_this_interpreter_first_and_keeps_the_rest() -> None:
    base = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/cuda", "PYTHONHOME": "/elsewhere", "OMP_NUM_THREADS": "2"}
    env = local_environment(base, prefix=Path("/venv"), is_venv=True, libraries=[Path("/wheel"), Path("/py/lib")])
    assert env == {
        "PATH": "/venv/bin:/usr/bin",
        "LD_LIBRARY_PATH": "/wheel:/py/lib:/cuda",
        "VIRTUAL_ENV": "/venv",
        "OMP_NUM_THREADS": "2",
    }


def test_local_environment_without_a_venv_does_not_claim_one() -> None:
    base = {"VIRTUAL_ENV": "/some/other"}
    env = local_environment(base, prefix=Path("/usr"), is_venv=False, libraries=[])
    assert "VIRTUAL_ENV" not in env
    assert env["LD_LIBRARY_PATH"] == ""
