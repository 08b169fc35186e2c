"""Payloads as the types that handlers ask for.

The codec has turned the stored text into JSON values by then; `encoding` makes of these what the
annotation says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .. import encoding
from ..errors import InvalidArgument, safe_repr

__all__ = ["Convert", "converter"]

Convert: TypeAlias = Callable[[Any], Any]
"""Makes a handler's argument of a decoded payload; raises `PayloadError`."""


def converter(kind: Any) -> Convert:
    """Return what makes a handler's argument of a payload.

    Args:
        kind: A pydantic model, a msgspec struct, a dataclass, a TypedDict, ``UUID``, ``date``,
            ``datetime``, ``time``, ``timedelta``, ``Decimal``, an Enum, a list, tuple or dict of
            these, a union of them; ``str``, ``int``, ``float``, ``bool``, or Any.

    Raises:
        InvalidArgument: it is something else.
    """
    if kind is Any or kind is object:
        return lambda value: value
    read = encoding.reader(kind)
    if read is not encoding.as_it_is:
        return lambda value: encoding.read_at(read, value, "payload")
    raise InvalidArgument(
        f"a payload can be a pydantic model, a msgspec struct, a dataclass, a TypedDict, dict, "
        f"list, tuple, str, int, float, bool, UUID, date, datetime, time, timedelta, Decimal, an "
        f"Enum, a union of these or Any, not {safe_repr(kind)}"
    )
