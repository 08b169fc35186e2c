"""Payloads as the types that handlers ask for.

The codec has turned the stored text into JSON values by then; here these become an instance of a
pydantic model, a msgspec struct or a dataclass. Which library that is, the class itself tells:
neither is imported unless a handler uses it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeAlias

from ..errors import InvalidArgument, PayloadError, shown

__all__ = ["Convert", "converter"]

Convert: TypeAlias = Callable[[Any], Any]
"""Makes a handler's argument of a decoded payload; raises `PayloadError`."""

_PLAIN = (dict, list, str, int, float, bool, type(None))


def converter(kind: Any) -> Convert:
    """Return what makes a handler's argument of a payload.

    Args:
        kind: A pydantic model, a msgspec struct, a dataclass, ``dict[...]``, ``list[...]``,
            ``str``, ``int``, ``float``, ``bool``, or Any.

    Raises:
        InvalidArgument: it is something else.
    """
    if kind is Any or kind is object:
        return lambda value: value
    origin = typing.get_origin(kind) or kind
    if hasattr(kind, "model_validate"):
        return _checked(kind.model_validate)
    if hasattr(kind, "__struct_fields__"):
        import msgspec  # noqa: PLC0415 - the handler's own choice

        return _checked(lambda value: msgspec.convert(value, kind))
    if hasattr(kind, "__pydantic_validator__"):
        return _checked(kind.__pydantic_validator__.validate_python)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _checked(lambda value: _filled(kind, value))
    if origin in _PLAIN:
        return _checked(lambda value: _of_type(origin, value))
    raise InvalidArgument(
        f"a payload can be a pydantic model, a msgspec struct, a dataclass, dict, list, str, int, "
        f"float, bool or Any, not {shown(kind)}"
    )


def _checked(make: Convert) -> Convert:
    """Turn whatever a library raises about a value into the one error for payloads."""

    def convert(value: Any) -> Any:
        try:
            return make(value)
        except PayloadError:
            raise
        except Exception as error:
            raise PayloadError("payload", f"does not fit the handler: {error}") from error

    return convert


def _of_type(wanted: Any, value: Any) -> Any:
    right = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not right:
        raise PayloadError(
            "payload", f"must be {wanted.__name__} for this handler, not {type(value).__name__}"
        )
    return value


def _filled(kind: type[Any], value: Any, path: str = "payload") -> Any:
    """Make a dataclass, and those that its fields are, of dicts; values are taken as they are."""
    if not isinstance(value, dict):
        raise PayloadError(path, f"must be an object with the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind) if one.init}
    if unknown := sorted(value.keys() - fields.keys()):
        raise PayloadError(path, f"has fields that {kind.__name__} has not: {', '.join(unknown)}")
    given = {
        name: _filled(hints[name], inner, f"{path}.{name}")
        if isinstance(hints[name], type) and dataclasses.is_dataclass(hints[name])
        else inner
        for name, inner in value.items()
    }
    if missing := sorted(name for name in fields.keys() - given.keys() if _needed(fields[name])):
        raise PayloadError(path, f"lacks {', '.join(missing)} of {kind.__name__}")
    return kind(**given)


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
