"""The documents are true of the code: links, files, commands, flags and defaults, Python examples."""

import hashlib
import importlib
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from sparsefw.cli import run_parser
from sparsefw.errors import flag_of
from sparsefw.inputs import Inputs
from sparsefw.solver.config import PruneConfig

REPO = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())
README, FLAGS = REPO / "README.md", REPO / "docs/flags.md"
# The changelog names files and flags of older versions, too.
PAGES = [README, REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Options of `run` that are no field of Inputs or PruneConfig.
OUTPUT_FLAGS = {"--gpu-memory", "--host-memory", "--output", "--overwrite", "--restart", "--packed"}

# The fields of Inputs and PruneConfig by their flag.
FIELDS = {flag_of(f.name): f for f in (*fields(Inputs), *fields(PruneConfig))}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    """`Code` inside the text, without the blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL))


def commands(page: Path) -> list[str]:
    """Every line of a block and every span of code that could be a command."""
    lines = [line.split("#")[0] for block in code_blocks(page, r"\w*") for line in block.splitlines()]
    return [*lines, *code_spans(page)]


def anchors(page: Path) -> set[str]:
    """The names that links give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if link.startswith(("https:", "http:")):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    packages = "|".join(path.name for path in (REPO / "sparsefw").iterdir() if (path / "__init__.py").exists())
    folders = rf"(?:kernels|sparsefw|bench|tests|docs|{packages})"
    named = re.findall(rf"(?<![\w/.]){folders}/[\w/.-]*\.(?:py|sh|md|json|png)\b", text_of(page))
    # NAME stands for any name; files of the package may be named without "sparsefw/".
    missing = [name for name in named if not (REPO / name).exists() and not (REPO / "sparsefw" / name).exists()]
    assert [name for name in missing if "NAME" not in name] == []


def options(command: str, capsys: pytest.CaptureFixture) -> set[str]:
    """The options that a command's --help lists."""
    with pytest.raises(SystemExit):
        importlib.import_module(command).main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


@every_page
def test_flags_of_commands_exist(page, capsys):
    for line in commands(page):
        line = re.sub(r"\bsparsefw (?=(run|plan|verify|evaluate)\b)", "python -m sparsefw.", line)
        for command, arguments in re.findall(r"python -m (sparsefw[\w.]*)([^|&]*)", line):
            assert importlib.util.find_spec(command), line
            flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", arguments))
            assert not flags or flags <= options(command, capsys), line


@every_page
def test_flags_that_are_named_exist(page, capsys):
    # Spans of code that begin with a flag name flags of the product.
    named = {flag for span in code_spans(page) if span.startswith("--") for flag in re.findall(r"--[a-z][\w-]*", span)}
    commands = ("sparsefw.plan", "sparsefw.verify", "sparsefw.evaluate")
    assert named <= set().union(*(options(command, capsys) for command in commands))


def test_the_first_run_has_the_numbers_of_its_picture():
    """`bench/first_run.sh` makes the picture and the results of one run."""
    found = json.loads((REPO / "bench/results/first-run.json").read_text())
    rows = re.findall(r"^(dense|wanda|sparsefw) +([\d. ]+)$", text_of(README), re.MULTILINE)
    numbers = {name: " ".join(cells).split() for name, cells in found["rows"].items()}
    assert {name: text.split() for name, text in rows} == numbers
    assert hashlib.sha256((REPO / "docs/report.png").read_bytes()).hexdigest() == found["picture"]


def flag_rows(page: Path) -> dict[str, str]:
    """The flags in the tables | flag | default | what |, with the cell of their default."""
    tables = re.findall(r"^\| flag \| default \| what \|\n\|[ |-]+\|\n((?:\|.*\n)+)", text_of(page), re.MULTILINE)
    # A bar inside of code is escaped.
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for table in tables for line in table.splitlines()]
    return {flag.strip().strip("`"): default.strip() for flag, default in rows}


def test_the_flag_table_is_complete():
    assert flag_rows(FLAGS).keys() == FIELDS.keys() | OUTPUT_FLAGS
    parser = {option for action in run_parser(None)._actions for option in action.option_strings}
    assert flag_rows(FLAGS).keys() == parser - {"-h", "--help"}


def default_of(flag: str, condition: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The default of a flag in a run.

    Args:
        flag: the flag.
        condition: the words after the value in the document: "with `--refit 0`", "for the built-in model", "on a GPU",
            "with fewer than 9 windows on a rank".
    """
    offline = "with `HF_HUB_OFFLINE=1`"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", condition == offline)
    inputs = Inputs() if condition == "for the built-in model" else Inputs(model="another")
    given = dict(re.findall(r"--(\S+) ([^\s`]+)", condition.replace("any other `--method`", "`--method wanda`")))
    few = re.fullmatch(r"with fewer than (\d+) windows on a rank", condition)
    assert given or few or condition in ("", "for the built-in model", "on a GPU", offline), condition
    options = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    if flag == "--model":
        inputs = Inputs()
    windows = int(few[1]) - 1 if few else inputs.nsamples
    device = torch.device("cuda" if condition == "on a GPU" else "cpu")
    config = PruneConfig(**inputs.options | options).on(device).for_calibration(windows, inputs.seqlen)
    if few:
        enough = PruneConfig(**inputs.options | options).for_calibration(windows + 1, inputs.seqlen)
        assert getattr(enough, FIELDS[flag].name) == default_of(flag, "", monkeypatch)
    return getattr(inputs if hasattr(inputs, FIELDS[flag].name) else config, FIELDS[flag].name)


@pytest.mark.parametrize("flag", FIELDS)
def test_defaults_in_the_flag_table(flag, monkeypatch):
    # A clause of a cell is a value, followed by the condition that it holds under.
    for clause in flag_rows(FLAGS)[flag].split("; "):
        words = {"none": ((), None), "all": ((), None), "off": (False,), "the built-in model": ("default",)}
        if clause in words:
            assert default_of(flag, "", monkeypatch) in words[clause]
            continue
        value, condition = re.fullmatch(r"`([^`]+)`(?: (.+))?", clause).groups()
        default = default_of(flag, condition or "", monkeypatch)
        if isinstance(default, tuple):
            (default,) = default
        assert value == (f"{default:g}" if isinstance(default, float) else str(default)), clause


# Text in the README's examples, and the text that a test puts in its place.
SUBSTITUTES = {
    '"meta-llama/Llama-3.1-8B"': '"default"',
    'dataset="c4"': 'dataset="default", nsamples=4, seqlen=32, eval_windows=4',
    'evaluate=["wikitext"]': 'evaluate=["default"]',
}


@pytest.mark.slow
@pytest.mark.parametrize("example", code_blocks(README, "python"), ids=lambda example: example.split("\n")[0])
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Otherwise a model would be loaded from the Hub.
    assert all(written in code_blocks(README, "python")[0] for written in SUBSTITUTES)
    for written, substitute in SUBSTITUTES.items():
        example = example.replace(written, substitute)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    if "result" in names:
        (perplexity,) = names["result"].perplexity.values()
        assert perplexity.keys() == {"dense", "sparsefw"}
        assert (tmp_path / "llama-2-4/report.json").exists()
    else:
        assert torch.equal(names["mask"].sum(1), torch.full((64,), 64))
        assert names["weight"].count_nonzero() <= names["mask"].sum()
        assert names["errors"].relative_error <= 1


@pytest.mark.parametrize("example", code_blocks(REPO / "docs/kernels.md", "python"))
def test_a_kernel_runs_on_a_users_tensors(example):
    exec(compile(example, "kernels.md", "exec"), names := {})
    assert torch.allclose(names["G"].double(), names["X"].double().T @ names["X"].double(), atol=1e-3)


@pytest.mark.parametrize("example", code_blocks(REPO / "docs/llmcompressor.md", "python"))
def test_recipes_parse(example):
    """They run with llm-compressor only, which the tests do not install."""
    compile(example, "llmcompressor.md", "exec")
