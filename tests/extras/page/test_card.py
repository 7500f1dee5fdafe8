"""The model card of an output: what the Hub reads of it, the command on it, and whose card stays."""

import shlex
from dataclasses import replace

import pytest
from helpers.commands import run
from helpers.pages import parsed, report_of_run
from helpers.verifying import WANDA
from huggingface_hub import ModelCard

from sparsefw import pack, verify
from sparsefw.checkpoint.files import SUMS
from sparsefw.extras.page.card import card_of, write_card
from sparsefw.extras.verification import read_sums

SOURCE = """---
license: other
license_name: own
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
FROM_SOURCE = {"license": "other", "license_name": "own", "license_link": "LICENSE", "language": ["en", "de"]}


def written(output, capsys):
    """The card of an output, which must pass all checks."""
    assert verify.main([str(output)]) == 0, capsys.readouterr().out
    return ModelCard.load(output / "README.md")


def test_a_run_and_its_packed_copy(pruned, tmp_path, capsys):
    source, output = pruned(*WANDA)
    card, tags = written(output, capsys), ["sparsefw", "pruned", "sparse"]
    assert card.data.to_dict() == {"library_name": "transformers", "tags": tags}
    assert "names no license" in card.text
    assert f'AutoModelForCausalLM.from_pretrained("{output.name}")' in card.text
    assert "| **wanda** | 100.00 | 100.00 |" in card.text
    assert str(source.parent) not in card.content
    # Whoever edits a card keeps it, and packs what it says of the license.
    edited = card.content.replace("tags:", "license: mit\ntags:", 1)
    text, folder = source.parent / "text.txt", tmp_path / "out"
    assert run(source, text, folder, *WANDA) == 0
    (folder / "README.md").write_text(edited)
    assert pack.main([str(folder), str(tmp_path / "packed")]) == 0
    assert run(source, text, folder, *WANDA, "--overwrite") == 0
    assert "README.md was edited, and stays" in capsys.readouterr().out
    # SHA256SUMS leaves it out, and `verify` what the Hub adds.
    assert "README.md" not in read_sums(folder / SUMS)
    for name in (".gitattributes", ".cache/huggingface/download/config.json.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert written(folder, capsys).content == edited
    card = written(tmp_path / "packed", capsys)
    assert card.data.to_dict() == {"library_name": "transformers", "license": "mit", "tags": tags}
    assert "import sparsefw.packed  # first" in card.text
    assert "names no license" not in card.text
    # One that nobody has edited is written anew.
    (tmp_path / "packed/README.md").write_bytes((output / "README.md").read_bytes())
    assert pack.main([str(folder), str(tmp_path / "packed"), "--overwrite"]) == 0
    assert written(tmp_path / "packed", capsys).content == card.content


@pytest.mark.parametrize("cached", [False, True])
def test_what_it_has_of_the_source(tmp_path, cached):
    """Its own base and data are not those of the output, and a damaged entry does not matter."""
    source = tmp_path / ("hub/models--org--name/snapshots/abc" if cached else "source")
    source.mkdir(parents=True)
    (source / "README.md").write_text(SOURCE)
    datasets = ("--dataset", "c4=2", "--dataset", "org/texts", "--dataset", str(tmp_path / "own.txt"))
    report = report_of_run(arguments=("--model", str(source), "--sparsity", "2:4", *datasets))
    card = ModelCard(card_of(source, "out", report, source))
    assert card.data.to_dict() == FROM_SOURCE | {
        "base_model": "org/name" if cached else "some/base",
        "datasets": ["allenai/c4", "org/texts"],
        "tags": ["sparsefw", "pruned", "sparse", "2:4"],
    }
    assert card.text.startswith(f"\n# {'name' if cached else 'source'} at sparsity 2:4\n")
    assert str(tmp_path) not in card.content
    assert (
        f"--model {'org/name' if cached else 'source'} --dataset c4=2 --dataset org/texts --dataset own.txt"
        in card.text
    )


@pytest.mark.parametrize(
    "front", ["", "---\na: [\n---\n", "---\n- a\n---\n", "---\n1: 2\n---\n", "---\nlicense: no\n---\n"]
)
def test_a_source_whose_card_says_nothing(tmp_path, front):
    (tmp_path / "README.md").write_text(front + "# The source\n")
    write_card(report_of_run(), tmp_path / "out", tmp_path, print, tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {"tags": ["sparsefw", "pruned", "sparse"]}


@pytest.mark.parametrize(
    "flags", ["", "--model another --dataset c4 --seed 3 --preset fast --ignore 're:.*a|b' --keep-zeros"]
)
def test_the_command_has_what_was_given(tmp_path, flags):
    report = report_of_run(arguments=tuple(shlex.split(flags)))
    command = card_of(tmp_path, "out", report, None).split("```sh\n")[1].split("\n```")[0]
    given = shlex.split(command.removeprefix("python -m sparsefw.run"))
    assert parsed(given)["arguments"] == report.arguments
    assert sorted(given) == sorted(shlex.split(f"--sparsity 0.5 --output out {flags}"))


def test_a_report_that_does_not_tell_what_was_given(tmp_path):
    card = ModelCard(card_of(tmp_path, "out", replace(report_of_run(), given=None), None))
    assert card.data.tags == ["sparsefw", "pruned", "sparse"]
    assert "sparsefw.run" not in card.text
