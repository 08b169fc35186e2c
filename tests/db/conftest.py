"""One database a file, emptied before each test: making one takes longer than most tests here."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def migrated(emptied: Any) -> Any:
    """See `emptied`."""
    return emptied
