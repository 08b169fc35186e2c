"""The plugin for pytest, loaded by its entry point wherever this package is installed.

Two fixtures, and nothing that happens by itself. Nothing of the package is imported before a test
asks for one of them, and no server is started or looked for: the session is the application's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import AsyncInspector, Inspector

__all__ = ["pgqrs", "pgqrs_session"]


@pytest.fixture
def pgqrs_session() -> Any:
    """The session that `pgqrs` works in: define a fixture of this name that returns yours.

    Raises:
        UsageError: it has not been defined.
    """
    raise pytest.UsageError(
        "the fixture 'pgqrs' needs to know the session of your tests. Define, in conftest.py:\n"
        "    @pytest.fixture\n"
        "    def pgqrs_session(session):  # the name of your own fixture\n"
        "        return session"
    )


@pytest.fixture
def pgqrs(pgqrs_session: Any) -> Inspector | AsyncInspector:
    """The helpers of `pgqrs_sa.testing` in the test's session: see `testing.Inspector`.

    An ``AsyncSession`` makes it an `AsyncInspector`. Applications with models or a codec of their
    own define this fixture instead, and return ``Inspector(session, models=models)``.
    """
    from .testing import AsyncInspector, Inspector  # noqa: PLC0415 - not for tests without it
    from .testing.sessions import is_async, opened  # noqa: PLC0415

    if is_async(opened(pgqrs_session)):
        return AsyncInspector(pgqrs_session)
    return Inspector(pgqrs_session)
