"""The README.md beside an export: what to type, in order, and what nobody has run. Markdown for people; no YAML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from toolchain.exports import commands
from toolchain.exports.commands import KEYS_FILE, KEYS_SECRET
from toolchain.exports.wanted import Wanted


def skyserve(wanted: Wanted, notes: Sequence[str]) -> str:
    secrets = [f'--secret {KEYS_SECRET}="$(cat {KEYS_FILE})"']
    secrets += [f"--secret {name}" for name in commands.credentials(wanted)]
    return _document(
        wanted,
        "SkyServe",
        notes,
        f"""
    scalellm gateway keys add me --keys {KEYS_FILE}     # prints the key once; the file has its hash
    sky serve up service.yaml -n {wanted.name} {" ".join(secrets)}
    sky serve status {wanted.name}                      # shows the address
    sky serve down {wanted.name}

{_pulled(wanted)}
A replica counts as ready while `/ready` says 200: then its engine has generated a token lately. SkyServe's balancer
hears every 20 s which replicas there are, retries connection errors alone, and does not move streams; between it and
the replicas there is plain HTTP, keys and prompts included.""",
    )


def kubernetes(wanted: Wanted, notes: Sequence[str]) -> str:
    secret = "kubectl create secret generic"
    space = f"--namespace {shlex.quote(wanted.namespace)}"
    registry = ""
    if names := commands.credentials(wanted):
        given = " ".join(f'--from-literal={name}="${name}"' for name in names)
        registry = f"    {secret} {wanted.name}-registry {space} {given}\n"
    return _document(
        wanted,
        "Kubernetes",
        notes,
        f"""
    scalellm gateway keys add me --keys {KEYS_FILE}     # prints the key once; the file has its hash
    kubectl create namespace {shlex.quote(wanted.namespace)}     # where there is none yet
    {secret} {wanted.name}-keys {space} --from-file={KEYS_FILE}
{registry}    kubectl apply -k .
    kubectl port-forward {space} service/{wanted.name} {wanted.deployment.ports.openai}

{_pulled(wanted)}
The cluster needs NVIDIA's device plugin with GPU Feature Discovery, whose label `nvidia.com/gpu.product` finds the
nodes; nodes with taints other than `nvidia.com/gpu` are not used. Other namespaces reach the doors if they have the
label `scalellm-client=true`: give it to that of an ingress controller, and to that of Prometheus.

The autoscalers read `scalellm_gateway_running` and `scalellm_gateway_waiting` of the pods from custom.metrics.k8s.io:
Prometheus must scrape the pods (`prometheus/scrape.yaml`, with a key from `scalellm gateway keys add prometheus`), and
prometheus-adapter must be installed; its default rules are enough, since the metrics have the labels `namespace` and
`pod`. GPUs that the cluster does not have are bought by its own autoscaler of nodes. A new version is started beside
the old one (`maxSurge: 1`), which takes the GPUs of one replica more for that time.

Each pod is a whole replica, and the Service spreads the requests: a pod that is drained finishes what it has begun; one
that is lost takes its running streams with it.""",
    )


def compose(wanted: Wanted, notes: Sequence[str]) -> str:
    ports = wanted.deployment.ports
    given = commands.credentials(wanted)
    credentials = f"    export {' '.join(given)}                 # the registry's\n" if given else ""
    return _document(
        wanted,
        "compose",
        notes,
        f"""
    mkdir -p -m 700 secrets
    scalellm gateway keys add me --keys secrets/{KEYS_FILE}          # prints the key once; the file has its hash
    scalellm gateway keys add prometheus --keys secrets/{KEYS_FILE} > secrets/metrics-key
    head -c 18 /dev/urandom | base64 > secrets/grafana-password       # of the user admin
    chmod 644 secrets/*                                               # other users' containers read them
    export SCALELLM_UID="$(id -u)" SCALELLM_GID="$(id -g)"
{credentials}    docker compose up --detach

{_pulled(wanted)}
OpenAI's API is at http://{wanted.deployment.host}:{ports.openai}/v1, Prometheus at http://127.0.0.1:9090, Grafana with
its dashboards at http://127.0.0.1:3000. GPUs need NVIDIA's Container Toolkit. The gateway sends a request to another
Triton when one fails before the first token; a stream that has begun ends with an error.""",
    )


def _pulled(wanted: Wanted) -> str:
    listed = "".join(f"\n    {kind.label}: {kind.package}, in {kind.image}" for kind in wanted.kinds)
    installed = "nothing: the images have scalellm"
    if wanted.install:
        installed = f"`pip install {shlex.join(wanted.install)}`"
    return f"What runs, by digest:\n{listed}\n\nWhat is installed there: {installed}.\n"


def _document(wanted: Wanted, system: str, notes: Sequence[str], body: str) -> str:
    said = "".join(f"\n- {note}" for note in notes)
    said = f"\n\nNot obeyed, or otherwise than the deployment says:\n{said}" if said else ""
    return f"""# {wanted.name} on {system}

Written by `scalellm deploy export`. These files were checked by that system's own reader or published schema; on a real
cluster, cloud or container engine nobody has run them.
{body}{said}
"""
