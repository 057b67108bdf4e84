"""Two replicas of a parrot behind one front, for all tests of failover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.parrot import write_parrot
from tests.e2e.test_triton_models import LIMITS, make_engine
from tests.fleet.endpoint import Endpoint, endpoint
from toolchain import workspace
from toolchain.stages.package import package


@pytest.fixture(scope="package")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="package")
def repository(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(parrot, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="package")
def running(repository: Path, parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    with endpoint(repository, parrot, tmp_path_factory.mktemp("endpoint")) as found:
        yield found


def make_repository(parrot: Path, work: Path, services: int = 1) -> Path:
    """A continued request's prompt is as long as prompt and answer: the engine takes such ones."""
    engine = make_engine(parrot, work / "engine", limits=replace(LIMITS, max_input_len=LIMITS.max_seq_len - 1))
    with workspace.draft(work / "repository", "repository", {}) as draft:
        package(engine, draft.path, services=services)
        draft.commit(versions={}, recipe="")
    return work / "repository"
