"""The settings of the command line and of the `pgqrs_sa.pgqrs` module.

Each setting is taken from the first place that has it:

1. an argument or a command-line option,
2. an environment variable,
3. a file: the one given, else ``PGQRS_CONFIG_FILE``, else ``pgqrs.yaml``, ``pgqrs.yml`` or
   ``pgqrs.toml`` in the current folder,
4. the default.

=================================  ============================  ===========================
in a file                          in the environment            default
=================================  ============================  ===========================
``dsn``                            ``PGQRS_DSN``                 none: needed
``schema``                         ``PGQRS_SCHEMA``              the database's default
``max_connections``                ``PGQRS_MAX_CONNECTIONS``     16
``connection_timeout_seconds``     ``PGQRS_CONNECTION_TIMEOUT``  30
``default_lock_time_seconds``      ``PGQRS_DEFAULT_LOCK_TIME``   5
``default_max_batch_size``         ``PGQRS_DEFAULT_BATCH_SIZE``  100
``max_read_ct``                    ``PGQRS_MAX_READ_CT``         5
``heartbeat_interval_seconds``     ``PGQRS_HEARTBEAT_INTERVAL``  5
``validation`` (a table)           ``PGQRS_VALIDATION_CONFIG``   see `Validation` (JSON)
=================================  ============================  ===========================

A value that cannot be read is an error that names its place; it never becomes the default.
YAML needs PyYAML, which the extra ``cli`` brings.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from . import dsns
from .errors import InvalidArgument

__all__ = ["Settings", "Validation", "database_url"]

_LONGEST_NAME = 63
"""Bytes of an identifier: https://www.postgresql.org/docs/current/limits.html."""

DEFAULT_FILES = ("pgqrs.yaml", "pgqrs.yml", "pgqrs.toml")

_ENVIRONMENT = {
    "dsn": "PGQRS_DSN",
    "schema": "PGQRS_SCHEMA",
    "max_connections": "PGQRS_MAX_CONNECTIONS",
    "connection_timeout_seconds": "PGQRS_CONNECTION_TIMEOUT",
    "default_lock_time_seconds": "PGQRS_DEFAULT_LOCK_TIME",
    "default_max_batch_size": "PGQRS_DEFAULT_BATCH_SIZE",
    "max_read_ct": "PGQRS_MAX_READ_CT",
    "heartbeat_interval_seconds": "PGQRS_HEARTBEAT_INTERVAL",
    "validation": "PGQRS_VALIDATION_CONFIG",
}


@dataclass(frozen=True, slots=True)
class Validation:
    """The limits of a producer beyond those of the queue itself. None means no limit.

    Attributes:
        max_payload_size_bytes: The largest payload, as UTF-8 JSON.
        max_string_length: The longest string or key, in bytes of UTF-8.
        max_object_depth: The deepest nesting of dicts and lists.
        forbidden_keys: Keys that no dict of a payload may have, at any level.
        required_keys: Keys that the payload must have; it must be a dict then.
        max_enqueue_per_second: The sustained rate of one producer object, in messages.
        max_enqueue_burst: How many may be enqueued at once before that rate applies.
    """

    max_payload_size_bytes: int | None = 1_048_576
    max_string_length: int | None = None
    max_object_depth: int | None = None
    forbidden_keys: tuple[str, ...] = ()
    required_keys: tuple[str, ...] = ()
    max_enqueue_per_second: float | None = None
    max_enqueue_burst: int = 50

    def __post_init__(self) -> None:
        for name in ("max_payload_size_bytes", "max_string_length", "max_object_depth"):
            if getattr(self, name) is not None:
                _coerce(self, name, _whole, "validation.")
        if self.max_enqueue_per_second is not None:
            _coerce(self, "max_enqueue_per_second", _positive, "validation.")
        _coerce(self, "max_enqueue_burst", _whole, "validation.")
        for name in ("forbidden_keys", "required_keys"):
            object.__setattr__(self, name, _names(getattr(self, name), f"validation.{name}"))


@dataclass(frozen=True, slots=True)
class Settings:
    """The database of the queues, and the defaults of producers and consumers.

    Attributes:
        dsn: A PostgreSQL URL, with or without a driver, or libpq's keywords; with one host or
            several (`dsns`).
        schema: The schema of the tables; None for the database's default.
        max_connections: The largest size of a pool.
        connection_timeout_seconds: How long to wait for a connection.
        default_lock_time_seconds: The default lease of a dequeue.
        default_max_batch_size: The most messages that one dequeue may ask for.
        max_read_ct: The attempts that a new queue gives its messages.
        heartbeat_interval_seconds: The time between two heartbeats of a worker.
        validation: The limits of a producer.
    """

    dsn: str = field(repr=False)
    schema: str | None = None
    max_connections: int = 16
    connection_timeout_seconds: float = 30.0
    default_lock_time_seconds: float = 5.0
    default_max_batch_size: int = 100
    max_read_ct: int = 5
    heartbeat_interval_seconds: float = 5.0
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        database_url(self.dsn)
        for name in ("max_connections", "default_max_batch_size", "max_read_ct"):
            _coerce(self, name, _whole)
        for name in (
            "connection_timeout_seconds",
            "default_lock_time_seconds",
            "heartbeat_interval_seconds",
        ):
            _coerce(self, name, _positive)
        if self.schema is not None:
            _check_schema(self.schema)

    @classmethod
    def load(
        cls,
        *,
        dsn: str | None = None,
        schema: str | None = None,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Return the settings from the arguments, the environment, a file and the defaults.

        Args:
            dsn: The DSN, in place of ``PGQRS_DSN`` and the file's.
            schema: The schema of the tables, in place of ``PGQRS_SCHEMA`` and the file's.
            config: A YAML or TOML file, in place of the default files.
            environ: The environment; default: the process's own.

        Raises:
            InvalidArgument: a value, or the file, cannot be read, or there is no DSN.
        """
        environment = os.environ if environ is None else environ
        values = _from_file(config, environment) | _from_environment(environment)
        values |= {k: v for k, v in (("dsn", dsn), ("schema", schema)) if v is not None}
        if not values.get("dsn"):
            raise InvalidArgument(
                "no database given: pass --dsn, or set PGQRS_DSN=postgresql://user@host/database"
            )
        return cls(**values)


def database_url(
    dsn: str | sa.URL, driver: str = "psycopg", *, without_asyncio: bool = False
) -> sa.URL:
    """Return a DSN as a URL with a driver: the one it names, or ``driver``.

    It may be in any form of libpq or SQLAlchemy, and name several hosts: see `dsns`.

    Args:
        dsn: The text, or a URL as SQLAlchemy has read it.
        driver: The driver of a DSN that names none.
        without_asyncio: Take psycopg where the DSN names a driver that needs asyncio.

    Raises:
        InvalidArgument: it is no PostgreSQL DSN. The text is not repeated, since it may hold a
            password.
    """
    if isinstance(dsn, str):
        _check_encoding("the DSN", dsn)
    return dsns.parse(dsn, driver, without_asyncio=without_asyncio)


def _check_encoding(what: str, text: str) -> None:
    """Refuse text with bytes that the operating system could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Without the text, which may hold a password.
        raise InvalidArgument(
            f"{what} is not valid UTF-8: character {error.start + 1} cannot be read; "
            "in a DSN, write it as %XX"
        ) from None


def _check_schema(name: str) -> None:
    _check_encoding("the name of the schema", name)
    if not name or "\0" in name:
        raise InvalidArgument(f"schema={name!r} is not the name of a schema")
    # PostgreSQL would cut it, and two names that differ only behind the cut would be one schema.
    if (size := len(name.encode())) > _LONGEST_NAME:
        raise InvalidArgument(
            f"schema={name!r} is too long: {size} bytes, and PostgreSQL takes {_LONGEST_NAME}"
        )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, variable in _ENVIRONMENT.items():
        if text := environ.get(variable):
            found[name] = _PARSERS[name](text, variable)
    return found


def _from_file(config: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> dict[str, Any]:
    given = config or environ.get("PGQRS_CONFIG_FILE")
    if given:
        return _checked(_parsed(Path(given)), str(given))
    for name in DEFAULT_FILES:
        if (path := Path(name)).is_file():
            return _checked(_parsed(path), name)
    return {}


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidArgument(f"the configuration {path} cannot be read: {error}") from error
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        import yaml  # noqa: PLC0415 - of the extra `cli`

        return yaml.safe_load(text) or {}
    except ImportError:
        raise InvalidArgument(
            f"{path} is YAML, which needs PyYAML: pip install 'pgqrs-sa[cli]', or use TOML"
        ) from None
    except Exception as error:
        raise InvalidArgument(f"the configuration {path} is malformed: {error}") from error


def _checked(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{place} must be a table of settings, not {values!r}")
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(set(map(str, values)) - known):
        raise InvalidArgument(
            f"{place} has settings that nobody reads: {', '.join(unknown)}. "
            f"Known are {', '.join(sorted(known))}"
        )
    return {name: _PARSERS[name](value, f"{place}: {name}") for name, value in values.items()}


def _coerce(settings: object, name: str, read: Callable[[Any, str], Any], prefix: str = "") -> None:
    """Replace a setting by its parsed value: "5" becomes 5."""
    object.__setattr__(settings, name, read(getattr(settings, name), f"{prefix}{name}"))


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{place} must be a string, not {value!r}")
    return value


def _whole(value: Any, place: str) -> int:
    number = _number(value, place, int)
    if number < 1:
        raise InvalidArgument(f"{place} must be 1 or more, not {value!r}")
    return int(number)


def _positive(value: Any, place: str) -> float:
    number = _number(value, place, float)
    if not 0 < number < float("inf"):
        raise InvalidArgument(f"{place} must be more than 0, not {value!r}")
    return number


def _number(value: Any, place: str, kind: Callable[[Any], float]) -> float:
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or (isinstance(value, float) and kind is int):
        raise InvalidArgument(f"{place} must be {what}, not {value!r}")
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{place} must be {what}, not {value!r}") from None


def _names(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InvalidArgument(f"{place} must be a list of strings, not {value!r}")
    return tuple(value)


def _validation(value: Any, place: str) -> Validation:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidArgument(f"{place} must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{place} must be a table, not {value!r}")
    known = {field.name for field in fields(Validation)}
    if unknown := sorted(set(map(str, value)) - known):
        raise InvalidArgument(f"{place} has keys that nobody reads: {', '.join(unknown)}")
    return Validation(**value)


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "dsn": _text,
    "schema": _text,
    "max_connections": _whole,
    "connection_timeout_seconds": _positive,
    "default_lock_time_seconds": _positive,
    "default_max_batch_size": _whole,
    "max_read_ct": _whole,
    "heartbeat_interval_seconds": _positive,
    "validation": _validation,
}
