"""The compose file, read by two readers of such files, and against what it mounts and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import jsonschema
import pytest
import yaml

from tests.exports.conftest import Export
from tests.exports.packages import DEPLOYMENT, push
from tests.exports.tools import COMPOSE_SCHEMA, needs_compose_schema
from toolchain.cli import doors, serving
from toolchain.errors import PlanError


def interpolated(text: str) -> str:
    """``${NAME:-default}`` as compose fills it in where NAME is not set; the readers take a file after that."""
    return re.sub(r"\$\{\w+:-(\w+)\}", r"\1", text)


def services(export: Export, text: str = DEPLOYMENT, *flags: object) -> dict[str, Any]:
    found: dict[str, Any] = export("compose", text, *flags)["compose.yaml"]["services"]
    return found


def test_a_reader_of_the_compose_specification_takes_the_file(export: Export) -> None:
    text = interpolated(export("compose", raw=True)["compose.yaml"])
    read = compose_spec.PyCompose.from_yaml(text)
    read.validate()  # every network, volume and secret that is used is there
    assert set(read.service_names()) == {"engine", "triton-1", "triton-2", "gateway", "prometheus", "grafana"}
    broken = compose_spec.PyCompose.from_yaml(text.replace("- engines\n", "- enginez\n", 1))
    with pytest.raises(ValueError, match="enginez"):
        broken.validate()


@needs_compose_schema
def test_the_file_fits_the_published_schema(export: Export) -> None:
    schema = json.loads(COMPOSE_SCHEMA.read_text())
    validator = jsonschema.Draft201909Validator(schema)
    found = yaml.safe_load(interpolated(export("compose", raw=True)["compose.yaml"]))
    assert [error.message for error in validator.iter_errors(found)] == []
    found["services"]["gateway"]["port"] = 8080
    assert [error.message for error in validator.iter_errors(found)]


def test_every_file_that_is_mounted_is_in_the_export_or_named_in_its_readme(export: Export, tmp_path: Path) -> None:
    found = export("compose")
    out = tmp_path / "out"
    for service in found["compose.yaml"]["services"].values():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert (out / mount["source"]).exists()
    for secret in found["compose.yaml"]["secrets"].values():
        assert secret["file"].removeprefix("./") in found["README.md"]
        assert not (out / secret["file"]).exists()


def test_only_the_gateway_is_published_and_tritons_see_no_other_network(export: Export) -> None:
    found = services(export)
    published = {name: service.get("ports", []) for name, service in found.items()}
    assert published.pop("gateway") == ["127.0.0.1:8080:8080", "127.0.0.1:2345:2345"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert not published["triton-1"] + published["triton-2"] + published["engine"]
    assert found["triton-1"]["networks"] == ["engines"]


def test_the_gateway_asks_every_service_of_every_triton_and_wants_keys(export: Export, registry: Path) -> None:
    push(registry, "rtx4090", device="rtx4090", sm=89, services=2)
    found = services(export)
    given = doors.gateway.make_context("gateway", found["gateway"]["command"][2:]).params
    hosts = [name for name in found if name.startswith("triton-")]
    assert given["tritons"] == tuple(f"http://{host}:{port}" for host in hosts for port in (8000, 8010))
    assert given["metrics"] == tuple(f"http://{host}:{port}/metrics" for host in hosts for port in (8002, 8012))
    assert (given["model_name"], given["max_queue"], given["insecure_open"]) == ("my-llama", 100, False)
    assert found["gateway"]["secrets"] == [given["keys"].name]


def test_each_replica_has_gpus_and_a_log_of_its_own(export: Export, registry: Path) -> None:
    push(registry, "rtx4090", device="rtx4090", sm=89, gpus=2)
    found = services(export)
    tritons = [service for name, service in found.items() if name.startswith("triton-")]
    ids = [one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for one in tritons]
    assert ids == [["0", "1"], ["2", "3"]]
    contexts = [serving.serve.make_context("serve", one["command"][2:]).params for one in tritons]
    assert len({given["log"] for given in contexts}) == 2
    assert {given["drain_s"] for given in contexts} == {45}
    assert tritons[0]["stop_grace_period"] == "60s"


def test_containers_write_to_nothing_but_what_they_are_given(export: Export) -> None:
    for name, service in services(export).items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert name in ("prometheus", "grafana") or service["user"].startswith("${SCALELLM_UID")


def test_a_dollar_in_a_command_is_not_compose_s_to_fill_in(export: Export) -> None:
    address = "scalellm-toolchain @ https://example.com/a$HOME/x.whl"
    assert address.replace("$", "$$") in services(export, DEPLOYMENT, "--install", address)["engine"]["command"][-1]


def test_several_kinds_of_gpu_are_refused(export: Export) -> None:
    with pytest.raises(PlanError, match="compose is for the GPUs of one machine") as found:
        export("compose", DEPLOYMENT.replace("[rtx4090]", "[rtx4090, l4]"))
    assert "export kubernetes" in found.value.hint
