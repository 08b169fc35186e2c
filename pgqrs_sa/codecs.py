"""From Python values to JSON text and back, strictly.

The payload of a message crosses the wire as text that this module wrote, so what is stored does
not depend on the JSON settings of the host's engine. The payload of a `Message` that is added to a
session, and of an INSERT of Core or of the ORM into its table, is written by `JsonCodec` as well.
``dumps`` refuses what PostgreSQL or another
reader would refuse or change: NaN and Infinity, NUL and lone surrogates, keys that are not
strings, sets, and nesting that the standard reader cannot follow. The error names the place:
``payload.items[3].price is nan``. UUIDs, dates and times, Decimals, Enums, dataclasses, pydantic
models and msgspec structs are written if a handler whose annotation names their class gets an
equal object: see `encoding`.

Floats come back as they were: those from 1e16 on are written without an exponent, of which jsonb
would make an integer. Only the sign of -0.0 is lost, which equals 0.0.

A codec is anything with ``dumps`` and ``loads``; give your own to ``QueueService(codec=...)``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from itertools import chain
from typing import Any, Protocol

from . import encoding
from .errors import PayloadError, safe_repr

__all__ = ["MAX_DEPTH", "Codec", "JsonCodec", "check_json", "strict_text"]

MAX_DEPTH = 200
"""Nesting beyond this is refused: Python's reader gives up near its recursion limit."""

_MOST_STEPS, _LONGEST_PATH = 50, 1000  # what an error spells out
_MAX_INT_DIGITS = 4300  # sys.int_info.default_max_str_digits: more cannot be read back
_TOO_LARGE = 10**_MAX_INT_DIGITS
_AT_ONCE = 1_000  # values that are checked together
_MOST_WALKED = 1_000_000  # values of one level
_CONTAINERS = {dict, list}  # as the encoder reads them; a subclass may say something else
_SCALARS = (str, int, float, type(None))
_FLAT = {*_SCALARS, bool}


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

# The same, a sixth faster, for values that `_is_plain` has found to end.
_encode_plain = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), check_circular=False
).encode


# A string, or a number with an exponent that makes it large.
_LARGE_FLOAT = re.compile(r'"(?:[^"\\]|\\.)*"|-?[\d.]+e\+\d+')

# An escaped NUL: an odd number of backslashes before the u.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

# Where many values are written together, what tells them apart: one with a NUL is refused.
_BETWEEN = ',"\\u0000",'


def _is_plain(values: list[Any]) -> bool:
    """Return whether values have only types of JSON, keys that are text, and a bounded depth.

    What a text or a number is, is not looked at. A value that contains itself is found: it is too
    deep, or a level of it has too many values. Encoding the values and reading them back to compare
    them takes more than twice as long.
    """
    for _ in range(MAX_DEPTH + 1):
        kinds = set(map(type, values))
        containers = kinds & _CONTAINERS
        if not all(issubclass(kind, _SCALARS) for kind in kinds - containers):
            return False
        if not containers:
            return True
        inner: list[Any] = []
        for kind in containers:
            outer: Iterable[Any] = values
            if len(kinds) > 1:
                outer = [item for item in values if type(item) is kind]
            if kind is dict:
                if not all(issubclass(key, str) for key in set(map(type, set().union(*outer)))):
                    return False
                outer = map(dict.values, outer)
            inner += chain.from_iterable(outer)
            if len(inner) > _MOST_WALKED:
                return False
        values = inner
    return False


def _is_flat(value: dict[Any, Any]) -> bool:
    """Return whether a dict has only texts as its keys, and texts, numbers and null in it."""
    return set(map(type, value)) <= {str} and set(map(type, value.values())) <= _FLAT


def _is_deep(text: str, value: Any) -> bool:
    """Return whether a value is nested deeper than `MAX_DEPTH`, of which ``text`` is the JSON."""
    # A level takes two characters, and two brackets: most texts need no look at all.
    if len(text) <= 2 * MAX_DEPTH or text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for outer in level:
            if type(outer) is list:
                inner += outer
            elif type(outer) is dict:
                inner += outer.values()
        if not inner:
            return False
        level = inner
    return any(type(item) in (list, dict) for item in level)


class JsonCodec:
    """The standard library's JSON, made strict."""

    def dumps(self, value: Any, /, *, path: str = "payload") -> str:
        """Return ``value`` as compact JSON text.

        Args:
            value: dicts with string keys, lists, tuples, strings, ints, floats, bools, None, and
                objects of the classes that `encoding` knows.
            path: What to call the value in an error.

        Raises:
            PayloadError: with the path of the first offending value.
        """
        return _text(value, path, rich=True)

    def dumps_each(self, values: Sequence[Any], /) -> list[str] | None:
        """Return each value as `dumps` does, for little more than half the price.

        None when one of them has to be looked at by itself.
        """
        texts: list[str] = []
        for start in range(0, len(values), _AT_ONCE):
            some = list(values[start : start + _AT_ONCE])
            try:
                if not _is_plain(some):
                    return None
                joined = _encode_plain([part for value in some for part in (value, "\0")][:-1])
                joined.encode()
            except (TypeError, ValueError, RecursionError):
                return None
            # More than those between the values: a text has NUL, or looks as if it had.
            if joined.count("\\u0000") >= len(some):
                return None
            if "+" in joined:
                joined = _without_exponents(joined)
            texts += joined[1:-1].split(_BETWEEN)
        return texts

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


def strict_text(value: Any, path: str) -> str:
    """Return as `JsonCodec.dumps` what nobody reads by an annotation, such as headers."""
    return _text(value, path, rich=False)


def _text(value: Any, path: str, *, rich: bool) -> str:
    # One pass in C settles nearly every payload; only what looks odd is walked in Python.
    text = None
    try:
        text = _encode(value)
        text.encode()
        if "+" in text:
            text = _without_exponents(text)
        if "\\u0000" not in text:
            if type(value) is dict and _is_flat(value):
                return text
            back = json.loads(text)
            if back == value and not _is_deep(text, back):
                return text
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        plain = _plain(value, rich=rich)
        return _without_exponents(_encode(plain)) if text is None else text
    except _Fault as fault:
        raise fault.at(path) from fault.__cause__
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(path, f"is not JSON: {error}") from error


def _without_exponents(text: str) -> str:
    """Write large floats digit by digit: jsonb makes 10000000000000000 of 1e16, an integer."""
    return _LARGE_FLOAT.sub(_digits, text) if "e+" in text else text


def _digits(found: re.Match[str]) -> str:
    text = found[0]
    return text if text.startswith('"') else f"{Decimal(text):f}.0"


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


def _plain(value: Any, depth: int = 0, *, rich: bool) -> Any:
    """Return a value as JSON has it; raise for the first that cannot be stored and read back."""
    match value:
        case None | bool():
            return value
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
            return _plain_members(value, depth, rich=rich)
        case _:
            return _plain_object(value, depth, rich=rich)
    return value


def _plain_members(value: Any, depth: int, *, rich: bool) -> Any:
    step: Any
    named = isinstance(value, dict)
    plain: list[tuple[Any, Any]] = []
    for step, item in value.items() if named else enumerate(value):
        if named and not isinstance(step, str):
            raise _Fault(f"has the key {safe_repr(step)}: keys must be strings")
        try:
            if named:
                _check_text(step)
            plain.append((step, _plain(item, depth + 1, rich=rich)))
        except _Fault as fault:
            # Written only now: spelling out the path of every value would take most of the time.
            identifier = named and step.isidentifier()
            fault.steps.append(f".{step}" if identifier else f"[{step!r}]")
            raise
    return dict(plain) if named else [item for _, item in plain]


def _plain_object(value: Any, depth: int, *, rich: bool) -> Any:
    """Return what stands for an object of a class that JSON does not have."""
    kind = type(value).__name__
    faults: list[_Fault] = []
    try:
        for way in encoding.written(value) if rich else ():
            plain = _plain(way, depth, rich=rich)
            if isinstance(way, encoding.Made):
                plain = encoding.Made(plain)
            if (fault := _lost(value, plain)) is None:
                return plain
            faults.append(fault)
    except _Fault:
        raise
    except Exception as error:
        raise _Fault(f"is a {kind} that cannot be written: {error}") from error
    if faults:
        raise faults[0]
    raise _Fault(f"is a {kind}: {_fix(value)}")


def _lost(value: Any, plain: Any) -> _Fault | None:
    """Return why an object does not come back equal from what stands for it, if it does not."""
    kind = type(value).__name__
    try:
        where = encoding.lost(value, plain)
    except PayloadError as error:
        return _Fault(f"is a {kind} that cannot be read back: {error.problem}", error.path)
    except Exception as error:  # noqa: BLE001 - of the class, which is the host's
        return _Fault(f"is a {kind} that cannot be read back: {error}")
    if where is None:
        return None
    if where:
        return _Fault(f"would not come back equal from the annotation of its {kind}", where)
    return _Fault(f"is a {kind} that would not come back equal{_hint(value)}")


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


def _hint(value: object) -> str:
    if isinstance(value, (datetime, time)):
        return ": its time zone, or its fold, has no text"
    return ""


def _fix(value: object) -> str:
    if isinstance(value, (date, time)):
        return "send value.isoformat()"
    if isinstance(value, (set, frozenset)):
        return "send a sorted list"
    if isinstance(value, Mapping):
        return "send dict(value)"
    return "send a string, a number, a list or a dict"
