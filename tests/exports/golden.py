"""The whole export of one deployment on two kinds of GPU, in each format: ``python -m tests.exports.golden``.

The recipes are this folder's own, so that a change of those that ship changes nothing here.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.exports.packages import push
from toolchain.exports import FORMATS, Files
from toolchain.exports.wanted import Packaged, Wanted, kinds_of
from toolchain.fleet.deployment import load_deployment
from toolchain.recipe import load_recipe
from toolchain.registry import Folder, Reference

HERE = Path(__file__).with_name("golden")
INSTALL = ("scalellm-toolchain[gateway,registry] @ https://example.com/scalellm_toolchain-1-py3-none-any.whl", "s3fs")
RECIPES = {"ada": ("rtx4090", 89, 1), "pair": ("a100-80gb", 80, 2)}
"""Recipe -> device, SM, GPUs of a replica."""


def files(format_: str) -> Files:
    """{path: text}"""
    file = HERE / "DEPLOYMENT.yaml"
    deployment = load_deployment(file)
    if format_ == "compose":  # of one machine
        deployment = deployment.model_copy(update={"recipes": deployment.recipes[:1]})
    packaged = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (device, sm, gpus) in RECIPES.items():
            recipe = str(HERE / f"{name}.yaml")
            push(Path(folder), recipe, device=device, sm=sm, gpus=gpus)
            packaged[name] = Packaged.read(Folder(Path(folder)), Reference.parse(name), load_recipe(recipe))
    kinds = kinds_of(deployment, packaged, {})
    wanted = Wanted(
        deployment=deployment,
        text=file.read_text(encoding="utf-8"),
        kinds=kinds,
        registry="s3://bucket/models",
        is_folder=False,
        install=INSTALL,
        namespace="llms",
        target_qps=2.0,
    )
    return FORMATS[format_](wanted)


if __name__ == "__main__":
    for name in FORMATS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        for path, text in files(name).items():
            target = HERE / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
