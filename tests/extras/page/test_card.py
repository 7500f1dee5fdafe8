"""The model card of an output: what the Hub reads of it, the command on it, and whose card stays."""

import shlex
import shutil
from dataclasses import replace

import pytest
from helpers.commands import run
from helpers.pages import parsed, report_of_run
from helpers.verifying import WANDA
from huggingface_hub import ModelCard

from sparsefw import pack, verify
from sparsefw.extras.page.card import card_of, write_card

SOURCE = """---
license: other
license_link: LICENSE
language:
- en
- de
tags:
- onnx
base_model: some/base
datasets: [some/texts]
model-index: 7
---
# The source
"""


def written(output, capsys):
    """The card of an output, which must pass all checks."""
    assert verify.main([str(output)]) == 0, capsys.readouterr().out
    return ModelCard.load(output / "README.md")


def test_a_run_and_its_packed_copy(pruned, tmp_path, capsys):
    source, output = pruned(*WANDA)
    card, tags = written(output, capsys), ["sparsefw", "pruned", "sparse"]
    assert card.data.to_dict() == {"library_name": "transformers", "tags": tags}
    assert "| **wanda** | 100.00 | 100.00 |" in card.text
    assert str(source.parent) not in card.content
    # Whoever edits a card keeps it, and packs what it says of the license.
    edited = card.content.replace("tags:", "license: mit\ntags:", 1)
    folder, packed = tmp_path / "out", tmp_path / "packed"
    shutil.copytree(output, folder)
    (folder / "README.md").write_text(edited)
    assert pack.main([str(folder), str(packed)]) == 0
    assert run(source, source.parent / "text.txt", folder, *WANDA, "--overwrite") == 0
    assert "README.md was edited, and stays" in capsys.readouterr().out
    # SHA256SUMS leaves it out, and `verify` what git and the Hub add.
    for name in ("evaluation.json", ".git/HEAD", ".gitattributes", ".cache/huggingface/download/config.json.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert written(folder, capsys).content == edited
    card = written(packed, capsys)
    assert card.data.to_dict() == {"library_name": "transformers", "license": "mit", "tags": tags}
    assert "import sparsefw.packed  # first" in card.text
    assert "--output pruned\npython -m sparsefw.pack pruned packed\n" in card.text
    # One that nobody has edited is written anew.
    (packed / "README.md").write_bytes((output / "README.md").read_bytes())
    assert pack.main([str(folder), str(packed), "--overwrite"]) == 0
    assert written(packed, capsys).content == card.content


@pytest.mark.parametrize("cached", [False, True])
def test_what_it_has_of_the_source(pruned, tmp_path, cached):
    """Its own base and data are not those of the output, and a damaged entry does not matter."""
    source = tmp_path / ("hub/models--org--name/snapshots/abc" if cached else "source")
    source.mkdir(parents=True)
    (source / "README.md").write_text(SOURCE)
    own = ("--dataset", str(tmp_path / "own.txt"), "--dataset", f"self={tmp_path / 'asked.jsonl'}=2")
    datasets = ("--dataset", "c4=2", "--dataset", "org/texts", *own)
    report = report_of_run(pruned, "--model", str(source), "--sparsity", "2:4", *datasets)
    card = ModelCard(card_of(source, "out", report, source))
    assert card.data.to_dict() == {
        "license": "other",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "base_model": "org/name" if cached else "some/base",
        "datasets": ["allenai/c4", "org/texts"],
        "tags": ["sparsefw", "pruned", "sparse", "2:4"],
    }
    assert str(tmp_path) not in card.content
    name = "org/name" if cached else "source"
    assert (
        f"--model {name} --dataset c4=2 --dataset org/texts --dataset own.txt --dataset self=asked.jsonl=2" in card.text
    )


@pytest.mark.parametrize(
    "front", ["", "---\na: [\n---\n", "---\n- a\n---\n", "---\n1: 2\n---\n", "---\nlicense: no\n---\n"]
)
def test_a_source_whose_card_says_nothing(pruned, tmp_path, front):
    (tmp_path / "README.md").write_text(front + "# The source\n")
    write_card(report_of_run(pruned), tmp_path / "out", tmp_path, print, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {"tags": ["sparsefw", "pruned", "sparse"]}


@pytest.mark.parametrize(
    "flags", ["", "--model another --dataset c4 --seed 3 --preset fast --ignore 're:.*a|b' --keep-zeros"]
)
def test_the_command_has_what_was_given(pruned, tmp_path, flags):
    report = report_of_run(pruned, *shlex.split(flags))
    command = card_of(tmp_path, "out", report, None).split("```sh\n")[1].split("\n```")[0]
    given = shlex.split(command.removeprefix("python -m sparsefw.run"))
    assert parsed(given)["arguments"] == report.arguments
    assert sorted(given) == sorted(shlex.split(f"--sparsity 0.5 --output out {flags}"))


def test_a_report_that_does_not_tell_what_was_given(pruned, tmp_path):
    card = card_of(tmp_path, "my out", replace(report_of_run(pruned), given=None), None)
    assert "sparsefw.run" not in card
    assert "sparsefw.verify 'my out'" in card
