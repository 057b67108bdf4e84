"""Schemathesis, which we did not write, asks what our OpenAPI documents offer: no 5xx, and nothing undocumented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.served import Served
from tests.gateway.behind_gateway import gateway, settings_for
from tests.gateway.test_doors import until_ready
from toolchain.gateway.settings import Limits

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
EXAMPLES = int(os.environ.get("SCALELLM_SCHEMA_EXAMPLES", "25"))
"""Of each path; ``make test-schema`` asks more."""
PATIENCE_S = 240 + 4 * EXAMPLES
pytestmark = pytest.mark.timeout(PATIENCE_S + 60)


@pytest.mark.parametrize("door", ["OpenAI", "/predict"])
def test_schemathesis_finds_nothing(parrot: Path, served: Served, tmp_path: Path, door: str) -> None:
    asked = settings_for(parrot, served.http_port, limits=Limits(predict_tokens=8, default_tokens=8))
    with gateway(asked) as found:
        until_ready(found)
        url = found.root if door == "OpenAI" else found.predict_url.removesuffix("/predict")
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS),
                "--max-examples", str(EXAMPLES), "--seed", "6", "--no-color", "--continue-on-failure",
                "--request-timeout", "60", "--suppress-health-check", "all",
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert not [line for line in found.log if line["event"] == "bug"]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    served.idle()
