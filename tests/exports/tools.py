"""Programs and schemas of others that ``make tools`` takes from Debian's packages into ``.tools``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

TOOLS = Path(os.environ.get("SCALELLM_TOOLS") or Path(__file__).parents[2] / ".tools")
PROMTOOL = shutil.which("promtool", path=f"{TOOLS / 'usr' / 'bin'}:{os.environ.get('PATH', '')}")
COMPOSE_SCHEMA = TOOLS / "usr/lib/python3/dist-packages/compose/config/compose_spec.json"
"""compose-spec's JSON schema, in docker-compose 1.29.2."""

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: make tools, or apt-get install prometheus")
needs_compose_schema = pytest.mark.skipif(not COMPOSE_SCHEMA.is_file(), reason="no schema of compose files: make tools")
