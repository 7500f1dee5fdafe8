"""Checkpoints broken at random: each is read correctly or refused in one line, and nothing else is opened.

`pytest` runs a few, always the same ones. `python tests/checkpoint/test_fuzz.py 10000` draws that many of every kind.
"""

import contextlib
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import TENSORS
from helpers.families import save_model
from helpers.texts import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from sparsefw import checkpoint
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE, TOKENIZER_CONFIG, inspect
from sparsefw.data.tokenizer import load_tokenizer, tokenize
from sparsefw.errors import InputError
from sparsefw.model.streamed import StreamedModel

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer"
FAMILIES_LOADED = ("llama", "opt", "gemma3_text", "qwen3_moe")

# Limits for a checkpoint of a few KB. The seconds are CPU time, since other processes may use the machine.
SECONDS, BYTES = 1.0, 200 * 2**20

# Files by name: all of a checkpoint, or those that are changed.
Files = dict[str, bytes]


# How files are broken


@cache
def whole(family: str | None = None) -> Files:
    """A sound checkpoint: two shards of a few tensors, a tiny model, or no more than a tokenizer."""
    if family is None:
        shard_of = {name: "one.safetensors" if name in "ab" else "two.safetensors" for name in TENSORS}
        shards = {s: save({n: TENSORS[n] for n in TENSORS if shard_of[n] == s}) for s in set(shard_of.values())}
        index = {"metadata": {"total_size": 54}, "weight_map": shard_of}
        config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 3, "rope_scaling": {"factor": 2.0}}
        tokenizer = {"tokenizer_class": "LlamaTokenizer", "fast_tokenizer_files": ["tokenizer.json"]}
        contents = {INDEX: index, CONFIG: config, TOKENIZER_CONFIG: tokenizer}
        return shards | {name: json.dumps(content).encode() for name, content in contents.items()}
    with tempfile.TemporaryDirectory() as folder:
        if family == TOKENIZER:
            make_tokenizer(bos=True).save_pretrained(folder)
        else:
            save_model(Path(folder), family)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([16, 64, 1000, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "a", "b", "n", "../a", "/etc/passwd", "one.safetensors", "two.safetensors", "F32", "BF16", "F4", "I64"]
    ),
    st.sampled_from(["full_attention", "float32", "linear", "yarn", "gelu", "LlamaForCausalLM", "org/kernel", "gpt2"]),
    st.text(max_size=5),
    st.builds("".join, st.lists(st.sampled_from("\x1b[\n\r\0\u202e\x85a"), max_size=5)),
    st.integers(500, 3000).map(lambda n: "x" * n),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
KEYS = st.one_of(
    st.sampled_from([*checkpoint.trust.REFUSED, "tokenizer_class", "fast_tokenizer_files", "attn_implementation"]),
    st.sampled_from(["num_hidden_layers", "n_layer", "layer_types", "hidden_size", "rope_theta", "rope_parameters"]),
    st.sampled_from(["text_config", "model_type", "architectures", "dtype", "per_layer_config", "id2label", "x"]),
    TEXTS,
)


@st.composite
def changed_json(draw: st.DrawFn, text: bytes, spare: str = "") -> bytes:
    """JSON with entries replaced, added, removed or doubled; what stands under the key `spare` may stay."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(places(content))))
        inside = content
        for key in above:
            inside = inside[key]
        change = draw(st.sampled_from(["replace", "add", "remove", "shift"]))
        if change == "remove":
            del inside[last]
        elif change == "add" and isinstance(inside, dict):
            inside[draw(KEYS)] = draw(VALUES)
        elif change == "shift" and isinstance(inside[last], int):
            inside[last] += draw(st.integers(-2, 2))
        else:
            inside[last] = draw(VALUES)
        if not list(places(content)):
            break
    text = json.dumps(content, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    # Doubles an entry: the text of the object, twice in a row.
    return text[:-1] + b", " + text[1:] if len(text) > 2 and draw(st.integers(0, 9)) == 7 else text


def places(content: object) -> Iterator[tuple]:
    """The path of every entry and element of nested objects and lists."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (key,)
        for rest in places(value):
            yield key, *rest


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few replaced, removed, added or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 2, 8, 50, 10**6])))
        new = st.one_of(st.binary(max_size=9), st.sampled_from(PIECES), st.just(content[start:end] * 2))
        content = content[:start] + draw(new) + content[end:]
    return content


PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"9", b"-", b".", b"e9", b"\\", b"null", b"NaN", b"Infinity"),
    *(b"1e999", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xff", b"\0", b"\x1b[31m", b"[" * 200, b"[" * 2000),
    *(b"9" * 5000, b'"a": ', b'"__metadata__": {"a": "b"}, ', (2**63).to_bytes(8, "little"), b"\xff" * 8),
]


@st.composite
def headers(draw: st.DrawFn) -> Files:
    """A file whose header is made up, close to a sound one."""
    entries, offset = [], 0
    odd = st.integers(0, 12).map(lambda n: n == 7)
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.one_of(st.sampled_from(["a", "b", "c", "w.1"]), TEXTS))
        dtype = draw(st.sampled_from(["F32", "BF16", "BOOL", "I64", "F32", "F8_E4M3", "F4", "C64"]))
        shape = draw(st.lists(st.one_of(st.integers(0, 3), NUMBERS) if draw(odd) else st.integers(0, 3), max_size=9))
        count = 1
        for d in shape:
            count *= int(d) if isinstance(d, int) else 1
        size = count * {"F32": 4, "BF16": 2, "I64": 8, "C64": 8}.get(dtype, 1)
        end = offset + (size if 0 <= size < 10**4 else 0)
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        if draw(odd):
            fields["data_offsets"][draw(st.integers(0, 1))] = draw(NUMBERS)
        if draw(odd):
            fields[draw(KEYS)] = draw(VALUES)
        entries.append((name, list(fields.values()) if draw(odd) else fields))
        offset = end
    if draw(odd):
        entries.append(("__metadata__", draw(st.one_of(st.dictionaries(TEXTS, TEXTS, max_size=2), VALUES))))
    entries = draw(st.permutations(entries))
    pairs = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries)
    header = f"{{{', '.join(pairs)}}}".encode() + b" " * draw(st.integers(0, 3))
    length = draw(st.sampled_from([0, 1, 2**24, 2**63, 2**64 - 1])) if draw(odd) else len(header)
    body = bytes(max(0, offset + (draw(st.integers(-2, 2)) if draw(odd) else 0)))
    return {SINGLE: length.to_bytes(8, "little") + header + body}


@st.composite
def changed_header(draw: st.DrawFn) -> Files:
    """A sound shard with another header."""
    name = draw(st.sampled_from(["one.safetensors", "two.safetensors"]))
    content = whole()[name]
    length = int.from_bytes(content[:8], "little")
    header = draw(changed_json(content[8 : 8 + length]))
    return {name: len(header).to_bytes(8, "little") + header + content[8 + length :]}


@st.composite
def changed(draw: st.DrawFn, how: Callable, *names: str, family: str | None = None) -> Files:
    """One of the named files, changed; without names any file of the checkpoint."""
    name = draw(st.sampled_from(sorted(names or whole(family))))
    return {name: draw(how(whole(family)[name]))}


# Properties that must hold


OPENED: list[str] = []


@cache
def watch() -> None:
    """From now on OPENED gets the name of every file that Python opens, and every folder that it lists."""
    events = {"open", "os.listdir", "os.scandir"}
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event in events else None)


@contextlib.contextmanager
def folder_of(files: Files) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder
    finally:
        shutil.rmtree(folder)


def peak() -> int:
    """Peak memory of this process since the last call, bytes."""
    high_water = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(high_water.split()[1]) * 1024


@contextlib.contextmanager
def within_limits() -> Iterator[None]:
    peak()
    before = peak()
    # A collection would take in the garbage of all examples so far.
    gc.disable()
    started = time.process_time()
    try:
        yield
        seconds = time.process_time() - started
    finally:
        gc.enable()
    assert seconds < SECONDS
    assert peak() - before < BYTES


def read(changes: Files) -> None:
    """`inspect` reads a checkpoint correctly or says in one line why not, and opens nothing else."""
    watch()
    with folder_of(whole() | changes) as folder, within_limits():
        OPENED.clear()
        inspected, refusal = attempt(inspect, folder)
        # Files of modules that are imported meanwhile do not count.
        opened = [path for path in OPENED if not path.startswith((sys.prefix, sys.base_prefix))]
        assert all(Path(path).resolve().is_relative_to(folder) for path in opened), opened
        assert refusal.isprintable()
        assert len(refusal) < 2000
        if inspected is not None:
            check(inspected, folder)


def attempt(what: Callable[[Path], Any], folder: Path) -> tuple[Any, str]:
    """The result and "", or None and the reason of the refusal."""
    try:
        return what(folder), ""
    except InputError as error:
        return None, str(error)


def check(inspected: checkpoint.Checkpoint, folder: Path) -> None:
    """`inspect` agrees with what the library reads, and with what this package reads from the file."""
    own = read_tensors(inspected.tensors)
    assert inspected.config == json.loads((folder / CONFIG).read_bytes())
    for name, info in inspected.tensors.items():
        assert name.isprintable()
        assert info.file.parent == folder
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        assert (tensor.dtype, tuple(tensor.shape), tensor.nbytes) == (info.dtype, info.shape, info.nbytes)
        assert own[name].shape == tensor.shape
        # NaN is not equal to itself, its bytes are.
        assert torch.equal(own[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert inspected.dtype.is_floating_point


def load(changes: Files, family: str) -> None:
    """A checkpoint that `inspect` accepts becomes a model, or is refused in one line."""
    with folder_of(whole(family) | changes) as folder, within_limits():
        model, refusal = attempt(lambda f: StreamedModel(inspect(f), torch.device("cpu")), folder)
        assert len(refusal.splitlines()) == (model is None)
        assert model is None or len(model.blocks) == len(model.names) > 0


def tokenized(changes: Files) -> None:
    """A tokenizer gives tokens, or is refused in one line."""
    with folder_of(whole(TOKENIZER) | changes) as folder, within_limits():
        _, refusal = attempt(
            lambda f: tokenize(load_tokenizer(f), ["What a tokenizer may see.", "", "\0\u202e"]), folder
        )
        assert refusal.isprintable()


# By name: what is drawn, the property that must hold, and how many examples `pytest` draws.
PROPERTIES = {
    "made-up header": (headers(), read, 150),
    "changed header": (changed_header(), read, 100),
    "changed index": (changed(changed_json, INDEX), read, 100),
    "changed config": (changed(changed_json, CONFIG, TOKENIZER_CONFIG), read, 100),
    "changed bytes": (changed(changed_bytes), read, 150),
    "changed tokenizer": (
        changed(changed_json, "tokenizer.json", TOKENIZER_CONFIG, family=TOKENIZER),
        tokenized,
        100,
    ),
} | {
    f"loaded {family}": (changed(changed_json, CONFIG, family=family), partial(load, family=family), 30)
    for family in FAMILIES_LOADED
}


def run(name: str, count: int, at_random: bool) -> None:
    drawn, holds, _ = PROPERTIES[name]
    limits = settings(
        max_examples=count,
        derandomize=not at_random,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(drawn)(lambda changes: holds(changes)))()


@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz(name):
    run(name, PROPERTIES[name][2], at_random=False)


@pytest.mark.parametrize(
    "entry",
    [
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 0},
        {"pad_token_id": 500},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2**64}},
    ],
)
def test_what_was_drawn_once(entry):
    content = json.loads(whole("llama")[CONFIG]) | entry
    load({CONFIG: json.dumps(content).encode()}, "llama")


def test_what_is_not_broken_is_accepted():
    with folder_of(whole()) as folder:
        assert inspect(folder).tensors.keys() == TENSORS.keys()


if __name__ == "__main__":
    for kind in PROPERTIES:
        started = time.perf_counter()
        run(kind, int(sys.argv[1]), at_random=True)
        print(f"{kind}: {sys.argv[1]} in {time.perf_counter() - started:.0f} s", flush=True)
