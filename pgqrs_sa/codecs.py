"""From Python values to JSON text and back, strictly.

The payload of a message crosses the wire as text that this module wrote, so what is stored does
not depend on the JSON settings of the host's engine. (A `Message` that is added to a session is a
row of the host's: it is checked here, and written by the serializer of the host's engine, like any
JSONB column. A bulk INSERT of the ORM, which makes no objects, is checked by the database alone.)
``dumps`` refuses what PostgreSQL or another
reader would refuse or change: NaN and Infinity, NUL and lone surrogates, keys that are not
strings, dates, Decimals, sets, and nesting that the standard reader cannot follow. The error
names the place: ``payload.items[3].price is nan``.

A codec is anything with ``dumps`` and ``loads``; give your own to ``QueueService(codec=...)``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .errors import PayloadError, shown

__all__ = ["MAX_DEPTH", "Codec", "JsonCodec", "check_json"]

MAX_DEPTH = 200
"""Nesting beyond this is refused: Python's reader gives up near its recursion limit."""

_MOST_STEPS, _LONGEST_PATH = 50, 1000  # what an error spells out
_MAX_INT_DIGITS = 4300  # sys.int_info.default_max_str_digits: more cannot be read back
_TOO_LARGE = 10**_MAX_INT_DIGITS
_AT_ONCE = 1_000  # values that are checked together


class Codec(Protocol):
    """Turns payloads into JSON text and JSON text into payloads."""

    def dumps(self, value: Any, /) -> str:
        """Return ``value`` as JSON text; raise `PayloadError`, or any exception, to refuse it."""
        ...

    def loads(self, text: str, /) -> Any:
        """Return the value that ``text`` stands for; any exception makes the message dead."""
        ...


# Made once: json.dumps() with options makes one for each call.
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode


# An escaped NUL: an odd number of backslashes before the u.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

# Where many values are written together, what tells them apart: one with a NUL is refused.
_BETWEEN = ',"\\u0000",'


def _depth(text: str) -> int:
    """Return the nesting that a text has at most."""
    # A level takes two characters: most texts need no look at all.
    return 0 if len(text) <= 2 * MAX_DEPTH else text.count("[") + text.count("{")


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
            text = _encode(value)
            text.encode()
            plain = (
                "\\u0000" not in text and _depth(text) <= MAX_DEPTH and json.loads(text) == value
            )
        except (TypeError, ValueError, RecursionError) as error:
            self._refuse(value, path)
            raise PayloadError(path, f"is not JSON: {error}") from error
        if not plain:
            self._refuse(value, path)
        return text

    def dumps_each(self, values: Sequence[Any], /) -> list[str] | None:
        """Return each value as `dumps` does, for little more than half the price.

        None when one of them has to be looked at by itself.
        """
        texts: list[str] = []
        for start in range(0, len(values), _AT_ONCE):
            some = list(values[start : start + _AT_ONCE])
            try:
                parted = [one for value in some for one in (value, "\0")][:-1]
                found = _encode(parted)[1:-1].split(_BETWEEN)
                whole = f"[{','.join(found)}]"
                whole.encode()
                plain = "\\u0000" not in whole and json.loads(whole) == some
            except (TypeError, ValueError, RecursionError):
                return None
            if not plain or len(found) != len(some) or max(map(_depth, found)) > MAX_DEPTH:
                return None
            texts += found
        return texts

    def _refuse(self, value: Any, path: str) -> None:
        """Raise for the first offending value, if there is one."""
        try:
            _walk(value)
        except _Fault as fault:
            raise fault.at(path) from None

    def loads(self, text: str, /) -> Any:
        """Return the value that ``text`` stands for."""
        return json.loads(text)

    def loads_each(self, texts: Sequence[str], /) -> list[Any] | None:
        """Return each value as `loads` does, read together.

        None when that is not possible: one of them cannot be read, or is no JSON text at all.
        """
        try:
            values: list[Any] = json.loads(f"[{','.join(texts)}]")
        except (ValueError, RecursionError):
            return None
        return values if len(values) == len(texts) else None


class _Fault(Exception):
    """What is wrong with a value; the containers around it say where, as it passes them."""

    def __init__(self, problem: str, *steps: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.steps = list(steps)

    def at(self, path: str) -> PayloadError:
        """Return the error for a value whose outermost container is called ``path``."""
        where = path + "".join(reversed(self.steps))
        if len(self.steps) > _MOST_STEPS or len(where) > _LONGEST_PATH:
            where = f"{where[:80]}…{where[-40:]}"
        return PayloadError(_printable(where), self.problem)


def check_json(text: object, path: str) -> None:
    """Raise `PayloadError` unless ``text`` is JSON that PostgreSQL can store.

    For the text of codecs that are not ours. A batch is sent as one array, so text that only
    looks like JSON could change its neighbours.
    """
    if not isinstance(text, str):
        raise PayloadError(path, f"is encoded as a {type(text).__name__}: a codec returns a str")
    try:
        text.encode()
        # Numbers are not read: only the form counts.
        value = json.loads(text, parse_constant=_no_constant, parse_int=str, parse_float=str)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # escapes may be lone surrogates
    except (ValueError, RecursionError) as error:
        raise PayloadError(path, f"is encoded as text that is not JSON: {error}") from error
    if _NUL.search(text):
        raise PayloadError(path, "is encoded as text with NUL, which PostgreSQL cannot store")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _walk(value: Any, depth: int = 0) -> None:
    """Raise for the first value that cannot be stored and read back as it is."""
    match value:
        case None | bool():
            return
        case str():
            _check_text(value)
        case int():
            if not -_TOO_LARGE < value < _TOO_LARGE:
                raise _Fault(f"is an integer of more than {_MAX_INT_DIGITS} digits")
        case float():
            if not math.isfinite(value):
                raise _Fault(f"is {value!r}, which JSON cannot hold: send null instead")
        case dict() | list() | tuple():
            if depth == MAX_DEPTH:
                raise _Fault(f"is nested deeper than {MAX_DEPTH} levels")
            _walk_members(value, depth)
        case _:
            raise _Fault(f"is a {type(value).__name__}: {_mend(value)}")


def _walk_members(value: Any, depth: int) -> None:
    step: Any
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for step, item in members:
        if isinstance(value, dict) and not isinstance(step, str):
            raise _Fault(f"has the key {shown(step)}: keys must be strings")
        try:
            if isinstance(step, str):
                _check_text(step)
            _walk(item, depth + 1)
        except _Fault as fault:
            # Written only now: spelling out the path of every value would take most of the time.
            plain = isinstance(step, str) and step.isidentifier()
            fault.steps.append(f".{step}" if plain else f"[{step!r}]")
            raise


def _check_text(text: str) -> None:
    if "\0" in text:
        raise _Fault("contains NUL (U+0000), which PostgreSQL cannot store: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"contains a lone surrogate at index {error.start}: it is not text"
        raise _Fault(where) from None


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _mend(value: object) -> str:
    if hasattr(value, "isoformat"):
        return "send value.isoformat()"
    if isinstance(value, (set, frozenset)):
        return "send a sorted list"
    if isinstance(value, Mapping):
        return "send dict(value)"
    return "send a string, a number, a list or a dict"
