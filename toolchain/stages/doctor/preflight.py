"""A plan against the machine that is to build and serve its engine: one line each, with what to do. Looks at nothing.

Sizes are those of ``build_peaks`` and of the plan's memory. Where a size is derived, too little of it is a warning and
not a refusal, unless it cannot be enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolchain.errors import EndpointError
from toolchain.gpu import Gpu
from toolchain.hosts.probe import Machine
from toolchain.installed import is_release
from toolchain.planning.build_peaks import BUILD_RAM_FACTOR, Peak
from toolchain.planning.plan import Plan
from toolchain.release import Release, order
from toolchain.servers.triton.command import PORTS_APART, Ports
from toolchain.servers.triton.ports import check_ports
from toolchain.stages.doctor.finding import Finding, absent, fail, good, warning
from toolchain.stages.doctor.probe import Target
from toolchain.units import format_bytes

_FORWARD = "https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html"


def preflight(
    plan: Plan, peaks: Sequence[Peak], target: Target, there: Machine, here: Machine, *, present_bytes: int = 0
) -> list[Finding]:
    """Every line. ``there`` builds the engine; ``here`` quantizes and converts, and is the same but behind ssh.

    ``present_bytes``: what earlier runs left in the recipe's folder, which is counted in the plan's disk.
    """
    needs: dict[tuple[str, str], Peak] = {(peak.stage, peak.resource): peak for peak in peaks}
    found = [good("plan", f"{plan.recipe.name}: {plan.weights.name} weights, {plan.kv.name} cache, {plan.backend}")]
    builds = plan.backend == "tensorrt_engine"
    if plan.release is not None:
        found += [*_gpus(plan, there), *_vram(plan, needs.get(("trtllm-build", "vram")), target, there)]
        found += _driver(plan, plan.release, there)
        found += _kernels(plan, plan.release)
    found += _packages(plan, here)
    found += _ram("quantize", needs.get(("quantize", "ram")), here, least=1.0)
    if builds:
        found += _ram("convert", needs.get(("convert", "ram")), here, least=1.0)
        found += _ram("trtllm-build", needs.get(("trtllm-build", "ram")), there, least=1 / BUILD_RAM_FACTOR)
    if plan.device.is_cpu:
        total = plan.memory.total
        serving = Peak(
            "serving", "ram", total, f"{plan.services} x weights, cache and process", "toolchain/planning/memory.py"
        )
        found += _ram("serving", serving, here, least=1.0)
    found += _disk(needs, target, here, there, present_bytes)
    if plan.release is not None:
        found += _tensorrt_llm(plan, plan.release, target, there)
        found += _container(plan.release, target, there)
    return [*found, *_ports(plan, target, there)]


def fitting(plan: Plan, there: Machine) -> list[Gpu]:
    """The GPUs that the plan's engine runs on: of its SM."""
    return [gpu for gpu in there.gpus if gpu.sm == plan.device.sm]


def _gpus(plan: Plan, there: Machine) -> Iterator[Finding]:
    device, ranks = plan.device, plan.tp * plan.pp
    sm = f"SM {device.sm}"
    if not there.gpus:
        yield fail("gpu", "no GPU, or no driver", f"A machine with a {device.title}: --on ssh:HOST")
        return
    seen = ", ".join(f"{gpu.name} ({f'SM {gpu.sm}' if gpu.sm else 'SM unknown'})" for gpu in there.gpus)
    fits = fitting(plan, there)
    if not fits:
        known = next((gpu.device for gpu in there.gpus if gpu.device), None)
        instead = f"A recipe with device: {known.name}, or a" if known else "A"
        yield fail("gpu", f"{seen}: an engine for {sm} runs on {sm} only", f"{instead} machine with a {device.title}")
        return
    if len(fits) < ranks:
        yield fail("gpu", f"{seen}: tp {plan.tp} x pp {plan.pp} takes {ranks} GPUs of {sm}", "parallel: a smaller tp")
        return
    same = [gpu for gpu in fits if gpu.device == device]
    if len(same) < ranks:
        hint = "Measure there: its memory and speed are not those of the plan, and kernels are chosen by timing"
        yield warning("gpu", f"{seen}: {sm} as the {device.title}, but another card", hint)
    elif all(gpu.is_slice for gpu in same):
        yield warning("gpu", f"{seen}: a slice has less memory and speed than the plan counts with", "Measure there")
    else:
        yield good("gpu", seen)


def _vram(plan: Plan, peak: Peak | None, target: Target, there: Machine) -> Iterator[Finding]:
    """Free memory of the best GPUs against what the build takes there; and against what serving takes."""
    ranks = plan.tp * plan.pp
    best = sorted(fitting(plan, there), key=lambda gpu: gpu.free_bytes or 0, reverse=True)[:ranks]
    yield from _choice(target, there, best)
    for gpu in best:
        name = f"vram {gpu.index}"
        if gpu.free_bytes is None or gpu.total_bytes is None:
            yield warning(name, f"{gpu.name}: nvidia-smi does not say its memory", "pip install nvidia-ml-py")
            continue
        others = "; ".join(map(str, gpu.processes))
        holds = f", others hold {others}" if others else ""
        text = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} are free{holds}"
        stop = f"Stop {others}" if others else "Another GPU, or smaller limits: scalellm plan shows each term"
        if peak is not None and gpu.free_bytes < peak.bytes:
            yield fail(name, f"{text}; trtllm-build takes {format_bytes(peak.bytes)} at least", stop)
        elif gpu.free_bytes < plan.memory.total:
            short = format_bytes(plan.memory.total - gpu.free_bytes)
            yield warning(name, f"{text}; serving takes {format_bytes(plan.memory.total)}, {short} more", stop)
        else:
            yield good(name, text)


def _choice(target: Target, there: Machine, best: Sequence[Gpu]) -> Iterator[Finding]:
    """A build takes the first GPUs unless it is told others."""
    first = [gpu.index for gpu in there.gpus][: len(best)]
    chosen = sorted(gpu.index for gpu in best)
    if chosen != first and target.kind in ("local", "container"):
        named = ",".join(map(str, chosen))
        text = f"the build takes GPU {','.join(map(str, first))} unless it is told; GPU {named} fits, and has more free"
        yield warning("gpu choice", text, f"--on {target.kind}:{named}")


def _kernels(plan: Plan, release: Release) -> Iterator[Finding]:
    rebuild = release.rebuild_for(plan.backend, plan.device.sm, plan.weights.name)
    if rebuild:
        hint = f"scalellm commands --recipe {plan.recipe.name}   # how it is built for {rebuild.architectures}"
        yield warning("kernels", rebuild.told(plan.weights.name), hint)


def _packages(plan: Plan, here: Machine) -> Iterator[Finding]:
    """Python packages of this machine: what quantizes, and on a CPU what runs the engine."""
    needed = {"torch": "quantize", "transformers": "quantize"} if plan.weights.quant_algo or plan.calibrates else {}
    if plan.device.is_cpu:
        needed |= {"openvino": "cpu", "openvino-genai": "cpu", "nvidia-pytriton": "cpu", "transformers": "cpu"}
    for name in (one for one in needed if one not in here.packages):
        yield fail(name, "not installed", f"pip install 'scalellm-toolchain[{needed[name]}]'")


def _driver(plan: Plan, release: Release, there: Machine) -> Iterator[Finding]:
    drivers = {gpu.driver for gpu in fitting(plan, there) or there.gpus}
    for driver in sorted(drivers):
        try:
            enough = order(driver) >= order(release.driver)
        except ValueError:
            yield warning("driver", f"{driver!r} is no version; {release.driver} or newer is needed")
            continue
        about = " (not confirmed to the last digit)" if "driver" in release.unconfirmed else ""
        floor = f"TensorRT-LLM {release.version} (CUDA {release.cuda}) wants {release.driver} or newer{about}"
        if enough:
            yield good("driver", f"{driver}; {floor}")
        elif plan.device.data_center:
            hint = f"Install it; or use the image, whose CUDA compatibility package takes some older ones: {_FORWARD}"
            yield warning("driver", f"{driver}; {floor}", hint)
        else:
            yield fail("driver", f"{driver}; {floor}", f"Install driver {release.driver} or newer, then reboot")


def _ram(stage: str, peak: Peak | None, machine: Machine, *, least: float) -> Iterator[Finding]:
    """``least``: the share of the peak below which it cannot work; between, it may be killed."""
    if peak is None:
        return
    name, needs = f"ram {stage}", format_bytes(peak.bytes)
    if machine.ram_total is None or machine.ram_free is None:
        yield warning(name, f"not known; {needs} are needed")
        return
    text = f"{format_bytes(machine.ram_free)} free of {format_bytes(machine.ram_total)}; {stage} takes {needs}"
    more = "Close other programs" if machine.ram_total >= peak.bytes else "Add swap, or use a larger machine"
    if machine.ram_free >= peak.bytes:
        yield good(name, text)
    elif machine.ram_total >= peak.bytes * least:
        yield warning(name, f"{text} ({peak.how})", f"{more}: the system kills what does not fit ({peak.source})")
    else:
        yield fail(name, f"{text} ({peak.how})", "A machine with more memory: --on ssh:HOST")


def _disk(
    needs: dict[tuple[str, str], Peak], target: Target, here: Machine, there: Machine, present: int
) -> Iterator[Finding]:
    """All stages write here; behind ssh the converted checkpoint and the engine are there too."""
    whole = max((peak.bytes for (_, resource), peak in needs.items() if resource == "disk"), default=0)
    yield from _room("disk", here, max(0, whole - present), "with what is there already" if present else "")
    if target.host:
        before = needs.get(("quantize", "disk"))
        yield from _room(f"disk {target.host}", there, whole - (before.bytes if before else 0), "")


def _room(name: str, machine: Machine, needed: int, why: str) -> Iterator[Finding]:
    if machine.disk_free is None:
        yield warning(name, f"not known; {format_bytes(needed)} are needed")
        return
    text = f"{format_bytes(machine.disk_free)} free in {machine.disk}; {format_bytes(needed)} are needed {why}".rstrip()
    hint = "Make room, or choose another place: --work DIR"
    yield good(name, text) if machine.disk_free >= needed else fail(name, text, hint)


def _tensorrt_llm(plan: Plan, release: Release, target: Target, there: Machine) -> Iterator[Finding]:
    """The installed TensorRT-LLM; behind ssh, and to serve weights, a container of the image does as well."""
    name, found, image = "tensorrt-llm", there.tensorrt_llm, release.image
    tool = there.engine() if there.usable else ""
    wrong = _unusable(plan, release, target, there)
    elsewhere = target.host or plan.backend != "tensorrt_engine"
    if target.kind == "container":
        shown = f"{found} is installed; " if found else ""
        yield absent(name, f"{shown}the one of the image is used")
    elif not wrong:
        yield good(name, f"{found} ({there.builder or 'python3'})")
    elif elsewhere and tool in there.images:
        yield good(name, f"{wrong}; {tool} has {image}, which is used instead")
    elif target.host and tool:
        yield fail(name, f"{wrong}, and {tool} has no {image}", f"ssh {target.host} {tool} pull {image}")
    else:
        inside = f"Run inside {image}" + ("" if target.host else ", or build with --on container")
        pin = f', or pin the recipe: tensorrt_llm: "{found}", if scalellm knows that release' if found else ""
        yield fail(name, wrong, inside + pin)


def _unusable(plan: Plan, release: Release, target: Target, there: Machine) -> str:
    """Why the installed TensorRT-LLM does not do; empty where it does."""
    if plan.backend == "tensorrt_engine" and there.builder is None:
        return f"no trtllm-build on PATH {target.where}"
    if there.tensorrt_llm is None:
        return f"not installed {target.where}"
    if not is_release(there.tensorrt_llm, release.version):
        both = f"{there.tensorrt_llm} is installed and the plan is for {release.version}"
        return f"{both}: engines do not cross releases"
    return ""


def _container(release: Release, target: Target, there: Machine) -> Iterator[Finding]:
    needed = target.kind == "container"
    bad = fail if needed else absent
    image = release.image
    if not there.tools:
        hint = "Install docker and NVIDIA's container toolkit" if needed else ""
        yield bad("container", "neither docker nor podman", hint)
    elif not there.usable:
        tool, reason = next(iter(there.tools.items()))
        yield bad("container", f"{tool} does not answer: {reason}", f"{tool} info")
    else:
        yield good("container", ", ".join(there.usable))
        if not there.gpu_toolkit and needed:
            hint = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html"
            yield warning("gpus in containers", "neither nvidia-ctk nor nvidia-container-cli is on PATH", hint)
        if there.images:
            yield good("image", image)
        else:
            yield bad("image", f"{image} is not there", f"{there.usable[0]} pull {image}")


def _ports(plan: Plan, target: Target, there: Machine) -> Iterator[Finding]:
    asked, taken = plan.recipe.serve, list[str]()
    first = {"http": asked.http_port, "grpc": asked.grpc_port, "metrics": asked.metrics_port}
    places = [{name: port + PORTS_APART * number for name, port in first.items()} for number in range(plan.services)]
    hint = "serve: another port in the recipe, or a flag of scalellm serve"
    for place in places:
        if target.host:
            taken += [f"{name} port {port} is taken" for name, port in place.items() if port in there.listening]
            continue
        try:
            check_ports(asked.host, Ports(**place))
        except EndpointError as error:
            taken.append(error.message)
            hint = error.hint
    if taken:
        yield fail("ports", f"{'; '.join(taken)} ({target.where})", hint)
    else:
        where = target.where if target.host else f"on {asked.host}"
        yield good("ports", f"{', '.join(str(port) for place in places for port in place.values())} are free {where}")
