"""One database a file; the machine empties it before each of its examples.

What a test has done it appends to ``model.jsonl`` in the folder ``PGQRS_MODEL_RESULTS``, if that is
set: one line a test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def migrated(kept: Any) -> Any:
    return kept


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Print what a test has done, and write it down if that is asked for."""

    def write(**numbers: Any) -> None:
        line = json.dumps({"test": request.node.name, **numbers})
        print(line)
        if folder := os.environ.get("PGQRS_MODEL_RESULTS"):
            with (Path(folder) / "model.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    return write
