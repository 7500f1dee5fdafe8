"""Write README.md of an output, the model card that the Hub shows, from the template card.md.

The last line is a comment with the digest of the text before it. If the digest does not match, a user has edited the
card, and it is kept.
"""

import hashlib
import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from sparsefw.checkpoint.files import CARD, CONFIG, MAX_JSON_BYTES, durably
from sparsefw.checkpoint.quantization import KEY
from sparsefw.checkpoint.source import check_file, read_json
from sparsefw.data.text import FILES, NAMED, SELF
from sparsefw.errors import Say
from sparsefw.extras.page.command import commands_of, from_python
from sparsefw.inputs import DEFAULT, name_and_share
from sparsefw.model.skeleton import has_class
from sparsefw.report import log
from sparsefw.report.content import Report, amount
from sparsefw.solver.patterns import parse

TEMPLATE = Path(__file__).with_name("card.md")

# The digest follows this mark.
MARK = b"<!-- written by sparsefw, sha256 "

# Entries of the front matter that are copied from the source's card.
KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")

# Path of a model's folder in the Hub's cache.
SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+/?")

# The parts of a report that may have paths of this machine.
NAMING = ("arguments", "given", "data", "evaluation", "recovery", "recoveries")


def write_card(report: Report, output: Path, source: Path | None, say: Say, folder: Path) -> None:
    """Write the model card; see `write_pages` for the arguments."""
    old = output / CARD
    if old.is_file() and not _as_written(old.read_bytes()):
        durably(folder / CARD, partial(shutil.copyfile, old))
        say(f"note: {old} was edited, and stays: it may describe the older checkpoint")
        return
    text = card_of(folder, output.name, report, source).rstrip() + "\n\n"
    durably(folder / CARD, f"{text}{MARK.decode()}{hashlib.sha256(text.encode()).hexdigest()} -->\n")


def _as_written(content: bytes) -> bool:
    before, _, digest = content.rpartition(MARK)
    return digest == f"{hashlib.sha256(before).hexdigest()} -->\n".encode()


def card_of(folder: Path, name: str, report: Report, source: Path | None) -> str:
    """Make the card of the model in a folder, which will be renamed to `name`."""
    known = {key: value for path in (source, folder) if path for key, value in _front_matter(path / CARD).items()}
    report = _published(report)
    model, pattern = report.argument("model", str), report.argument("sparsity", str)
    if origin := _hub_id(source):
        known["base_model"] = origin
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kind = config["architectures"][0] if has_class(config.get("architectures")) else ""
    data = ModelCardData(
        **{"library_name": "transformers" if kind else None} | known,
        datasets=_datasets(report) or None,
        tags=["sparsefw", "pruned", "sparse", *([pattern] if parse(pattern).scope == "group" else [])],
    )
    packed = KEY in config
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        report=report,
        log=log,
        amount=amount,
        name=name,
        quoted=shlex.quote(name),
        kind=kind,
        packed=packed,
        files={path.name for path in folder.iterdir()},
        origin=origin or ("The built-in model of sparsefw" if model == DEFAULT else model),
        commands=commands_of(report, name, packed),
        language="python" if from_python(report) else "sh",
    )
    return str(card)


def _front_matter(card: Path) -> dict[str, Any]:
    """Read the KEPT entries of a card; empty if the card is missing or cannot be read."""
    # The content is not trusted, and the library that reads it may raise any exception.
    with suppress(Exception):
        check_file(card)
        if card.stat().st_size < MAX_JSON_BYTES and (found := metadata_load(card)):
            return {key: found[key] for key in KEPT if isinstance(found.get(key), str | list)}
    return {}


def _hub_id(folder: Path | None) -> str:
    """Return the Hub id of a folder in the Hub's cache; empty for any other folder."""
    found = SNAPSHOT.fullmatch(str(folder))
    return found[1].replace("--", "/") if found else ""


def _published(report: Report) -> Report:
    """Remove paths of this machine from a report: of a path only the last part stays."""
    names = {report.argument("model", str), *(one.model for one in report.all_recoveries)}
    names |= {name_and_share(text)[0] for text in (*report.argument("evaluate", tuple), *_texts(report))}
    paths = {name: Path(os.path.abspath(os.path.expanduser(name))) for name in names}
    local = [name for name, path in paths.items() if path.exists() or name.startswith(("/", ".", "~"))]

    def public(value: Any) -> Any:
        if isinstance(value, str):
            for name in local:
                short = _hub_id(paths[name]) or paths[name].name
                # The share of a text, or its number of windows, may follow its name.
                value = re.sub(rf"(?<![^\s=]){re.escape(name)}(?=[\s=]|$)", short.replace("\\", "/"), value)
        elif isinstance(value, list | tuple):
            return type(value)(map(public, value))
        elif isinstance(value, dict):
            return {key: public(x) for key, x in value.items()}
        elif is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: public(getattr(value, f.name)) for f in fields(value)})
        return value

    return replace(report, **{part: public(getattr(report, part)) for part in NAMING})


def _texts(report: Report) -> list[str]:
    """Return the texts of the run's calibration and of all recoveries, with their shares; of SELF the prompts."""
    texts = [*report.argument("dataset", tuple), *(text for one in report.recoveries for text in one.dataset)]
    return [text.removeprefix(f"{SELF}=") for text in texts]


def _datasets(report: Report) -> list[str]:
    """Return the Hub ids of the calibration texts that are datasets of the Hub."""
    texts = dict.fromkeys(name_and_share(text)[0] for text in _texts(report))
    ids = [NAMED[text, "train"][0] if (text, "train") in NAMED else text for text in texts]
    return [text for text in ids if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.endswith(FILES)]
