"""Fields of the dataclasses that users fill in, with what their command-line flags and their checks need."""

import numbers
import os
from collections.abc import Collection, Iterable
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparsefw.errors import InputError, option

# Marks a default that depends on other fields; `__post_init__` replaces it by the value.
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
    **others: Any,
) -> Any:
    """A field of a dataclass that is also a command-line flag.

    Args:
        help: text for --help. It names the default in brackets where that depends on other fields.
        default: the field's default.
        metavar: placeholder for the value in --help.
        choices: the allowed values.
        least, most: the allowed range, both ends included.
        several: whether the flag may be repeated; the field is then a tuple.
        others: further metadata.
    """
    known = dict(help=help, metavar=metavar, choices=choices, least=least, most=most, several=several)
    return field(default=default, metadata=known | others)


# Arguments of other libraries by what they are here; "": they are nothing here.
ELSEWHERE = {
    "block_size": "", "blocksize": "", "dampening_frac": "damp", "percdamp": "damp", "targets": "include",
    "max_seq_length": "seqlen", "num_calibration_samples": "nsamples", "output_dir": "output", "verbose": "progress",
    "processing_class": "tokenizer", "processor": "tokenizer",
    "prune_method": "method", "mask_structure": "sparsity", "prunem": "sparsity", "prunen": "sparsity",
    "sparsity_profile": "sparsity", "sparsity_ratio": "sparsity", "sparsity_type": "sparsity",
}  # fmt: skip


def check_names(call: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse arguments that a call does not have, and name those that may be meant.

    Raises:
        TypeError: a name is unknown.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(ELSEWHERE.get(name, name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")


def set_field(settings: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass. Only its `__post_init__` may do so."""
    object.__setattr__(settings, name, value)


def check_fields(settings: Any) -> None:
    """Check types, choices and ranges, and store numbers as Python's own, paths as text where a field is one.

    A field of several values may be given as a list or as one value, and becomes a tuple. One whose default depends on
    others may still be `DEPENDS`.

    Raises:
        InputError: a value has the wrong type, is none of the choices, or is out of its range.
    """
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value is DEPENDS and f.default is DEPENDS:
            continue
        if f.metadata["least"] is not None:
            whole = f.type in (int, int | None)
            value = checked_number(f.name, value, f.metadata["least"], f.metadata["most"], whole=whole)
            set_field(settings, f.name, value)
        elif f.type is bool:
            # numpy's bool is no subclass of Python's.
            if type(value).__name__ not in ("bool", "bool_"):
                raise InputError(f"{option(f.name, value)}: expected True or False")
            set_field(settings, f.name, bool(value))
        elif f.type in (Path, Path | None):
            set_field(settings, f.name, checked_path(f.name, value))
        else:
            listed = f.metadata["several"] and isinstance(value, Iterable) and not isinstance(value, str)
            texts = tuple(str(x) if isinstance(x, Path) else x for x in (value if listed else (value,)))
            for text in texts:
                _check_text(f, text)
            set_field(settings, f.name, texts if f.metadata["several"] else texts[0])


def check_needs(name: str, given: bool, **settings: Any) -> None:
    """Refuse settings that need something that a run does not have: they would do nothing.

    Args:
        name: name of the field that gives it.
        given: whether it is given.
        settings: the settings by name; None: not given.

    Raises:
        InputError: a setting is given, and what it is a setting of is not.
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


def checked_number(name: str, value: Any, least: float, most: float | None, *, whole: bool = False) -> Any:
    """The value as an int or a float of Python's own, which report.json can hold.

    Raises:
        InputError: it is no number, no whole one where that is needed, or not within its range; NaN never is.
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
    """The value as a path, in which `~` at the beginning is the user's own folder.

    Raises:
        TypeError: it is neither a text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{option(name)}: expected a path, got {type(value).__name__}")
    # A shell leaves `--output=~/pruned` as it is.
    return Path(os.path.expanduser(value))
