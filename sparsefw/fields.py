"""Define fields of dataclasses that are also command-line flags, and check their values."""

import numbers
import os
from collections.abc import Collection, Iterable
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparsefw.errors import InputError, errors_in_one_line, option

# Marks a default that depends on other fields. `__post_init__` replaces it by the value.
DEPENDS: Any = None


def flag(
    help: str,
    default: Any = DEPENDS,
    *,
    metavar: str | None = None,
    choices: Collection[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    several: bool = False,
) -> Any:
    """Define a field of a dataclass that is also a command-line flag.

    Args:
        help: text for --help. It names a default that depends on other fields in brackets.
        default: default of the field.
        metavar: placeholder for the value in --help.
        choices: the allowed values.
        least, most: the allowed range, both ends included.
        several: whether the flag may be repeated. Then the field is a tuple.
    """
    metadata = dict(help=help, metavar=metavar, choices=choices, least=least, most=most, several=several)
    return field(default=default, metadata=metadata)


# Names of arguments in other libraries, and their names here; "" for arguments that do not exist here.
ELSEWHERE = {
    "block_size": "", "dampening_frac": "damp", "percdamp": "damp", "targets": "include",
    "max_seq_length": "seqlen", "num_calibration_samples": "nsamples", "output_dir": "output",
    "processing_class": "tokenizer", "processor": "tokenizer",
    "prune_method": "method", "mask_structure": "sparsity",
    "sparsity_ratio": "sparsity", "sparsity_type": "sparsity",
}  # fmt: skip


def check_names(call: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse arguments that a call does not have, and suggest a name that it has.

    Raises:
        TypeError: a name is unknown.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(ELSEWHERE.get(name, name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")


def set_field(settings: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass, in its `__post_init__`."""
    object.__setattr__(settings, name, value)


def set_defaults(settings: Any, values: dict[str, Any]) -> None:
    """Set each of these fields that has no value yet."""
    for name, value in values.items():
        if getattr(settings, name) is DEPENDS:
            set_field(settings, name, value)


def check_fields(settings: Any) -> None:
    """Check types, choices and ranges of all fields, and convert their values.

    Numbers become Python's own, and paths become text in a field of text. A field of several values takes a list or one
    value, and becomes a tuple. A field may still be `DEPENDS` if that is its default.

    Raises:
        InputError: a value has the wrong type, is not among the choices, or is out of its range.
    """
    for f in fields(settings):
        name, value = f.name, getattr(settings, f.name)
        if value is DEPENDS and f.default is DEPENDS:
            continue
        if f.metadata["least"] is not None:
            whole = f.type in (int, int | None)
            value = checked_number(name, value, f.metadata["least"], f.metadata["most"], whole)
            set_field(settings, name, value)
        elif f.type is bool:
            # numpy's bool is no subclass of Python's.
            if type(value).__name__ not in ("bool", "bool_"):
                raise InputError(f"{option(name, value)}: expected True or False")
            set_field(settings, name, bool(value))
        elif f.type in (Path, Path | None):
            set_field(settings, name, checked_path(name, value))
        else:
            listed = f.metadata["several"] and isinstance(value, Iterable) and not isinstance(value, str)
            texts = tuple(str(x) if isinstance(x, Path) else x for x in (value if listed else (value,)))
            for text in texts:
                _check_text(f, text)
            set_field(settings, name, texts if f.metadata["several"] else texts[0])


def check_needs(name: str, given: object, **settings: Any) -> None:
    """Refuse settings that would do nothing, because a field that they need is not set.

    Args:
        name: name of the field that the settings need.
        given: value of that field; if it is empty or None, the field is not set.
        settings: values of the settings by name; None: not set.

    Raises:
        InputError: a setting is set, and the field that it needs is not.
    """
    for setting, value in settings.items():
        if value is not None and not given:
            raise InputError(f"{option(setting)}: needs {option(name)}")


def _check_text(f: Field, text: Any) -> None:
    choices = f.metadata["choices"]
    if not isinstance(text, str):
        raise InputError(f"{option(f.name)}: expected a name or a path, got {type(text).__name__}")
    if choices is not None and text not in choices:
        raise InputError(f"{option(f.name, text)}: expected one of {', '.join(choices)}")
    _check_encodable(f.name, text)


def _check_encodable(name: str, text: str) -> None:
    """Refuse a name that is not UTF-8: safetensors cannot open it, and no report can hold it."""
    with errors_in_one_line(option(name), "rename the file or folder"):
        text.encode()


def checked_number(name: str, value: Any, least: float, most: float | None, whole: bool) -> Any:
    """Convert a number to Python's int or float, which JSON can hold.

    Raises:
        InputError: the value is no number, not whole where it has to be, out of its range, or NaN.
    """
    integral = isinstance(value, numbers.Integral)
    if isinstance(value, bool) or not (integral or (isinstance(value, numbers.Real) and not whole)):
        raise InputError(f"{option(name, value)}: expected a {'whole ' if whole else ''}number")
    number = int(value) if integral else float(value)
    if not (least <= number and (most is None or number <= most)):
        upper = "" if most is None else f" and at most {most}"
        raise InputError(f"{option(name, value)}: expected at least {least}{upper}")
    return number


def checked_path(name: str, value: str | Path) -> Path:
    """Convert a text or path to a path, and expand `~` at its beginning.

    Raises:
        InputError: the value is neither a text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{option(name)}: expected a path, got {type(value).__name__}")
    # A shell leaves `--output=~/pruned` as it is.
    path = Path(os.path.expanduser(value))
    _check_encodable(name, os.path.abspath(path))
    return path
