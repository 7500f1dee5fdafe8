"""The documents are true of the code: links, commands, the table of flags, Python examples."""

import importlib
import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pages
import pytest
import torch

from sparsefw.cli import run_parser
from sparsefw.errors import flag_of
from sparsefw.inputs import Inputs
from sparsefw.solver.config import PruneConfig

REPO = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())
README = REPO / "README.md"
# The changelog names files and flags of older versions, too.
PAGES = [README, REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


@every_page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("https:", "http:")):
            continue
        assert (page.parent / link.partition("#")[0]).exists(), link


def options(command: str, capsys: pytest.CaptureFixture) -> set[str]:
    """The options that a command's --help lists."""
    with pytest.raises(SystemExit):
        importlib.import_module(command).main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


@every_page
def test_commands_have_the_flags_that_a_page_gives_them(page, capsys):
    for line in re.split(r"[`\n]", text_of(page)):
        line = re.sub(r"\bsparsefw (?=(run|plan|verify|evaluate)\b)", "python -m sparsefw.", line.split("#")[0])
        for command, arguments in re.findall(r"python -m (sparsefw[\w.]*)([^|&]*)", line):
            assert importlib.util.find_spec(command), line
            flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", arguments))
            assert not flags or flags <= options(command, capsys), line


def test_the_table_of_flags_is_current():
    """It has every flag, with the default of a run without other flags."""
    tables = re.findall(
        r"^\| flag \| default \| what \|\n\|[ |-]+\|\n((?:\|.*\n)+)", text_of(REPO / "docs/flags.md"), re.M
    )
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for table in tables for row in table.splitlines()]
    rows = {flag.strip("`"): default for flag, default in cells}
    parser = {option for action in run_parser(None)._actions for option in action.option_strings}
    assert rows.keys() == parser - {"-h", "--help"}
    inputs = Inputs(model="another")
    config = PruneConfig().on(torch.device("cpu")).for_calibration(inputs.nsamples, inputs.seqlen)
    for settings, field in [(x, f) for x in (inputs, config) for f in fields(x)]:
        told = re.match(r"`([^`]+)`(?:;|$)", rows[flag_of(field.name)])
        if told:
            default = getattr(settings, field.name)
            (default,) = default if isinstance(default, tuple) else (default,)
            assert told[1] == (f"{default:g}" if isinstance(default, float) else str(default)), field.name


@every_page
def test_what_a_page_has_of_results_files_is_current(page):
    """A figure that is typed over would be written anew."""
    text = text_of(page)
    assert pages.written(re.sub(r"(?s)(<!-- .+? -->.*?)\d(.*?<!-- end -->)", r"\1?\2", text)) == text


# Text in the README's examples, and the text that a test puts in its place.
SUBSTITUTES = {
    '"meta-llama/Llama-3.1-8B"': '"default"',
    'dataset="c4"': 'dataset="default", nsamples=4, seqlen=32, eval_windows=4',
    'evaluate=["wikitext"]': 'evaluate=["default"]',
}


@pytest.mark.slow
@pytest.mark.parametrize("example", code_blocks(README, "python"), ids=lambda example: example.split("\n")[0])
def test_examples_of_the_readme_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Otherwise a model would be loaded from the Hub.
    assert all(written in code_blocks(README, "python")[0] for written in SUBSTITUTES)
    for written, substitute in SUBSTITUTES.items():
        example = example.replace(written, substitute)
    exec(compile(example, "README.md", "exec"), names := {})
    if "result" in names:
        (perplexity,) = names["result"].perplexity.values()
        assert perplexity.keys() == {"dense", "sparsefw", "recovered"}
    else:
        assert torch.equal(names["mask"].sum(1), torch.full((64,), 64))


@pytest.mark.parametrize("example", code_blocks(REPO / "docs/kernels.md", "python"))
def test_a_kernel_runs_on_tensors_of_the_caller(example):
    exec(compile(example, "kernels.md", "exec"), names := {})
    assert torch.allclose(names["G"].double(), names["X"].double().T @ names["X"].double(), atol=1e-3)
