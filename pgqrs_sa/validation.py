"""What a caller may pass: each kind of argument is checked and normalised in one place here.

Everything is refused before a statement is sent, with an error that names the value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, get_args

from .codecs import strict_text
from .errors import DelayError, InvalidArgument, PayloadError, safe_repr
from .types import Keep, QueueSettings

__all__ = [
    "END_OF_TIME",
    "MAX_ERROR_LENGTH",
    "MAX_HEADERS_BYTES",
    "MAX_KEY_LENGTH",
    "QUEUE_NAME_PATTERN",
    "as_list",
    "error_text",
    "headers_text",
    "row_time",
    "suggestions",
    "validate_age",
    "validate_choice",
    "validate_criteria",
    "validate_delay_or_at",
    "validate_duration",
    "validate_id",
    "validate_key",
    "validate_limit",
    "validate_max_read_ct",
    "validate_moment",
    "validate_number",
    "validate_priority",
    "validate_queue_name",
    "validate_queue_settings",
    "validate_text",
    "validate_worker_id",
]

END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)
"""Nothing is scheduled past this: later times cannot be read back in every time zone."""

_START_OF_TIME = datetime(1970, 1, 1, tzinfo=UTC)
_OLDEST = timedelta(days=365 * 1000)

QUEUE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$"
MAX_KEY_LENGTH = 255
MAX_HEADERS_BYTES = 65_536
MAX_ERROR_LENGTH = 8_192

_QUEUE_NAME = re.compile(QUEUE_NAME_PATTERN)
_SMALLINT = 32_767
_INTEGER = 2_147_483_647
_BIGINT = 9_223_372_036_854_775_807
_T = TypeVar("_T")


def validate_queue_name(name: object) -> str:
    """Return ``name`` if a queue may be called so."""
    if not isinstance(name, str):
        raise InvalidArgument(f"queue must be a name, not {safe_repr(name)}")
    if _QUEUE_NAME.match(name) is None or name.endswith("\n"):
        raise InvalidArgument(
            f"{safe_repr(name)} is no queue name: use 1 to 128 of A-Z a-z 0-9 . _ : / -, "
            "starting with a letter or a digit"
        )
    return name


def validate_duration(value: object, name: str = "delay", *, positive: bool = False) -> timedelta:
    """Return seconds or a timedelta as a timedelta that ends before year 9999.

    Args:
        value: Seconds as int or float, or a timedelta.
        name: What to call it in an error.
        positive: Refuse zero too.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
        raise DelayError(f"{name} must be seconds or a timedelta, not {safe_repr(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DelayError(f"{name} must be finite, not {safe_repr(value)}")
    zero = timedelta(0) if isinstance(value, timedelta) else 0
    if value < zero or (positive and value == zero):  # type: ignore[operator]
        least = "more than 0" if positive else "0 or more"
        raise DelayError(f"{name} must be {least} seconds, not {safe_repr(value)}")
    try:
        span = value if isinstance(value, timedelta) else timedelta(seconds=value)
        ends = datetime.now(UTC) + span
    except OverflowError:
        span, ends = timedelta.max, END_OF_TIME
    if ends >= END_OF_TIME:
        raise DelayError(f"{name}={safe_repr(value)} ends past year 9998: choose a nearer time")
    if positive and not span:
        raise DelayError(
            f"{name} must be more than 0 seconds, not {safe_repr(value)}: it rounds to 0"
        )
    return span


def validate_moment(value: object, name: str = "at") -> datetime:
    """Return an aware datetime that lies before year 9999."""
    if not isinstance(value, datetime):
        raise DelayError(f"{name} must be an aware datetime, not {safe_repr(value)}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise DelayError(
            f"{name}={safe_repr(value)} is naive, so which moment it means is unknown: "
            "give it a time zone, for example datetime.now(UTC)"
        )
    try:
        # asyncpg sums datetimes in UTC, so the earliest and latest must fit there as well.
        moment_utc = value.astimezone(UTC)
    except OverflowError:
        raise DelayError(f"{name}={safe_repr(value)} lies outside of the years 1 to 9998") from None
    if moment_utc >= END_OF_TIME:
        raise DelayError(f"{name}={safe_repr(value)} lies past year 9998: choose a nearer time")
    return moment_utc


def row_time(value: object, name: str) -> datetime:
    """Return a ``vt`` or ``leased_until`` that a row may have: from 1970 on."""
    found = validate_moment(value, name)
    if found < _START_OF_TIME:
        raise DelayError(f"{name}={safe_repr(value)} lies before 1970: choose a later time")
    return found


def validate_age(value: object, name: str, *, positive: bool = False) -> timedelta:
    """Return a duration that can be taken from now; nothing here is older than its bound."""
    return min(validate_duration(value, name, positive=positive), _OLDEST)


def validate_delay_or_at(
    delay: object | None, at: object | None, path: str = ""
) -> tuple[timedelta, datetime | None]:
    """Return both ways of saying when, of which at most one may be given."""
    if delay is not None and at is not None:
        raise DelayError(
            f"{path}delay={safe_repr(delay)} and at={safe_repr(at)} contradict each other: give one"
        )
    if at is not None:
        return timedelta(0), validate_moment(at, f"{path}at")
    return timedelta(0) if delay is None else validate_duration(delay, f"{path}delay"), None


def validate_priority(value: object, path: str = "") -> int:
    """Return a priority that fits its column."""
    return _integer(value, f"{path}priority", -_SMALLINT - 1, _SMALLINT)


def validate_max_read_ct(value: object, path: str = "") -> int:
    """Return a number of attempts, at least 1."""
    return _integer(value, f"{path}max_read_ct", 1, _INTEGER)


def validate_limit(value: object, name: str = "limit") -> int:
    """Return how many rows to take, at least 1."""
    return _integer(value, name, 1, _INTEGER)


def validate_queue_settings(given: Mapping[str, object]) -> dict[str, Any]:
    """Return settings of a queue by their columns, as these take them.

    Args:
        given: Any of lease, max_read_ct, keep, retention, failed_retention and max_payload_bytes.
    """
    if unknown := sorted(given.keys() - QueueSettings.__annotations__.keys()):
        raise TypeError(
            f"a queue has no setting {unknown[0]!r}; its settings are "
            f"{', '.join(QueueSettings.__annotations__)}"
        )
    settings: dict[str, Any] = {}
    if "lease" in given:
        span = validate_duration(given["lease"], "lease", positive=True)
        settings["lease_seconds"] = span.total_seconds()
    if "max_read_ct" in given:
        settings["max_read_ct"] = validate_max_read_ct(given["max_read_ct"])
    if "keep" in given:
        validate_choice("keep", given["keep"], Keep)
        settings["keep"] = given["keep"]
    for name in ("retention", "failed_retention"):
        if name in given:
            kept = None if given[name] is None else validate_duration(given[name], name)
            settings[f"{name}_seconds"] = None if kept is None else kept.total_seconds()
    if "max_payload_bytes" in given:
        settings["max_payload_bytes"] = validate_limit(
            given["max_payload_bytes"], "max_payload_bytes"
        )
    return settings


def validate_choice(name: str, value: object, choices: object) -> None:
    """Raise for a value that is none of those of a ``Literal``."""
    if value not in get_args(choices):
        raise InvalidArgument(
            f"{name} must be one of {', '.join(get_args(choices))}, not {safe_repr(value)}"
        )


def validate_id(value: object, name: str = "id") -> int:
    """Return an id that can exist."""
    return _integer(value, name, 1, _BIGINT)


def _integer(value: object, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer, not {safe_repr(value)}")
    if not least <= value <= most:
        raise InvalidArgument(f"{name} must be from {least} to {most}, not {safe_repr(value)}")
    return value


def validate_key(value: object, path: str = "") -> str:
    """Return a deduplication key: 1 to 255 characters of storable text."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_KEY_LENGTH:
        raise InvalidArgument(
            f"{path}key must be a string of 1 to {MAX_KEY_LENGTH} characters, "
            f"not {safe_repr(value)}"
        )
    strict_text(value, f"{path}key")
    return value


def headers_text(value: object, path: str = "") -> str | None:
    """Return headers as JSON text, or None when there are none."""
    if value is None:
        return None
    name = f"{path}headers"
    if not isinstance(value, Mapping):
        raise PayloadError(name, f"must be a dict, not a {type(value).__name__}")
    text = strict_text(dict(value), name)
    if (size := len(text.encode())) > MAX_HEADERS_BYTES:
        raise PayloadError(name, f"takes {size} bytes, more than {MAX_HEADERS_BYTES}")
    return text


def error_text(error: object) -> str:
    """Return an exception, or a sentence, as bounded text that PostgreSQL can store."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an error must not be lost because its text is broken
        text = "(its text cannot be made)"
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}"
    text = text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[:MAX_ERROR_LENGTH]}…"


def as_list(values: Iterable[_T], name: str) -> list[_T]:
    """Return the values as a list, which may be empty, refusing a lone string or dict."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        # What was passed instead of a list of items may be a payload, and errors are logged.
        what = f"of type {type(values).__name__}" if name == "items" else safe_repr(values)
        raise InvalidArgument(f"{name} must be a list, not {what}")
    return list(values)


def validate_criteria(where: Any) -> tuple[Any, ...]:
    """Return one criterion, several or none as a tuple."""
    if where is None:
        return ()
    return tuple(where) if isinstance(where, (list, tuple)) else (where,)


def suggestions(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names that ``name`` may have meant, best first."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.6)


def validate_worker_id(worker: Any) -> int | None:
    """Return the id of a worker given as an id, a `WorkerInfo` or a `Worker` row."""
    if worker is None:
        return None
    if hasattr(worker, "heartbeat_at"):
        worker = worker.id
    return validate_id(worker, "worker")


def validate_text(value: object, name: str) -> str:
    """Return text that is not empty and that PostgreSQL can store."""
    if not isinstance(value, str) or not value.strip():
        raise InvalidArgument(f"{name} must be text that is not empty, not {safe_repr(value)}")
    strict_text(value, name)
    return value


def validate_number(value: object, name: str) -> int:
    """Return a number that fits a column of integers."""
    return _integer(value, name, 0, _INTEGER)
