"""Python values that JSON does not have, as JSON values and back, by their class.

`written` says how an object is written, and `reader` makes an object of what was written, by an
annotation: a handler's, or that of a dataclass's field. Both know the same classes, so that what
`enqueue` writes a handler reads. An object is written only if its own class reads it back to an
equal object; otherwise it is refused.

==========================  ====================================================================
class                       JSON
==========================  ====================================================================
``UUID``                    its text
``date``, ``datetime``,     ISO 8601, with the offset from UTC where there is one
``time``
``timedelta``               ISO 8601: ``P1DT3.5S``
``Decimal``                 its text: ``"1.10"``
``Enum``                    its value
dataclasses                 an object with the fields that ``__init__`` takes
pydantic models             what pydantic makes of them, by alias if that can be read
msgspec structs             what msgspec makes of them
==========================  ====================================================================

JSON's own types are checked wherever they stand in an annotation: ``list[int]`` takes integers. An
integer is taken for ``float``, and becomes one; ``True`` is no ``int``.

Neither pydantic nor msgspec is imported unless a class of theirs is met.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from typing import Any, TypeAlias
from uuid import UUID

from .errors import InvalidArgument, PayloadError, safe_repr

__all__ = ["Made", "Read", "as_it_is", "lost", "read_at", "reader", "written"]

Read: TypeAlias = Callable[[Any, str], Any]
"""Makes an object of a JSON value that is found at a path; raises `PayloadError`."""

# --------------------------------------------------------------------------------- writing


class Made(dict[str, Any]):
    """The fields of a dataclass as JSON has them, and what the class has made of them.

    An object within another is read when it is written itself, and need not be read once more at
    each level above it.
    """

    made: Any = None


def written(value: Any) -> Iterator[Any]:
    """Return in what ways an object may be written, best first; none if its class is unknown.

    What they hold is to be written in turn.
    """
    kind = type(value)
    if isinstance(value, Enum):
        yield value.value
    elif isinstance(value, timedelta):
        yield _duration_text(value)
    elif isinstance(value, (date, time)):
        yield value.isoformat()
    elif isinstance(value, (UUID, Decimal)):
        yield str(value)
    elif hasattr(kind, "__pydantic_serializer__"):
        write = kind.__pydantic_serializer__.to_python
        for by_alias in (True, False):
            yield write(value, mode="json", by_alias=by_alias, round_trip=True, warnings=False)
    elif hasattr(kind, "__struct_fields__"):
        yield sys.modules["msgspec"].to_builtins(value)
    elif dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        yield Made({field.name: getattr(value, field.name) for field in fields if field.init})


def lost(value: Any, text: Any) -> str | None:
    """Return where an object differs from what its class makes of what was written.

    None when it comes back equal, ``""`` when it differs as a whole, otherwise ``.field``.
    """
    back = reader(type(value))(text, "")
    if isinstance(text, Made):
        text.made = back
    if type(back) is type(value) and bool(back == value) and _says_the_same(back, value):
        return None
    kinds = ("__struct_fields__", "__pydantic_fields__", "__dataclass_fields__")
    names = next((getattr(back, attr) for attr in kinds if hasattr(type(back), attr)), ())
    for name in names:
        if getattr(back, name, None) != getattr(value, name, None):
            return f".{name}"
    return ""


def _says_the_same(first: Any, other: Any) -> bool:
    """Whether two equal times are the same: ``==`` does not look at ``fold``, or at a time zone."""
    if not isinstance(first, (datetime, time)):
        return True
    if first.utcoffset() is None:
        return other.tzinfo is None and first.fold == other.fold
    same: bool = first.utcoffset() == other.utcoffset()
    return same


def _duration_text(span: timedelta) -> str:
    size = abs(span)
    seconds = f"{size.seconds}.{size.microseconds:06}".rstrip("0").rstrip(".")
    return f"{'-' if span < timedelta(0) else ''}P{size.days}DT{seconds}S"


# --------------------------------------------------------------------------------- reading


def as_it_is(value: Any, _path: str) -> Any:
    """Return a JSON value itself."""
    return value


def reader(kind: Any) -> Read:
    """Return what makes an object of a JSON value, or `as_it_is` if an annotation asks no more."""
    # Only for classes: unions are equal in any order, but their order decides what is tried first.
    is_class = isinstance(kind, type) and typing.get_origin(kind) is None
    return _of_known_class(kind) if is_class else _made(kind)


def read_at(read: Read, value: Any, path: str) -> Any:
    """Make an object, and turn any error about the value into one with its path."""
    try:
        return read(value, path)
    except PayloadError:
        raise
    except Exception as error:
        raise PayloadError(path, f"does not fit the handler: {error}") from error


def _made(kind: Any) -> Read:
    kind = types.NoneType if kind is None else _bare(kind)
    origin = typing.get_origin(kind)
    if (read := _of_fields(kind, origin or kind)) is not None:
        return read
    if kind is tuple:
        return _of_tuple((Any, ...))
    if origin is None and isinstance(kind, type):
        return _of_class(kind)
    return _of_generic(origin, typing.get_args(kind))


def _of_fields(kind: Any, cls: Any) -> Read | None:
    """Return the reader of a class with fields: of msgspec, pydantic or a dataclass."""
    if hasattr(cls, "__struct_fields__"):
        return lambda value, _path: sys.modules["msgspec"].convert(value, kind)
    if hasattr(cls, "__pydantic_validator__"):
        return lambda value, _path: _pydantic(cls, value)
    if dataclasses.is_dataclass(cls):
        return lambda value, path: _dataclass(cls, value, path)
    if hasattr(cls, "__required_keys__"):
        return lambda value, path: _typed_dict(cls, value, path)
    return None


_of_known_class = lru_cache(1_024)(_made)


def _bare(kind: Any) -> Any:
    """Return an annotation without what says nothing about the value: Annotated, NewType, Final."""
    while True:
        if typing.get_origin(kind) in (typing.Annotated, typing.Final):
            kind = typing.get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):
            kind = kind.__supertype__
        elif type(kind).__name__ == "TypeAliasType":
            kind = kind.__value__
        else:
            return kind


def _of_class(kind: type[Any]) -> Read:
    if kind in _PLAIN:
        return _PLAIN[kind]
    for base, make in _MAKERS.items():
        if issubclass(kind, base):
            return lambda value, path: make(kind, value, path)
    return as_it_is


def _of_generic(origin: Any, kinds: tuple[Any, ...]) -> Read:
    if origin in (typing.Union, types.UnionType):
        return _of_union(kinds)
    if origin is typing.Literal:
        return lambda value, path: _literal(kinds, value, path)
    if origin is tuple:
        return _of_tuple(kinds)
    return _of_container(origin, kinds) if isinstance(origin, type) else as_it_is


def _of_container(origin: type[Any], kinds: tuple[Any, ...]) -> Read:
    """Return the reader of a list or a dict, or of what either is an instance of."""
    read = reader(kinds[-1]) if kinds else as_it_is
    if len(kinds) == 1 and issubclass(list, origin):
        return lambda value, path: _array(read, value, path)
    if issubclass(dict, origin):
        if kinds and not _may_be_text(kinds[0]):
            raise InvalidArgument(
                f"the keys of a JSON object are text: annotate dict[str, ...] and convert the keys "
                f"yourself, not {origin.__name__}[{_names(kinds)}]"
            )
        return lambda value, path: _object(read, value, path)
    return as_it_is


def _may_be_text(kind: Any) -> bool:
    """Return whether a text fits an annotation as it is."""
    kind = _bare(kind)
    origin, kinds = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(map(_may_be_text, kinds))
    if origin is typing.Literal:
        return any(isinstance(choice, str) for choice in kinds)
    cls = origin or kind
    return kind is Any or not isinstance(cls, type) or issubclass(cls, str) or issubclass(str, cls)


def _of_tuple(kinds: tuple[Any, ...]) -> Read:
    if len(kinds) == 2 and kinds[1] is ...:  # noqa: PLR2004
        each = reader(kinds[0])
        return lambda value, path: tuple(_array(each, value, path))
    reads = [reader(kind) for kind in kinds]

    def read(value: Any, path: str) -> Any:
        if len(_of_type(list, value, path)) != len(reads):
            raise PayloadError(path, f"must have {len(reads)} elements, not {len(value)}")
        return tuple(
            read_at(entry, item, f"{path}[{place}]")
            for place, (entry, item) in enumerate(zip(reads, value, strict=True))
        )

    return read


def _of_union(kinds: tuple[Any, ...]) -> Read:
    """Return a reader for the first of some types that a value fits.

    Numbers, booleans and null fit the type that they have, wherever it stands. Text is tried as
    ``str`` after all others, which are more particular about it.
    """
    plain = [kind for kind in kinds if kind in (bool, int, float, type(None))]
    rest = sorted((kind for kind in kinds if kind not in plain), key=lambda kind: kind is str)
    others = [(kind, reader(kind)) for kind in rest]

    def read(value: Any, path: str) -> Any:
        if type(value) in plain:
            return value
        problems = []
        for kind, read_kind in others:
            wanted = typing.get_origin(kind) or kind
            if read_kind is as_it_is and _is_other(value, wanted):
                continue
            try:
                return read_kind(value, path)
            except Exception as error:  # noqa: BLE001 - the next one may take it
                problems.append(str(error))
        if float in plain and type(value) is int:
            return float(value)
        raise PayloadError(path, f"fits none of {_names(kinds)}: {safe_repr(problems or value)}")

    return read


def _is_other(value: Any, wanted: Any) -> bool:
    return isinstance(wanted, type) and wanted is not Any and not isinstance(value, wanted)


def _names(kinds: Sequence[Any]) -> str:
    return ", ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)


def _of_type(wanted: type[Any], value: Any, path: str) -> Any:
    if isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    said = _SAID.get(wanted, wanted.__name__)
    found = "null" if value is None else type(value).__name__
    raise PayloadError(path, f"must be {said}, not {found}")


_SAID = {str: "text", list: "an array", dict: "an object", types.NoneType: "null"}

_PLAIN: dict[type[Any], Read] = {
    kind: partial(_of_type, kind) for kind in (bool, int, float, str, list, dict, types.NoneType)
}
_PLAIN_TYPE = {read: kind for kind, read in _PLAIN.items()}


def _text(value: Any, path: str) -> str:
    text: str = _of_type(str, value, path)
    return text


def _need_no_look(read: Read, values: Iterable[Any]) -> bool:
    """Whether all values are right as they are: told in C, since there may be very many."""
    if read is as_it_is:
        return True
    return (wanted := _PLAIN_TYPE.get(read)) is not None and set(map(type, values)) <= {wanted}


def _array(read: Read, value: Any, path: str) -> list[Any]:
    items: list[Any] = _of_type(list, value, path)
    if _need_no_look(read, items):
        return items
    return [read_at(read, item, f"{path}[{place}]") for place, item in enumerate(items)]


def _object(read: Read, value: Any, path: str) -> dict[str, Any]:
    members: dict[str, Any] = _of_type(dict, value, path)
    if _need_no_look(read, members.values()):
        return members
    return {name: read_at(read, inner, f"{path}.{name}") for name, inner in members.items()}


def _literal(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in choices:
        plain = choice.value if isinstance(choice, Enum) else choice
        if type(plain) is type(value) and plain == value:
            return choice
    raise PayloadError(
        path, f"must be one of {', '.join(map(repr, choices))}, not {safe_repr(value)}"
    )


def _enum(kind: type[Enum], value: Any, path: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        # Of a member whose value is no JSON either: written as that is.
        for member in kind:
            with contextlib.suppress(Exception):
                if reader(type(member.value))(value, path) == member.value:
                    return member
        raise PayloadError(path, f"does not fit the handler: {error}") from error


def _decimal(kind: type[Decimal], value: Any, path: str) -> Decimal:
    number = type(value) in (int, float)
    return kind(repr(value) if number else _text(value, path))


_DURATION = re.compile(
    r"(?P<sign>[+-]?)P(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+)D)?"
    r"(?:T(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?"
    r"(?:(?P<seconds>\d+)(?:[.,](?P<micro>\d{1,6}))?S)?)?"
)


def _duration(kind: type[timedelta], value: Any, _path: str) -> timedelta:
    """Make a duration of ISO 8601 (weeks to seconds), or of a number of seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return kind(seconds=value)
    if (found := _DURATION.fullmatch(str(value))) is None or str(value)[-1] in "PT":
        raise ValueError(f"{safe_repr(value)} is no duration: P1DT3.5S is one")
    parts = {
        name: int(found[name] or 0) for name in ("weeks", "days", "hours", "minutes", "seconds")
    }
    parts["microseconds"] = int((found["micro"] or "").ljust(6, "0"))
    if found["sign"] == "-":
        parts = {name: -number for name, number in parts.items()}
    return kind(**parts)


def _datetime(kind: type[datetime], value: Any, path: str) -> datetime:
    text = _text(value, path)
    try:
        date.fromisoformat(text)
    except ValueError:
        return kind.fromisoformat(text)
    raise PayloadError(path, f"is {safe_repr(text)}, a date without a time")


_MAKERS: dict[type[Any], Callable[[Any, Any, str], Any]] = {
    Enum: _enum,
    timedelta: _duration,
    datetime: _datetime,
    date: lambda kind, value, path: kind.fromisoformat(_text(value, path)),
    time: lambda kind, value, path: kind.fromisoformat(_text(value, path)),
    UUID: lambda kind, value, path: kind(_text(value, path)),
    Decimal: _decimal,
}


def _pydantic(kind: Any, value: Any) -> Any:
    make = getattr(kind, "model_validate", None) or kind.__pydantic_validator__.validate_python
    try:
        return make(value)
    except Exception as error:
        # A strict model takes a UUID, a time ... from text only where it reads JSON.
        with contextlib.suppress(Exception):
            return kind.__pydantic_validator__.validate_json(json.dumps(value))
        raise error from None


@lru_cache(1_024)
def _hints(kind: Any) -> dict[str, Read]:
    return {name: reader(hint) for name, hint in typing.get_type_hints(kind).items()}


def _typed_dict(kind: Any, value: Any, path: str) -> dict[str, Any]:
    members, reads = _of_type(dict, value, path), _hints(kind)
    if missing := sorted(kind.__required_keys__ - members.keys()):
        raise PayloadError(path, f"lacks {', '.join(missing)} of {kind.__name__}")
    return {
        name: read_at(reads.get(name, as_it_is), inner, f"{path}.{name}")
        for name, inner in members.items()
    }


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    """Make a dataclass of a dict; null is taken for a field whose default is None."""
    if isinstance(value, Made) and type(value.made) is kind:
        return value.made
    if not isinstance(value, dict):
        raise PayloadError(path, f"must be an object with the fields of {kind.__name__}")
    reads = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(value.keys() - fields.keys()):
        raise PayloadError(path, f"has fields that {kind.__name__} has not: {', '.join(unknown)}")
    if missing := sorted(name for name in fields.keys() - value.keys() if _needed(fields[name])):
        raise PayloadError(path, f"lacks {', '.join(missing)} of {kind.__name__}")
    return kind(
        **{
            name: None
            if inner is None and fields[name].default is None
            else read_at(reads[name], inner, f"{path}.{name}")
            for name, inner in value.items()
        }
    )


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
