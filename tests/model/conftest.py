"""One database a file; the machine empties it before each of its examples."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def migrated(kept: Any) -> Any:
    return kept
