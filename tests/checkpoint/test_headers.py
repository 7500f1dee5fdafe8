"""Headers of safetensors files: what is refused, and that the library refuses what this package leaves to it."""

import json
from pathlib import Path

import pytest
from helpers.checkpoints import refused

from sparsefw.checkpoint import source
from sparsefw.checkpoint.source import INDEX, SINGLE, inspect


def write_header(path: Path, header: str | bytes, body: int = 8, length: int | None = None) -> None:
    """A safetensors file with any header, a body of zeros, and any length in front of them."""
    header = header.encode() if isinstance(header, str) else header
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(body))


def entry(shape="[2]", start=0, end=8, dtype="F32") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**30, source.MAX_HEADER_BYTES + 1, 200, 1])
def test_length_of_the_header(folder, length):
    write_header(folder / SINGLE, f'{{"a": {entry()}}}', length=length)
    with refused("model.safetensors: not a whole safetensors file"):
        inspect(folder)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (f'{{"a": {entry()}}}', 9),
        (f'{{"a": {entry(start=4, end=12)}}}', 12),
        (f'{{"a": {entry()}, "b": {entry(start=4, end=12)}}}', 12),
        (f'{{"a": {entry()}, "b": {entry(start=12, end=20)}}}', 20),
        (f'{{"a": {entry()}, "b": {entry()}}}', 8),
        (f'{{"a": {entry(start=8, end=0)}}}', 8),
        (f'{{"a": {entry(start=2**63, end=2**63 + 8)}}}', 8),
        (f'{{"a": {entry("[-2]")}}}', 8),
        (f'{{"a": {entry("[2.0]")}}}', 8),
        (f'{{"a": {entry("[1e999]")}}}', 8),
        (f'{{"a": {entry("[2" + "0" * 5000 + "]")}}}', 8),
        (f'{{"a": {entry("[4294967296, 4294967296]", end=0)}}}', 0),
        (f'{{"a": {entry("[4611686018427387904]", end=0)}}}', 0),
        (f'{{"a": {entry(dtype="X9")}}}', 8),
        (f'{{"__metadata__": {{"x": 1}}, "a": {entry()}}}', 8),
        ('{"a": ' + "[" * 100_000, 8),
        (f'[{{"a": {entry()}}}]', 8),
        (b'{"\xff": ' + entry().encode() + b"}", 8),
        (b"\xef\xbb\xbf{}", 0),
    ],
)
def test_header_that_lies(folder, header, body):
    write_header(folder / SINGLE, header, body)
    with refused("model.safetensors: not a whole safetensors file"):
        inspect(folder)


def test_tensors_may_lie_in_any_order(folder):
    write_header(folder / SINGLE, f'{{"a": {entry(start=8, end=16)}, "b": {entry()}, "c": {entry("[]", 16, 20)}}}', 20)
    assert {n: t.shape for n, t in inspect(folder).tensors.items()} == {"a": (2,), "b": (2,), "c": ()}


def test_a_name_stands_once(folder, shards):
    # safetensors takes the last entry.
    write_header(folder / SINGLE, f'{{"a": {entry()}, "a": {entry("[2, 1]")}}}')
    with refused("model.safetensors: a is in it twice; keep one"):
        inspect(folder)
    (shards / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with refused(f"{INDEX}: a is in it twice; keep one"):
        inspect(shards)


def test_an_entry_has_names(folder):
    # safetensors takes a list for an entry; other readers do not.
    write_header(folder / SINGLE, '{"a": ["F32", [2], [0, 8]]}')
    with refused("model.safetensors: tensor a is described by a list"):
        inspect(folder)


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**63 - 1], [2**32, 2**31, 0], [0] * 9, [1] * 8 + [0]])
def test_shape_of_nothing(folder, shape):
    write_header(folder / SINGLE, f'{{"a": {entry()}, "b": {entry(shape, 8, 8)}}}')
    with refused("model.safetensors: tensor b has the shape .*, which no tensor has"):
        inspect(folder)
    write_header(folder / SINGLE, f'{{"a": {entry()}, "b": {entry([0, 2**40], 8, 8)}}}')
    assert inspect(folder).tensors["b"].nbytes == 0


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\r", "\u202ea", "x" * 10**6])
def test_names_that_cannot_be_printed(folder, shards, name):
    for path, content in [(folder / SINGLE, None), (shards / INDEX, {name: "three.safetensors"})]:
        if content is None:
            write_header(path, f"{{{json.dumps(name)}: {entry()}}}")
        else:
            path.write_text(json.dumps({"weight_map": content | {"a": "one.safetensors"}}))
            write_header(shards / "three.safetensors", f"{{{json.dumps(name)}: {entry()}}}")
        with refused("a tensor is called|is missing from the index") as caught:
            inspect(path.parent)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
