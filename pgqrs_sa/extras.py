"""Names that need an extra of the package, and how to install it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

__all__ = ["missing_extra", "require", "stand_in"]

_EXTRAS = {
    **dict.fromkeys(("rich", "durationpy", "yaml"), "cli"),
    "alembic": "alembic",
    "asyncpg": "asyncpg",
    "greenlet": "asyncio",
    "psycopg": "psycopg",
    "tenacity": "consumer",
}
"""Libraries, and the extras that have them."""


_NEEDS = {
    "AsyncConsumer": ("greenlet", "tenacity"),
    "AsyncQueueService": ("greenlet",),
    "Consumer": ("tenacity",),
    "pgqrs_sa.pgqrs": ("greenlet",),
}
"""The names of the package that need libraries of extras, and which."""


class _Missing(ImportError):
    """Something needs libraries that are not installed.

    Attributes:
        command: How to install the extras that have them.
    """

    def __init__(self, name: str, libraries: Iterable[str]) -> None:
        needed = list(libraries)
        extras = ",".join(_EXTRAS[library] for library in needed)
        self.command = f"pip install 'pgqrs-sa[{extras}]'"
        text = f"{name} needs {' and '.join(needed)}: {self.command}"
        super().__init__(text, name=needed[0])


def missing_extra(error: ImportError) -> str | None:
    """Return how to install the extras of ours that have what is missing, if any have."""
    if isinstance(error, _Missing):
        return error.command
    extra = _EXTRAS.get(_library(error))
    return None if extra is None else f"pip install 'pgqrs-sa[{extra}]'"


def _library(error: ImportError) -> str:
    # SQLAlchemy 2.1 raises an error of its own for greenlet, which has no name.
    name = error.name or getattr(error.__cause__, "name", None) or ""
    return name.partition(".")[0]


def require(name: str) -> None:
    """Raise an ImportError with the pip command unless all is installed that a name needs.

    Args:
        name: Of a class or a module of the package.
    """
    if missing := _not_installed(name):
        raise _Missing(name, missing)


def _not_installed(name: str) -> list[str]:
    return [library for library in _NEEDS.get(name, ()) if not _is_installed(library)]


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # an import hook, or None in sys.modules, hides it
        return False


def stand_in(name: str, error: ImportError) -> type[Any]:
    """Return a class in place of one whose extras are missing, which cannot be used.

    Importing and inspecting the package then works with any set of extras.

    Args:
        name: The class.
        error: What its import raised.

    Raises:
        ImportError: the error itself, if no extra of ours would help.
    """
    if missing_extra(error) is None:
        raise error
    missing = _not_installed(name) or [_library(error)]
    text = str(_Missing(name, missing))

    def refuse(*_args: object, **_kwargs: object) -> Any:
        raise _Missing(name, missing) from error

    body = {"__doc__": f"Not installed: {text}", "__module__": "pgqrs_sa", "__new__": refuse}
    return type(name, (), body)
