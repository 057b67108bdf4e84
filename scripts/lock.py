"""Write the exact versions that are installed, for reproducible installs: ``python scripts/lock.py constraints.txt``.

Local version labels (``+cpu``) are dropped, so that any build of the same release satisfies the pin.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

_OURS = {"scalellm-toolchain", "pip", "setuptools", "wheel"}


def main(target: Path) -> None:
    """Sorted ``name==version`` lines of everything in this environment but ourselves and the installer."""
    found = {dist.metadata["Name"].lower().replace("_", "-"): dist.version.split("+")[0] for dist in distributions()}
    lines = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in _OURS]
    target.write_text("# Written by `make lock`.\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
