"""What needs an extra of the package that may not be installed, and how to install it."""

from __future__ import annotations

from importlib import import_module
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


def missing_extra(error: ImportError) -> str | None:
    """Return how to install the extra of ours that has a library which is missing, if one has."""
    extra = _EXTRAS.get(_missing(error))
    return None if extra is None else f"pip install 'pgqrs-sa[{extra}]'"


def _missing(error: ImportError) -> str:
    # SQLAlchemy 2.1 raises an error of its own for greenlet, which has no name.
    name = error.name or getattr(error.__cause__, "name", None) or ""
    return name.partition(".")[0]


def require(library: str) -> None:
    """Raise an ImportError unless a library can be imported."""
    import_module(library)


def stand_in(name: str, error: ImportError) -> type[Any]:
    """Return a class in place of one whose extra is missing, which cannot be used.

    Importing and inspecting the package then works with any set of extras.

    Args:
        name: The class.
        error: What its import raised.

    Raises:
        ImportError: the error itself, if no extra of ours would help.
    """
    command = missing_extra(error)
    if command is None:
        raise error
    library = _missing(error)
    text = f"{name} needs {library}: {command}"

    def refuse(*_args: object, **_kwargs: object) -> Any:
        raise ImportError(text, name=library) from error

    body = {"__doc__": f"Not installed: {text}", "__module__": "pgqrs_sa", "__new__": refuse}
    return type(name, (), body)
