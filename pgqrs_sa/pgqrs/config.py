"""`Config`: the settings of the package, with pgqrs' names and ways to load them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Generic, TypeAlias, TypeVar, overload

from ..errors import InvalidArgument
from ..settings import Settings, Validation

__all__ = ["Config"]

_T = TypeVar("_T")
_Path: TypeAlias = str | os.PathLike[str]


class _Setting(Generic[_T]):
    """A property that reads a setting, and checks what it is set to."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, config: None, owner: type) -> _Setting[_T]: ...
    @overload
    def __get__(self, config: Config, owner: type) -> _T: ...
    def __get__(self, config: Config | None, owner: type) -> Any:
        return self if config is None else getattr(config.settings, self._name)

    def __set__(self, config: Config, value: _T) -> None:
        changed: dict[str, Any] = {self._name: value}
        config.settings = replace(config.settings, **changed)


class Config:
    """The database of the queues, and the defaults of producers and consumers.

    See `pgqrs_sa.settings` for the defaults, the environment variables, the files and their order.
    An `Admin` copies the settings when it is constructed; later changes do not affect it.
    Setting an invalid value raises `InvalidArgument`.

    Args:
        settings: A PostgreSQL URL, with the defaults for everything else; or all settings.
        schema: The schema of the tables, in place of the settings'.

    Attributes:
        settings: The same, as one frozen value.
    """

    dsn = _Setting[str]()
    schema = _Setting[str | None]()
    max_connections = _Setting[int]()
    connection_timeout_seconds = _Setting[float]()
    default_lock_time_seconds = _Setting[float]()
    default_max_batch_size = _Setting[int]()
    max_read_ct = _Setting[int]()
    heartbeat_interval_seconds = _Setting[float]()
    validation = _Setting[Validation]()

    def __init__(self, settings: Settings | str, schema: str | None = None) -> None:
        if isinstance(settings, str):
            settings = Settings(settings)
        elif not isinstance(settings, Settings):
            raise InvalidArgument(f"Config takes a DSN, not a {type(settings).__name__}")
        self.settings = settings
        if schema is not None:
            self.schema = schema

    def __repr__(self) -> str:
        return f"Config({self.settings!r})"

    @classmethod
    def from_dsn(cls, dsn: str) -> Config:
        """Return the defaults for this database; neither environment nor files are read."""
        return cls(dsn)

    @classmethod
    def from_dsn_with_schema(cls, dsn: str, schema: str) -> Config:
        """Return the defaults for a schema of this database."""
        return cls(dsn, schema)

    @classmethod
    def from_env(cls) -> Config:
        """Load the environment, then the default files for what it does not set."""
        return cls(Settings.load())

    @classmethod
    def from_file(cls, path: _Path) -> Config:
        """Load a YAML or TOML file; the environment is not read."""
        return cls(Settings.load(config=path, environ={}))

    @classmethod
    def load(cls) -> Config:
        """Load the environment and the default files."""
        return cls(Settings.load())

    @classmethod
    def load_with_options(cls, dsn: str | None = None, config_path: _Path | None = None) -> Config:
        """Load the arguments, the environment and a file, in that order."""
        return cls(Settings.load(dsn=dsn, config=config_path))

    @classmethod
    def load_with_schema_options(
        cls, dsn: str | None = None, schema: str | None = None, config_path: _Path | None = None
    ) -> Config:
        """Load the arguments, the environment and a file, in that order."""
        return cls(Settings.load(dsn=dsn, schema=schema, config=config_path))
