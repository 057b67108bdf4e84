"""The manifests, read against Kubernetes' published schemas and against what our gateway really has."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.exports.conftest import Export
from tests.exports.packages import DEPLOYMENT
from toolchain.cli import serving
from toolchain.device import devices
from toolchain.gateway.metrics import Metrics

VERSION = "1.37"
TWO = DEPLOYMENT.replace("[rtx4090]", "[rtx4090, l4]")
CLAIM = ("--claim", "models")


def manifests(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: one
        for name, one in found.items()
        if isinstance(one, dict) and "kind" in one and name != "kustomization.yaml"
    }


def pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in manifests(found).values() if one["kind"] == "Deployment"]


@pytest.mark.parametrize("text", [DEPLOYMENT, TWO], ids=["one device", "two"])
def test_every_manifest_fits_the_published_schema_with_no_key_too_many(export: Export, text: str) -> None:
    checked = manifests(export("kubernetes", text, *CLAIM))
    for one in checked.values():
        kubernetes_validate.validate(one, VERSION, strict=True)
    kinds = sorted(one["kind"] for one in checked.values())
    devices_ = 2 if text == TWO else 1
    assert kinds == sorted(
        ["ConfigMap", "Service", "PodDisruptionBudget", "NetworkPolicy"]
        + ["Deployment", "HorizontalPodAutoscaler"] * devices_
    )


def test_the_schema_finds_a_key_that_kubernetes_does_not_have(export: Export) -> None:
    deployment = manifests(export("kubernetes", DEPLOYMENT, *CLAIM))["deployment-rtx4090.yaml"]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 70
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here: it would put the manifests together")
def test_kustomize_puts_every_manifest_into_the_namespace(export: Export, tmp_path: Path) -> None:
    found = manifests(export("kubernetes", DEPLOYMENT, *CLAIM, "--namespace", "llms"))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "out")], capture_output=True, text=True, timeout=120, check=True
    )
    built = list(yaml.safe_load_all(done.stdout))
    assert sorted(one["kind"] for one in built) == sorted(one["kind"] for one in found.values())
    assert {one["metadata"]["namespace"] for one in built} == {"llms"}


def test_a_pod_runs_without_root_and_writes_to_nothing_but_its_own_volumes(export: Export) -> None:
    for pod in pods(export("kubernetes", TWO, *CLAIM)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        volumes = {one["name"]: one for one in pod["volumes"]}
        used = set()
        for container in (*pod["initContainers"], *pod["containers"]):
            context = container["securityContext"]
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
            assert context["capabilities"] == {"drop": ["ALL"]}
            for mount in container["volumeMounts"]:
                used.add(mount["name"])
                assert "emptyDir" in volumes[mount["name"]] or mount["readOnly"]
        assert used == set(volumes)  # each is used, and there is no other


def test_a_pod_goes_to_nodes_whose_gpu_is_called_as_the_drivers_tools_call_it(export: Export) -> None:
    found = export("kubernetes", TWO, *CLAIM)
    for device in ("rtx4090", "l4"):
        pod = found[f"deployment-{device}.yaml"]["spec"]["template"]["spec"]
        term = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        (match,) = term[0]["matchExpressions"]
        assert (match["key"], match["operator"]) == ("nvidia.com/gpu.product", "In")
        assert {name.replace("-", " ") for name in match["values"]} == {
            name.replace("-", " ") for name in devices()[device].reported_as
        }
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
        assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_triton_listens_on_the_pods_loopback_and_the_gateway_asks_for_keys(export: Export) -> None:
    (pod,) = pods(export("kubernetes", DEPLOYMENT, *CLAIM))
    (server,) = pod["containers"]
    given = serving.serve.make_context("serve", server["command"][2:]).params
    assert given["gateway"]  # then --host is the gateway's, and Triton's ports are on 127.0.0.1
    assert (given["host"], given["insecure_open"], given["model_name"]) == ("0.0.0.0", False, "my-llama")
    assert (given["max_queue"], given["drain_s"]) == (100, 45)
    exposed = {one["containerPort"] for one in server["ports"]}
    assert exposed == {given["port"], given["predict_port"]}
    assert not exposed & {given["http_port"], given["grpc_port"], given["metrics_port"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    places = {one["mountPath"]: volumes[one["name"]] for one in server["volumeMounts"]}
    assert places[str(given["keys"].parent)]["secret"]["secretName"] == "my-llama-keys"
    recipes = places[str(Path(given["recipe"]).parent)]["configMap"]["name"]
    assert recipes == "my-llama-recipes"


def test_the_server_gets_the_recipe_that_its_package_was_built_from(export: Export) -> None:
    found = export("kubernetes", TWO, *CLAIM)
    for pod in pods(found):
        command = pod["containers"][0]["command"]
        name = Path(command[command.index("--recipe") + 1]).name
        assert f"device: {name.removesuffix('.yaml')}" in found["recipes.yaml"]["data"][name]


def test_a_pod_is_ready_by_a_generated_token_and_ended_only_when_its_gateway_hangs(export: Export) -> None:
    """And a request that has begun has the time that the deployment gives it."""
    (pod,) = pods(export("kubernetes", DEPLOYMENT, *CLAIM))
    (server,) = pod["containers"]
    asked = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    given = serving.serve.make_context("serve", server["command"][2:]).params
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > given["start_timeout_s"]
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + given["drain_s"]


def test_the_service_and_the_network_let_clients_to_the_gateways_doors_alone(export: Export) -> None:
    found = export(
        "kubernetes", DEPLOYMENT.replace("max_queue", "ports: {openai: 80, predict: false}\nmax_queue"), *CLAIM
    )
    (pod,) = pods(found)
    doors = [one["containerPort"] for one in pod["containers"][0]["ports"]]
    ports = found["service.yaml"]["spec"]["ports"]
    assert [(one["port"], one["targetPort"]) for one in ports] == [(80, doors[0])]
    (rule,) = found["network.yaml"]["spec"]["ingress"]
    assert [one["port"] for one in rule["ports"]] == doors
    assert found["network.yaml"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "--no-predict" in pod["containers"][0]["command"]


def test_selectors_find_the_pods(export: Export) -> None:
    found = export("kubernetes", TWO, *CLAIM)
    labels = [
        one["spec"]["template"]["metadata"]["labels"]
        for one in manifests(found).values()
        if one["kind"] == "Deployment"
    ]
    every = [
        found["service.yaml"]["spec"]["selector"],
        found["disruptions.yaml"]["spec"]["selector"]["matchLabels"],
        found["network.yaml"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= one.items() for selector in every for one in labels)
    for kind in ("rtx4090", "l4"):
        selector = found[f"deployment-{kind}.yaml"]["spec"]["selector"]["matchLabels"]
        assert sum(selector.items() <= one.items() for one in labels) == 1


def test_autoscalers_read_metrics_that_a_gateway_publishes(export: Export) -> None:
    published = Metrics().text({}, {}).decode()
    scaler = export("kubernetes", DEPLOYMENT, *CLAIM)["autoscaler-rtx4090.yaml"]["spec"]
    asked = {one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"] for one in scaler["metrics"]}
    assert all(f"\n{name} " in published for name in asked)  # a gauge without labels, from the first moment on
    assert asked["scalellm_gateway_running"] == str(math.floor(0.75 * 16))  # of max_batch_size
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)


def test_an_autoscaled_deployment_has_no_number_that_would_undo_the_autoscalers(export: Export) -> None:
    scaled = export("kubernetes", DEPLOYMENT, *CLAIM)
    assert "replicas" not in scaled["deployment-rtx4090.yaml"]["spec"]
    fixed = export("kubernetes", DEPLOYMENT.replace(", max: 6", ""), *CLAIM, "--force")
    assert fixed["deployment-rtx4090.yaml"]["spec"]["replicas"] == 2
    assert "autoscaler-rtx4090.yaml" not in fixed["told"]["files"]


def test_a_kind_without_a_share_is_told_instead_of_scaled_from_zero(export: Export) -> None:
    found = export("kubernetes", TWO.replace("{min: 2, max: 6}", "{min: 1, max: 4}"), *CLAIM)
    assert found["deployment-l4.yaml"]["spec"]["replicas"] == 0
    assert "autoscaler-l4.yaml" not in found["told"]["files"]
    assert "kubectl scale deployment my-llama-l4" in found["README.md"]


def test_a_registrys_credentials_are_a_secret_of_the_init_container_alone(export: Export, registry: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(registry), "/models", recursive=True)
    try:
        found = export("kubernetes", DEPLOYMENT, "--registry", "memory://models")
    finally:
        store.rm("/models", recursive=True)
    (pod,) = pods(found)
    assert pod["initContainers"][0]["envFrom"] == [{"secretRef": {"name": "my-llama-registry", "optional": True}}]
    assert "envFrom" not in pod["containers"][0]
    assert "memory://models" in pod["initContainers"][0]["command"][-1]
    assert "registry" not in [one["name"] for one in pod["volumes"]]
    json.dumps(found["told"])


def test_a_folder_that_pods_do_not_see_needs_a_claim(export: Export) -> None:
    from toolchain.errors import RecipeError

    with pytest.raises(RecipeError, match="a pod does not see this folder") as found:
        export("kubernetes", DEPLOYMENT)
    assert "--claim NAME" in found.value.hint
