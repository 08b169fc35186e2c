"""From Python values to JSON text and back, strictly.

The payload of a message crosses the wire as text that this module wrote, so what is stored does
not depend on the JSON settings of the host's engine. ``dumps`` refuses what PostgreSQL or another
reader would refuse or change: NaN and Infinity, NUL and lone surrogates, keys that are not
strings, dates, Decimals, sets, and nesting that the standard reader cannot follow. The error
names the place: ``payload.items[3].price is nan``.

A codec is anything with ``dumps`` and ``loads``; give your own to ``QueueService(codec=...)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from .errors import PayloadError

__all__ = ["MAX_DEPTH", "Codec", "JsonCodec"]

MAX_DEPTH = 200
"""Nesting beyond this is refused: Python's reader gives up near its recursion limit."""

_MAX_INT_DIGITS = 4300  # sys.int_info.default_max_str_digits: more cannot be read back


class Codec(Protocol):
    """Turns payloads into JSON text and JSON text into payloads."""

    def dumps(self, value: Any, /) -> str:
        """Return ``value`` as JSON text, or raise `PayloadError`."""
        ...

    def loads(self, text: str, /) -> Any:
        """Return the value that ``text`` stands for, or raise `ValueError`."""
        ...


class JsonCodec:
    """The standard library's JSON, made strict."""

    def dumps(self, value: Any, /, *, path: str = "payload") -> str:
        """Return ``value`` as compact JSON text.

        Args:
            value: dicts with string keys, lists, tuples, strings, ints, floats, bools and None.
            path: What to call the value in an error.

        Raises:
            PayloadError: with the path of the first offending value.
        """
        # One pass in C settles nearly every payload; only what looks odd is walked in Python.
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
            text.encode()
            plain = (
                "\\u0000" not in text
                and text.count("[") + text.count("{") <= MAX_DEPTH
                and json.loads(text) == value
            )
        except (TypeError, ValueError, RecursionError) as error:
            _walk(value, path, 0)
            raise PayloadError(path, f"is not JSON: {error}") from error
        if not plain:
            _walk(value, path, 0)
        return text

    def loads(self, text: str, /) -> Any:
        """Return the value that ``text`` stands for."""
        return json.loads(text)


def _walk(value: Any, path: str, depth: int) -> None:
    """Raise for the first value that cannot be stored and read back as it is."""
    match value:
        case None | bool():
            return
        case str():
            _check_text(value, path)
        case int():
            if abs(value) >= 10**_MAX_INT_DIGITS:
                raise PayloadError(path, f"is an integer of more than {_MAX_INT_DIGITS} digits")
        case float():
            if not math.isfinite(value):
                raise PayloadError(path, f"is {value!r}, which JSON cannot hold: send null instead")
        case dict() | list() | tuple():
            if depth == MAX_DEPTH:
                raise PayloadError(_shortened(path), f"is nested deeper than {MAX_DEPTH} levels")
            for inner, item in _members(value, path):
                _walk(item, inner, depth + 1)
        case _:
            raise PayloadError(path, f"is a {type(value).__name__}: {_mend(value)}")


def _members(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what a dict or list holds, with the path of each; check the keys on the way."""
    if not isinstance(value, dict):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
        return
    for key, item in value.items():
        if not isinstance(key, str):
            raise PayloadError(path, f"has the key {key!r}: keys must be strings")
        inner = f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"
        _check_text(key, inner)
        yield inner, item


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise PayloadError(
            _printable(path), "contains NUL (U+0000), which PostgreSQL cannot store: remove it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PayloadError(
            _printable(path), f"contains a lone surrogate at index {error.start}: it is not text"
        ) from None


def _printable(path: str) -> str:
    return path.encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")


def _shortened(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:40]}…{path[-30:]}"  # noqa: PLR2004


def _mend(value: object) -> str:
    if hasattr(value, "isoformat"):
        return "send value.isoformat()"
    if isinstance(value, (set, frozenset)):
        return "send a sorted list"
    if isinstance(value, Mapping):
        return "send dict(value)"
    return "send a string, a number, a list or a dict"
