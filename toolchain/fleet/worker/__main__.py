"""The worker's process. It alone reads the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from toolchain.errors import ScalellmError
from toolchain.fleet.worker.membership import serve
from toolchain.fleet.worker.worker import Spec
from toolchain.gateway import loop


def main() -> int:
    """The process. Prints why it ended."""
    try:
        loop.run(serve(Spec.read(Path(sys.argv[1]))))
    except ScalellmError as error:
        print(f"worker: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
