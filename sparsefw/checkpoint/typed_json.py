"""Read JSON into dataclasses, exactly as the types of their fields say.

The file may come from a stranger. Every field has to be there, and no other; only one that is marked as ADDED may be
missing. A value of another kind is refused with its place in the file, `layers[3].shape`. NaN and Infinity, which
Python writes and reads, are numbers.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sparsefw.checkpoint.trust import parse_object
from sparsefw.errors import InputError, shown

T = TypeVar("T")

NAMES = {
    dict: "an object",
    list: "an array",
    tuple: "an array",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "a boolean",
    NoneType: "null",
}


# Metadata of a dataclass's field that files of older versions lack; it has a default.
ADDED = {"added": True}


class _Mismatch(Exception):
    """A value is not of the type that is asked for; `place` is its place in the file, `.layers[3].shape`."""

    place = ""

    def inside(self, place: str) -> "_Mismatch":
        """The same mismatch, seen from the value around it."""
        self.place = place + self.place
        return self


def parse(kind: type[T], content: bytes, path: Path) -> T:
    """Read a file's content, a JSON object, into a dataclass.

    Raises:
        InputError: it is not JSON, or not what the dataclass's types say; one line that names the file and the place.
    """
    return convert(kind, parse_object(content, path), f"{path}: ")


def convert(kind: type[T], value: Any, where: str) -> T:
    """Make parsed JSON a value of this kind.

    Args:
        kind: a dataclass, or any type that the fields of one may have.
        value: as `json.loads` gives it.
        where: text before the place in a message.

    Raises:
        InputError: the value is not of this kind.
    """
    try:
        # Classes are hashable; mypy looks at the hash of their instances.
        return _reader(kind)(value)  # type: ignore[arg-type]
    except _Mismatch as mismatch:
        place = mismatch.place.removeprefix(".")
        raise InputError(f"{where}{f'{place}: ' if place else ''}{mismatch}") from None


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """The function that checks and converts values of a type."""
    if kind is Any:
        return lambda value: value
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}
        added = {field.name for field in fields(kind) if "added" in field.metadata}
        return partial(_read_dataclass, kind, readers, added)
    if origin is list or (origin is tuple and inner[-1] is ...):
        return lambda value: origin(_read_items(_reader(inner[0]), _checked(list, value)))
    if origin is tuple:
        return partial(_read_tuple, [_reader(item) for item in inner])
    if origin is dict:
        return lambda value: {
            key: _at(f".{shown(key)}", _reader(inner[1]), item) for key, item in _checked(dict, value).items()
        }
    if origin is UnionType:
        return partial(_read_union, inner)
    return _read_number if kind is float else partial(_checked, kind)


def _checked(kind: type, value: Any) -> Any:
    """A value of exactly this type: True is no number."""
    if type(value) is not kind:
        raise _Mismatch(f"expected {NAMES[kind]}, got {NAMES[type(value)]}")
    return value


def _read_number(value: Any) -> float:
    """A float; it may be written as a whole number."""
    try:
        return float(value) if type(value) is int else _checked(float, value)
    except OverflowError:
        raise _Mismatch("expected a number, got one that is too large") from None


def _at(place: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except _Mismatch as mismatch:
        raise mismatch.inside(place) from None


def _read_items(read: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    return [_at(f"[{n}]", read, value) for n, value in enumerate(values)]


def _read_tuple(readers: list[Callable[[Any], Any]], value: Any) -> tuple[Any, ...]:
    if len(_checked(list, value)) != len(readers):
        raise _Mismatch(f"expected {len(readers)} values, got {len(value)}")
    return tuple(_at(f"[{n}]", read, item) for n, (read, item) in enumerate(zip(readers, value, strict=True)))


def _read_dataclass(kind: type[T], readers: dict[str, Callable[[Any], Any]], added: set[str], value: Any) -> T:
    values = _checked(dict, value)
    for name in readers:
        if name not in values and name not in added:
            raise _Mismatch("missing; prune again with this version of sparsefw").inside(f".{name}")
    for name in values:
        if name not in readers:
            raise _Mismatch("unknown to this version of sparsefw").inside(f".{shown(name)}")
    return kind(**{name: _at(f".{name}", readers[name], values[name]) for name in values})


def _read_union(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        if is_dataclass(kind) and isinstance(value, dict):
            # Its message tells what the object lacks.
            return _reader(kind)(value)  # type: ignore[arg-type]
        try:
            return _reader(kind)(value)
        except _Mismatch:
            pass
    names = list(dict.fromkeys(NAMES[dict if is_dataclass(kind) else get_origin(kind) or kind] for kind in kinds))
    raise _Mismatch(f"expected {', '.join(names[:-1])} or {names[-1]}, got {NAMES[type(value)]}")
