"""The log of a command: to stderr or to ``--log-dest``, at ``--log-level``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Self

from .failures import scrub

if TYPE_CHECKING:
    from .app import Options

__all__ = ["Log"]

_LOGGERS = ("pgqrs_sa", "alembic", "sqlalchemy.engine", "sqlalchemy.pool")


class Log:
    """Sends the log to where the options say, while a command runs.

    Args:
        options: The global ones.
        secrets: Passwords that must not be in it.
    """

    def __init__(self, options: Options, secrets: set[str]) -> None:
        self._dest = options.log_dest
        self._chosen = options.log_level is not None or options.verbose > 0
        level = options.log_level or {0: "warning", 1: "info"}.get(options.verbose, "debug")
        self._level = level.upper()
        # Not the root logger: where the group is mounted, that one is the host's.
        self._loggers = [logging.getLogger(name) for name in _LOGGERS]
        self._handler: logging.Handler = logging.StreamHandler()
        if self._dest not in (None, "stderr"):
            self._handler = logging.FileHandler(self._dest, encoding="utf-8", delay=True)
        self._handler.setFormatter(_Scrubbing(secrets))
        self._before: dict[logging.Logger, int] = {}

    def __enter__(self) -> Self:
        self._attach(self._loggers)
        return self

    def __exit__(self, *_error: object) -> None:
        self._detach()
        self._handler.close()

    def join_application(self) -> None:
        """Log together with an application that has just been imported.

        An application that has configured logging gets our records too, and its own configuration
        applies, except for a level given with an option. Otherwise its records go where ours do.
        """
        root = logging.getLogger()
        if not root.handlers:
            self._detach()
            self._attach([root])
        elif self._dest is None:
            self._detach()
            if self._chosen:
                self._set_levels(self._loggers)

    def _attach(self, loggers: list[logging.Logger]) -> None:
        for logger in loggers:
            logger.addHandler(self._handler)
        self._set_levels(loggers)

    def _set_levels(self, loggers: list[logging.Logger]) -> None:
        for logger in loggers:
            self._before[logger] = logger.level
            logger.setLevel(self._level)

    def _detach(self) -> None:
        for logger, level in self._before.items():
            logger.removeHandler(self._handler)
            logger.setLevel(level)
        self._before.clear()


class _Scrubbing(logging.Formatter):
    def __init__(self, secrets: set[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record), self._secrets)
