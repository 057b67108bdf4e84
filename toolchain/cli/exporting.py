"""The verb ``deploy export``: a deployment as SkyServe, Kubernetes or compose read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, open_screen
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.exports.prices import Offer
    from toolchain.exports.wanted import Packaged, Wanted
    from toolchain.fleet.deployment import Deployment
    from toolchain.registry import Store

_FORMATS = ("skyserve", "kubernetes", "compose")


@click.command()
@click.argument("format_", type=click.Choice(_FORMATS), metavar="|".join(_FORMATS))
@click.argument("file", type=PATH, metavar="DEPLOYMENT.yaml")
@click.option("-o", "--out", type=PATH, required=True, metavar="DIR", help="Where the files go.")
@click.option(
    "--registry",
    required=True,
    envvar="SCALELLM_REGISTRY",
    metavar="FOLDER|URL",
    help="Where the packages are (scalellm model push). [env: SCALELLM_REGISTRY]",
)
@click.option(
    "--package",
    "packages",
    multiple=True,
    metavar="RECIPE=NAME[:TAG|@DIGEST]",
    help="The package of a recipe. [default: the latest of the model with the recipe's name]",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="[DEVICE=]IMAGE",
    help="The container image. [default: NVIDIA's Triton image of the TensorRT-LLM that built the engine]",
)
@click.option(
    "--install",
    metavar="REQUIREMENT|none",
    help="What pip installs in it: scalellm from an index or an address of yours; none: the image has it.",
)
@click.option("--namespace", default="default", show_default=True, metavar="NAME", help="kubernetes: where.")
@click.option(
    "--claim", metavar="NAME", default="", help="kubernetes: the PersistentVolumeClaim that has the registry."
)
@click.option(
    "--target-qps", type=click.FloatRange(0, min_open=True), help="skyserve: requests per second for each replica."
)
@click.option("--on-demand", is_flag=True, help="skyserve: no spot machines.")
@click.option("--force", is_flag=True, help="Write over files that say something else.")
@common
def export(format_: str, file: Path, out: Path, force: bool, json_output: bool, verbose: int, **flags: Any) -> None:
    """Write a deployment as another system reads it: SkyServe's service, Kubernetes' manifests, or a compose file.

    Engines come from a registry, pinned by their digests, into NVIDIA's image of their release. No secret is written:
    the README.md beside the files says how keys get there. Files that were changed since are not written over.

    \b
    Examples:
      scalellm deploy export skyserve DEPLOYMENT.yaml -o sky --registry s3://bucket/models --install WHEEL
      scalellm deploy export kubernetes DEPLOYMENT.yaml -o here --registry /mnt/models --claim models --install WHEEL
      scalellm deploy export compose DEPLOYMENT.yaml -o here --registry /mnt/models --image MINE --install none
    """
    from toolchain import exports
    from toolchain.exports import prices

    screen = open_screen(json_output, verbose)
    wanted = _wanted(screen, file, format_, **flags)
    known = prices.offers(wanted) if format_ == "skyserve" else []
    prices.check_budget(wanted, known)
    files = exports.FORMATS[format_](wanted)
    exports.write(files, out, force=force)
    screen.emit(
        {
            "endpoint": wanted.name,
            "folder": out,
            "files": sorted(files),
            "packages": {kind.label: kind.package for kind in wanted.kinds},
            "images": {kind.label: kind.image for kind in wanted.kinds},
            "offers": [vars(one) for one in known],
        }
    )
    _tell_offers(screen, wanted, known)
    screen.say(f"written: {out} ({len(files)} files)")
    screen.say(f"Next: {out / 'README.md'}")


@click.command()
@click.argument("file", type=PATH, metavar="DEPLOYMENT.yaml")
@click.option("-o", "--out", type=PATH, required=True, metavar="DIR", help="Where the files go.")
@click.option("--force", is_flag=True, help="Write over files that say something else.")
@common
def dashboards(file: Path, out: Path, force: bool, json_output: bool, verbose: int) -> None:
    """Write a compose file with Prometheus and Grafana for an endpoint that runs here: load, replicas, cost.

    \b
    Example:
      scalellm deploy dashboards DEPLOYMENT.yaml -o dashboards
    """
    from toolchain import exports
    from toolchain.exports import watching
    from toolchain.fleet.deployment import load_deployment

    screen = open_screen(json_output, verbose)
    deployment = load_deployment(file)
    files = watching.files(deployment)
    exports.write(files, out, force=force)
    screen.emit({"endpoint": deployment.endpoint, "folder": out, "files": sorted(files)})
    screen.say(f"written: {out} ({len(files)} files)\nNext: {out / 'README.md'}")


def _wanted(
    screen: Screen,
    file: Path,
    format_: str,
    *,
    registry: str,
    packages: tuple[str, ...],
    images: tuple[str, ...],
    install: str | None,
    claim: str,
    on_demand: bool,
    **more: Any,
) -> Wanted:
    """Reads the deployment, its recipes and their packages. Raises ScalellmError."""
    from toolchain import __version__
    from toolchain.device import device
    from toolchain.exports import commands
    from toolchain.exports.wanted import Wanted, kinds_of, named_for
    from toolchain.fleet.deployment import load_deployment
    from toolchain.problems import read_text
    from toolchain.registry import Folder, open_store

    deployment = load_deployment(file)
    store = open_store(registry)
    is_folder = isinstance(store, Folder)
    _check_registry(registry, format_, claim, is_folder=is_folder)
    packaged = _packages(screen, deployment, store, packages)
    devices = {str(one.passport["device"]): str(one.passport["device"]) for one in packaged.values()}
    kinds = kinds_of(deployment, packaged, named_for(images, devices, "--image"))
    cpu = any(device(name).is_cpu for name in devices)
    needed, beside = commands.extras(registry, is_folder=is_folder, cpu=cpu)
    if install is None:
        raise RecipeError(
            "--install: where the machines get scalellm from is not known; it is on no public index",
            hint=f"--install 'scalellm-toolchain[{needed}] @ https://HOST/scalellm_toolchain-{__version__}-py3-none-any.whl'"
            "\n--install none   # an --image that has it",
        )
    return Wanted(
        deployment=deployment,
        text=read_text(file, "deployment"),
        kinds=kinds,
        registry=str(Path(registry.removeprefix("file://")).expanduser().absolute()) if is_folder else registry,
        is_folder=is_folder,
        install=() if install == "none" else (install, *beside),
        claim=claim,
        spot=not on_demand,
        **more,
    )


def _packages(screen: Screen, deployment: Deployment, store: Store, packages: tuple[str, ...]) -> dict[str, Packaged]:
    """The package of each recipe, by the recipe as the deployment names it."""
    from toolchain.exports.wanted import Packaged, named_for
    from toolchain.recipe import load_recipe
    from toolchain.registry import Reference

    recipes = {name: load_recipe(name) for name in deployment.recipes}
    spelled = {**{recipe.name: name for name, recipe in recipes.items()}, **{name: name for name in recipes}}
    chosen = named_for(packages, spelled, "--package")
    found = {}
    for name, recipe in recipes.items():
        reference = Reference.parse(chosen.get(name, chosen.get("", recipe.name)))
        found[name] = Packaged.read(store, reference, recipe)
        if found[name].unverified:
            screen.note(f"note: {recipe.name}: its server will refuse it: {found[name].unverified}")
    return found


def _check_registry(registry: str, format_: str, claim: str, *, is_folder: bool) -> None:
    from toolchain.registry.remote import shown

    if shown(registry) != registry:
        raise RecipeError(
            f"{shown(registry)}: this address holds a user or a password, and they would be in the files",
            hint="Give them to the registry's package in the environment; the README.md of the export says how",
        )
    if format_ == "kubernetes" and is_folder and not claim:
        raise RecipeError(
            f"{registry}: a pod does not see this folder",
            hint="--claim NAME: a PersistentVolumeClaim that has the same",
        )


def _tell_offers(screen: Screen, wanted: Wanted, known: list[Offer]) -> None:
    if not known:
        return
    budget = wanted.deployment.max_price_per_hour
    limit = f"at most {budget:g} dollars an hour" if budget else "no max_price_per_hour"
    screen.table(
        f"One replica for an hour, in US dollars; {wanted.least} to {wanted.most} replicas, {limit}",
        ("device", "kind", "from", "vendor", "region", "date", "source"),
        [
            (one.label, one.kind, f"{one.usd_per_hour:.2f}", one.vendor, one.region, one.date, one.source)
            for one in known
        ],
    )
