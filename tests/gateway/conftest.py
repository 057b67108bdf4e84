"""A parrot, what transformers says of it, and a real Triton with it, for all tests of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.parrot import write_parrot
from tests.e2e.served import Served
from tests.e2e.test_triton_models import Reference, make_engine, serving


@pytest.fixture(scope="package")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="package")
def reference(parrot: Path) -> Reference:
    return Reference(parrot)


@pytest.fixture(scope="package")
def served(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = make_engine(parrot, tmp_path_factory.mktemp("made") / "engine")
    with serving(engine, tmp_path_factory.mktemp("served")) as found:
        yield found
