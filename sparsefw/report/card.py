"""README.md of an output: its model card, which the Hub shows. card.md lays it out.

The last line is a comment with the digest of all before it. A card of another digest was edited, and is the user's.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from sparsefw.caller import to_logger
from sparsefw.checkpoint.files import CARD, CONFIG, MAX_JSON_BYTES, durably
from sparsefw.checkpoint.quantization import KEY
from sparsefw.checkpoint.source import check_file, read_json
from sparsefw.data.batches import BATCHES
from sparsefw.data.text import NAMED, TEXTS, TOKENS
from sparsefw.errors import InputError
from sparsefw.inputs import DEFAULT, Inputs, name_and_share
from sparsefw.memory import this_device
from sparsefw.model.skeleton import has_class
from sparsefw.report import log
from sparsefw.report.content import Argument, Report, amount
from sparsefw.report.html import command_of, used_arguments
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.patterns import parse

TEMPLATE = Path(__file__).with_name("card.md")

# Behind it comes the digest.
MARK = b"<!-- written by sparsefw, sha256 "

# Entries of the front matter that come from the card of the source.
KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")

# A folder in the Hub's cache.
SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+/?")

# Data without a name, as variables in a call from Python.
VARIABLES = {TEXTS: "texts", TOKENS: "tokens", BATCHES: "batches"}


def write_card(
    output: Path, report: Report, source: Path | None, folder: Path, say: Callable[[str], None] = to_logger
) -> None:
    """Write the model card into a folder that has all other files of a model.

    Args:
        output: where the folder will be. A card there that was edited is kept in place of a new one.
        report: of the run that has pruned the model.
        source: folder of the model that was pruned or packed; None: there is none.
        folder: the folder.
        say: called with a line if an edited card is kept.
    """
    old = output / CARD
    if old.is_file() and not _as_written(old.read_bytes()):
        durably(folder / CARD, partial(shutil.copyfile, old))
        say(f"note: {old} was edited, and stays: what it tells may be of the older checkpoint")
        return
    text = card_of(folder, output.name, report, source).rstrip() + "\n\n"
    durably(folder / CARD, f"{text}{MARK.decode()}{hashlib.sha256(text.encode()).hexdigest()} -->\n")


def _as_written(content: bytes) -> bool:
    before, _, digest = content.rpartition(MARK)
    return digest == f"{hashlib.sha256(before).hexdigest()} -->\n".encode()


def card_of(folder: Path, name: str, report: Report, source: Path | None) -> str:
    """The card of the model in a folder that will have this name."""
    known = {key: value for path in (source, folder) if path for key, value in _front_matter(path / CARD).items()}
    report = _published(report)
    model = report.argument("model", str)
    if origin := _hub_id(source):
        known["base_model"] = origin
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    of_transformers = config["architectures"][0] if has_class(config.get("architectures")) else ""
    pattern = report.argument("sparsity", str)
    data = ModelCardData(
        **{"library_name": "transformers" if of_transformers else None} | known,
        datasets=_datasets(report) or None,
        tags=["sparsefw", "pruned", "sparse", *([pattern] if parse(pattern).scope == "group" else [])],
    )
    of_python = report.in_memory or not VARIABLES.keys().isdisjoint(report.argument("dataset", tuple))
    files = {path.name for path in folder.iterdir()}
    facts: dict[str, Any] = dict(report=report, log=log, amount=amount, name=name, files=files)
    facts |= dict(kind=of_transformers, packed=KEY in config, python=of_python)
    facts["origin"] = origin or ("The built-in model of sparsefw" if model == DEFAULT else model)
    count = len(report.recoveries)
    folders = [*["pruned", *(f"recovered-{n}" for n in range(1, count))][:count], name]
    command = " ".join(command_of(_given(report) | {"output": folders[0]}))
    facts["made_by"] = _call(report, folders[0]) if of_python else command
    for before, after, one in zip(folders, folders[1:], report.recoveries, strict=False):
        given: dict[str, Argument] = {} if one.model == model else {"model": one.model}
        given |= {"dataset": one.dataset, "nsamples": one.data.windows}
        given |= {"seqlen": one.data.seqlen, "seed": one.data.seed}
        words = ["python -m sparsefw.recover", before, shlex.quote(after), *command_of(given)[1:]]
        facts["made_by"] += ("\n# " if of_python else "\n") + " ".join(words)
    return str(ModelCard.from_template(data, str(TEMPLATE), **facts))


def _front_matter(card: Path) -> dict[str, Any]:
    """The entries of a card that are KEPT; nothing if it is missing or cannot be read."""
    # Nobody has checked what stands there, and the library that reads it raises anything.
    with suppress(Exception):
        check_file(card)
        if card.stat().st_size < MAX_JSON_BYTES and (found := metadata_load(card)):
            return {key: found[key] for key in KEPT if isinstance(found.get(key), str | list)}
    return {}


def _hub_id(folder: Path | None) -> str:
    """The Hub id of a folder in the Hub's cache; empty: it is not there."""
    found = SNAPSHOT.fullmatch(str(folder))
    return found[1].replace("--", "/") if found else ""


def _published(report: Report) -> Report:
    """The report without paths of the machine: files and folders there have their last name alone."""
    named = [name_and_share(text)[0] for field in ("dataset", "evaluate") for text in report.argument(field, tuple)]
    named += [name for x in report.recoveries for name in (x.model, *(name_and_share(text)[0] for text in x.dataset))]
    paths = {name: Path(os.path.abspath(os.path.expanduser(name))) for name in [report.argument("model", str), *named]}
    local = [name for name, path in paths.items() if path.exists() or name.startswith(("/", ".", "~"))]

    def public(text: str) -> str:
        for name in local:
            short = _hub_id(paths[name]) or paths[name].name
            # A text may have a share or a number of windows behind it.
            text = re.sub(rf"(?<!\S){re.escape(name)}(?=[\s=]|$)", short.replace("\\", "/"), text)
        return text

    arguments = report.arguments | {"model": public(report.argument("model", str))}
    arguments |= {field: tuple(map(public, report.argument(field, tuple))) for field in ("dataset", "evaluate")}
    evaluation = [replace(text, source=public(text.source)) for text in report.evaluation]
    data = replace(report.data, source=public(report.data.source))
    recoveries = [
        replace(
            x,
            model=public(x.model),
            dataset=tuple(map(public, x.dataset)),
            data=replace(x.data, source=public(x.data.source)),
        )
        for x in report.recoveries
    ]
    return replace(report, arguments=arguments, data=data, evaluation=evaluation, recoveries=recoveries)


def _datasets(report: Report) -> list[str]:
    """Hub ids of the calibration texts that are datasets of the Hub."""
    given = [*report.argument("dataset", tuple), *(text for recovery in report.recoveries for text in recovery.dataset)]
    texts = dict.fromkeys(name_and_share(text)[0] for text in given)
    ids = [NAMED[text, "train"][0] if (text, "train") in NAMED else text for text in texts]
    return [text for text in ids if re.fullmatch(r"[\w.-]+/[\w.-]+", text)]


def _given(report: Report) -> dict[str, Argument]:
    """The arguments of a run but those that would have their value anyway."""
    known = used_arguments(report)
    inputs = Inputs(model=report.argument("model", str))
    defaults = asdict(inputs) | {"model": DEFAULT}
    if not inputs.built_in:
        # It depends on whether there is a network, which readers may have.
        defaults["dataset"] = None
    given = {name: known[name] for name, default in defaults.items() if known[name] != default}
    options = {f.name: known[f.name] for f in fields(PruneConfig) if f.name in known}

    def config(options: dict[str, Any]) -> PruneConfig:
        config = PruneConfig(**({} if report.in_memory else inputs.options) | options)
        return config.on(this_device()).for_calibration(
            report.data.windows, report.data.seqlen, max(1, len(report.ranks))
        )

    # Later fields have defaults that depend on earlier ones.
    whole = config(options)
    for name in reversed([*options]):
        fewer = {key: value for key, value in options.items() if key != name}
        with suppress(InputError):
            if config(fewer) == whole:
                options = fewer
    return given | options


def _call(report: Report, name: str) -> str:
    """The call of `prune` of a run whose model or data had no name."""
    given = _given(report)
    words = ["model" if report.in_memory else json.dumps(report.argument("model", str)), json.dumps(name)]
    if report.argument("dataset", tuple) == (BATCHES,):
        given = {key: x for key, x in given.items() if key not in ("nsamples", "seqlen", "dataset")}
        words.append("calibration=batches")
    for key, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        texts = [VARIABLES.get(x) or json.dumps(x) if isinstance(x, str) else repr(x) for x in values]
        if key == "dataset" and isinstance(value, tuple) and len(value) > 1:
            words.append(f"dataset={json.dumps(dict(map(name_and_share, value)))}")
        elif key != "model":
            words.append(f"{key}={texts[0]}" if len(texts) == 1 else f"{key}=[{', '.join(texts)}]")
    return f"from sparsefw import prune\n\nprune({', '.join(words)})"
