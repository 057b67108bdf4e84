"""``python -m toolchain.cli`` is ``scalellm``."""

from toolchain.cli import main

main()
