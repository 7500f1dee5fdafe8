"""Outputs of models that were pruned in memory, on batches: whatever they read, and whoever made their class."""

import copy
import os
import re
import shutil

import pytest
import torch
from helpers.families import save_model
from helpers.stacks import STACKS, drawn
from helpers.verifying import change_report, only_failure, refused, verdict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparsefw import InputError, prune
from sparsefw.checkpoint.source import SINGLE
from sparsefw.driver.saved import save
from sparsefw.report import read_report

QUICK = dict(kernel="torch", method="wanda", sparsity="0.5")
# The files have other names for the layers than the model.
Q, STORED = "vit.layers.0.attention.q_proj.weight", "vit.encoder.layer.0.attention.attention.query.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """make(name) -> source and output of a run; each is made once, and must not be changed."""
    made = {}

    def make(name):
        if name not in made:
            folder, (model, batches) = tmp_path_factory.mktemp(name), drawn(name, 2)
            (folder / "source").mkdir()
            save(model, folder / "source")
            prune(model, folder / "out", calibration=batches, **QUICK)
            made[name] = folder / "source", folder / "out"
        return made[name]

    return make


@pytest.fixture
def vit(runs, tmp_path):
    """Source and output of a run on a tower for images; the output may be changed."""
    source, output = runs("vit")
    return source, shutil.copytree(output, tmp_path / "out")


def change(output, name, to):
    tensors = load_file(output / SINGLE)
    tensors[name] = to(tensors[name])
    save_file(tensors, output / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", STACKS)
def test_unchanged_outputs_pass(name, runs, capsys):
    source, output = runs(name)
    status, printed, _ = verdict(capsys, output, summed=False)
    assert status == 0, printed
    assert "\nnot compared with the source: the model was in memory; name a checkpoint of it" in printed
    assert printed.endswith("\nall checks that could be made passed\n")
    own = name in ("diffusion", "halving")
    assert ("not checked: config.json names no class of transformers" in printed) == own
    status, printed, _ = verdict(capsys, output, "--against", str(source), summed=False)
    assert status == 0, printed
    assert printed.endswith("\nall checks passed\n")
    assert re.search(r"^kept .* [1-9]\d* layers +ok$", printed, re.MULTILINE)
    assert re.search(r"^others .* [1-9]\d* tensors +ok$", printed, re.MULTILINE)


def test_dtypes_of_no_language_model(tmp_path, capsys):
    """Such as those of schedules and of rotary tables."""
    model, batches = drawn("diffusion", 2)
    model.register_buffer("betas", torch.linspace(0, 1, 5, dtype=torch.float64))
    model.register_buffer("rotations", torch.polar(torch.ones(4), torch.arange(4.0)))
    save(model.double(), tmp_path)
    prune(model, tmp_path / "out", calibration=[{k: x.double() for k, x in b.items()} for b in batches], **QUICK)
    status, printed, _ = verdict(capsys, tmp_path / "out", "--against", str(tmp_path), summed=False)
    assert status == 0, printed
    assert printed.endswith("\nall checks passed\n")


@pytest.fixture(scope="module", params=["auto", torch.float32], ids=["auto", "fp32"])
def text_run(request, tmp_path_factory):
    """A run on a model in memory that reads text: whether its dtype is the source's, the source and the output."""
    folder = tmp_path_factory.mktemp("text")
    source = save_model(folder / "source", "llama", torch.bfloat16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=request.param)
    prune(model, folder / "out", dataset=torch.ones(2, 16, dtype=torch.int64), **QUICK)
    return request.param == "auto", source, folder / "out"


class TestText:
    """What a model in memory was loaded from need not be what was pruned."""

    def test_without_a_source(self, text_run, capsys):
        _, source, output = text_run
        assert read_report(output / "report.json").argument("model", str) == str(source)
        status, printed, _ = verdict(capsys, output, summed=False)
        assert status == 0, printed
        assert "\nnot compared with the source: the model was in memory; name a checkpoint of it" in printed
        assert printed.count("not checked: no source") == 4

    def test_with_a_source(self, text_run, capsys):
        same_dtype, source, output = text_run
        status, printed, _ = verdict(capsys, output, "--against", str(source), summed=False)
        assert status == 0, printed
        assert re.search(r"^copied .* not checked: the model in memory wrote them$", printed, re.MULTILINE)
        line = "the model in memory was of torch.float32, and the source is of torch.bfloat16"
        assert (f"\nnot compared with the source: {line}\n" in printed) == (not same_dtype)
        assert bool(re.search(r"^kept .* 14 layers +ok$", printed, re.MULTILINE)) == same_dtype

    def test_reports_of_older_versions_say_nothing_of_it(self, text_run, capsys, tmp_path):
        _, _, output = text_run
        older = shutil.copytree(output, tmp_path / "older")
        change_report(older, lambda report: report.pop("in_memory"))
        assert "copied" in verdict(capsys, older)[2]


def test_changed_weights_are_named(vit, capsys):
    source, output = vit
    against = ("--against", str(source))
    before = load_file(output / SINGLE)[STORED]
    column = before[3].nonzero()[0].item()
    change(output, STORED, lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(column)), -before[3, column]))
    assert only_failure(capsys, output, "kept", *against).startswith(f"{Q}: 1 of 1024 values differ, first at [3, ")
    change(output, STORED, lambda tensor: before.clone())
    change(output, "vit.layernorm.weight", lambda tensor: tensor + 1)
    assert only_failure(capsys, output, "others", *against).startswith("vit.layernorm.weight: 32 of 32 values differ")
    assert verdict(capsys, output)[0] == 0
    change(output, STORED, torch.ones_like)
    assert only_failure(capsys, output, "pattern").startswith(f"{Q}: row 0 has 32 non-zero weights, 16 may be kept")
    change(output, STORED, lambda tensor: torch.full_like(tensor, torch.nan))
    assert f"{Q}: holds 1024 NaN" in verdict(capsys, output)[2]["finite"][0]


def test_files_that_do_not_load(vit, capsys):
    _, output = vit
    tensors = load_file(output / SINGLE)
    save_file({name: t for name, t in tensors.items() if name != STORED}, output / SINGLE, metadata={"format": "pt"})
    assert f"{Q}: this tensor is missing" in only_failure(capsys, output, "model")
    (output / SINGLE).unlink()
    assert "model.safetensors" in only_failure(capsys, output, "model")
    os.mkfifo(output / SINGLE)
    assert "model.safetensors: missing, or not a file" in verdict(capsys, output, summed=False)[2]["model"][0]


def test_a_source_that_cannot_be_used(vit, capsys, tmp_path):
    _, output = vit
    refused(capsys, f"{output}: the output itself", output, "--against", output)
    (tmp_path / "empty").mkdir()
    refused(
        capsys,
        f"the source: {tmp_path}/empty: no tensors in safetensors files",
        output,
        "--against",
        tmp_path / "empty",
    )


class Named(nn.Module):
    """A model that transformers does not have. It is written to several files with names of its own, in folders too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))

    def forward(self, x):
        """All blocks, one after the other."""
        for block in self.blocks:
            x = block(x)
        return x

    def save_pretrained(self, folder):
        """Two files of tensors, and a file in a folder."""
        state = sorted(self.state_dict().items())
        save_file(dict(state[:4]), folder / "diffusion-00001-of-00002.safetensors")
        save_file(dict(state[4:]), folder / "model-00001-of-00002.safetensors")
        (folder / "config.json").write_text('{"architectures": ["Named"]}')
        (folder / "more").mkdir()
        (folder / "more" / "notes.txt").write_text("x")


def test_files_of_any_names(tmp_path, capsys):
    torch.manual_seed(0)
    model = Named()
    prune(model, tmp_path / "out", calibration=[torch.randn(2, 5, 8)], **QUICK)
    assert (tmp_path / "out" / "more" / "notes.txt").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out" / "more").stat().st_mode & 0o777 == 0o755
    status, printed, _ = verdict(capsys, tmp_path / "out", summed=False)
    assert status == 0, printed
    assert re.search(r"^finite .* 8 tensors +ok$", printed, re.MULTILINE)
    assert re.search(r"^pattern .* 4 layers +ok$", printed, re.MULTILINE)
    save_file({"blocks.0.0.bias": torch.zeros(12)}, tmp_path / "out" / "x.safetensors")
    assert "tensor blocks.0.0.bias is in diffusion-00001" in only_failure(capsys, tmp_path / "out", "model")


@pytest.mark.parametrize("kind", ["longer", "shorter", "part", "other"])
def test_a_layer_that_is_in_no_file(kind, tmp_path, monkeypatch):
    """Libraries may write shorter or longer names. One that leaves a pruned layer out has not written the model."""

    def save_pretrained(self, folder):
        state = {name.removeprefix("blocks." * (kind == "shorter")): x for name, x in self.state_dict().items()}
        if kind == "part":
            del state["blocks.1.2.weight"]
        save_file({"unet." * (kind == "longer") + name: x for name, x in state.items()}, folder / "x.safetensors")
        if kind == "other":
            (folder / "x.safetensors").rename(folder / "x.bin")

    monkeypatch.setattr(Named, "save_pretrained", save_pretrained)
    torch.manual_seed(0)
    model, batches = Named(), [torch.randn(2, 5, 8)]
    if kind != "part":
        assert prune(model, tmp_path / "out", calibration=batches, **QUICK).layers
        return
    with pytest.raises(InputError, match=r"blocks\.1\.2\.weight: in no file that Named\.save_pretrained has written"):
        prune(model, tmp_path / "out", calibration=batches, **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_can_be_written_later(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, batches = Named(), [torch.randn(2, 5, 8)]
    again, expected = copy.deepcopy(model), copy.deepcopy(model)
    prune(expected, tmp_path / "expected", calibration=batches, **QUICK)

    def fail(self, folder):
        save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Named, "save_pretrained", fail)
        with pytest.raises(ValueError, match=r"out: writing failed: .*No space left") as caught:
            prune(model, tmp_path / "out", calibration=batches, **QUICK)
    assert caught.value.__notes__ == ["2 of 2 shards are finished: the same command goes on from there"]
    assert sorted(path.name for path in (tmp_path / ".out.partial").iterdir() if path.is_dir()) == ["new", "records"]
    said = []
    prune(again, tmp_path / "out", calibration=batches, log=said.append, **QUICK)
    assert "going on with an unfinished run: 2 of 2 parts are there" in said
    for name in ("diffusion-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
