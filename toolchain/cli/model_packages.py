"""The verbs that share a model: package, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import common, host_flag, open_screen, place_flags
from toolchain.cli.model_flags import build, home_flag, named, registry_at, registry_flag
from toolchain.errors import ArtifactError

if TYPE_CHECKING:
    from toolchain.registry import Manifest, Moved


@click.command()
@named
@click.option(
    "--allow-unverified", is_flag=True, help="Pack an engine that failed or was never verified; says so in it."
)
@host_flag
@place_flags()
@common
def package(name: str, home: Path, allow_unverified: bool, json_output: bool, verbose: int, **flags: Any) -> None:
    """Build what is stale of a model, and pack it: repository, card, passport and verdict under one digest.

    The package goes into the home's registry; files are linked, so it takes no second room on the same disk. An engine
    that was found wrong, or was never verified though its recipe or its plan asks for that, is refused.

    \b
    Example:
      scalellm model package -n llama
    """
    from toolchain.pipeline.packing import pack
    from toolchain.registry.card import read, registry_of

    screen = open_screen(json_output, verbose)
    card = read(home, name)
    build(screen, card, **flags)
    manifest, admission = pack(card, registry_of(home), allow_unverified=allow_unverified)
    for note in admission.notes:
        screen.note(f"note: {note}")
    screen.emit({**_document(manifest), "unverified": admission.unverified, "registry": registry_of(home).url})
    screen.say(f"packaged: {_spoken(manifest)}")
    screen.say(f"Next: scalellm model push -n {name} --registry FOLDER|URL")


@click.command()
@named
@registry_flag
@click.option(
    "-t", "--tag", "tags", multiple=True, metavar="TAG", help="Name this package so, too: v1. [default: latest]"
)
@common
def push(name: str, home: Path, registry: str | None, tags: tuple[str, ...], json_output: bool, verbose: int) -> None:
    """Copy a model's package into a registry. Files that are there already are not sent again.

    An address needs its own package: s3:// s3fs, gs:// gcsfs, abfs:// adlfs, sftp:// paramiko.

    \b
    Examples:
      scalellm model push -n llama --registry /mnt/models
      scalellm model push -n llama --registry s3://bucket/models --tag v1
    """
    from toolchain.pipeline.packing import is_packed
    from toolchain.registry import push as send
    from toolchain.registry.card import read, registry_of

    screen = open_screen(json_output, verbose)
    card = read(home, name)
    manifest = card.package
    if manifest is None:
        raise ArtifactError(f"{name} is not packaged yet", hint=f"scalellm model package -n {name}")
    if not is_packed(card):
        screen.note(f"note: {name} was built again since: this is the package of before (scalellm model package)")
    target = registry_at(registry, home)
    moved = send(manifest, registry_of(home), target, screen, tags)
    screen.emit({**_moved(moved), "registry": target.url, "tags": [*tags, "latest"]})
    screen.say(f"pushed: {_spoken(manifest)} to {target.url}: {_told(moved)}")
    screen.say(f"Next: scalellm model pull -n {name} --registry {target.url}   # on another machine")


@click.command()
@click.option(
    "-n", "--name", "reference", required=True, metavar="NAME[:TAG|@DIGEST]", help="The model, or one package."
)
@home_flag
@registry_flag
@common
def pull(reference: str, home: Path, registry: str | None, json_output: bool, verbose: int) -> None:
    """Fetch a model's package from a registry, check every byte, and make it a model here, ready to deploy.

    An interrupted pull goes on where it was. Only files of known kinds come in, and no code but scalellm's own. An
    engine is a program all the same: pull from registries that you trust.

    \b
    Examples:
      scalellm model pull -n llama --registry s3://bucket/models
      scalellm model pull -n llama:v1
      scalellm model pull -n llama@3f2a91c07b6e
    """
    from toolchain.pipeline.packing import check_foreign, install
    from toolchain.registry import Reference, deployment
    from toolchain.registry import pull as fetch
    from toolchain.registry.card import names, read, registry_of

    screen = open_screen(json_output, verbose)
    meant = Reference.parse(reference)
    if meant.name in names(home):
        _may_be_replaced(read(home, meant.name))
    source = registry_at(registry, home)
    moved = fetch(meant, source, registry_of(home), screen, check=lambda manifest: check_foreign(manifest, source.url))
    if meant.name in names(home):
        with deployment.hold(_may_be_replaced(read(home, meant.name))):
            card = install(home, moved.manifest, registry_of(home))
    else:
        card = install(home, moved.manifest, registry_of(home))
    screen.emit({**_moved(moved), "registry": source.url, "folder": card.folder})
    screen.say(f"pulled: {_spoken(moved.manifest)} from {source.url}: {_told(moved)}")
    screen.say(f"Next: scalellm model deploy -n {meant.name} --local")


def _may_be_replaced(card: Any) -> Any:
    from toolchain.registry import deployment

    if card.work is not None:
        raise ArtifactError(
            f"{card.folder}: the model {card.name} was created here, and a pull would replace it",
            hint=f"scalellm model delete -n {card.name}   # what was built of it stays",
        )
    if deployment.deployed(card):
        raise deployment.busy(card)
    return card


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "digest": manifest.digest,
        "bytes": manifest.total_bytes,
        "files": len(manifest.files),
    }


def _moved(moved: Moved) -> dict[str, Any]:
    return {**_document(moved.manifest), "moved_files": moved.files, "moved_bytes": moved.bytes}


def _spoken(manifest: Manifest) -> str:
    from toolchain.units import format_bytes

    return f"{manifest.name}@{manifest.digest[:12]}, {len(manifest.files)} files, {format_bytes(manifest.total_bytes)}"


def _told(moved: Moved) -> str:
    from toolchain.units import format_bytes

    if not moved.files:
        return "everything was there already"
    return f"{moved.files} files moved ({format_bytes(moved.bytes)}), {format_bytes(moved.kept)} were there already"
