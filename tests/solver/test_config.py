"""PruneConfig: its defaults, what it refuses and in which words, and that its fields and tables agree."""

import dataclasses
import os
import sys

import pytest
import torch
from helpers.checkpoints import refused

from sparsefw.fields import DEPENDS
from sparsefw.kernels import triton_ops
from sparsefw.solver import config
from sparsefw.solver.config import PruneConfig

FIELDS = {f.name: f for f in dataclasses.fields(PruneConfig)}
# For each field a value that is none of its defaults.
OTHER = dict(
    warm_start="ria", steps=7, step_rule="open-loop", alpha=0.3, penalty=0.4, swaps=5, refit=3, rounds=1,
    target="layer", damp=0.7, preset="fast",
)  # fmt: skip


PAPER = dict(step_rule="open-loop", alpha=0.9, steps=2000, penalty=0, refit=0, swaps=0, rounds=0, reconstruct=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, dict(steps=12, refit=2, rounds=3, target="dense", damp=0.1, reconstruct=2)),
        (dict(reconstruct=0), dict(steps=24, refit=4)),
        (dict(refit=0), dict(steps=40, penalty=1, swaps=100, rounds=0, target="layer", damp=0.1, reconstruct=0)),
        # The run reconstructs Wanda's blocks.
        (dict(method="wanda", reconstruct=3, compare=("sparsefw",)), dict(steps=24, refit=4, reconstruct=3)),
        (dict(method="wanda", compare=("sparsefw",)), dict(reconstruct=0)),
        (dict(method="frank-wolfe"), dict(steps=40, swaps=100, refit=0, reconstruct=0, recover=0)),
        (dict(method="refitted"), dict(steps=24, refit=4, reconstruct=0, recover=0)),
        (dict(preset="fast"), dict(steps=3, penalty=1, refit=4, rounds=0, target="layer", damp=0.1, reconstruct=0)),
        (dict(preset="paper"), PAPER | dict(target="layer", damp=0)),
        (dict(preset="paper", refit=2), PAPER | dict(refit=2, target="dense", damp=0.1)),
    ],
    ids=str,
)
def test_defaults(options, expected):
    assert expected.items() <= dataclasses.asdict(PruneConfig(**options)).items()


@pytest.mark.parametrize(("device", "expected"), [("cuda", ("triton", "bf16")), ("cpu", ("torch", "ieee"))])
def test_kernel_and_precision_go_with_the_device(device, expected):
    found = PruneConfig().on(torch.device(device))
    assert (found.kernel, found.precision, found.given) == (*expected, {})
    assert found == found.on(torch.device("cpu")) == PruneConfig(steps=3).on(torch.device(device)).replace(steps=12)
    named = PruneConfig(kernel="torch", precision="tf32")
    assert named.on(torch.device(device)) == named


@pytest.mark.parametrize("refit", [0, 4])
@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_field_that_depends_has_a_default(preset, refit):
    found = PruneConfig(preset=preset, refit=refit).on(torch.device("cpu"))
    # Memory decides on the default recovery, when the shape of the model is known.
    assert all(getattr(found, name) is not DEPENDS for name in set(FIELDS) - {"recover"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(method="newton"), "method='newton'"),
        (dict(compare=("wanda", "newton")), "compare='newton'"),
        (dict(steps=-1), "steps=-1"),
        (dict(damp=float("inf")), "damp=inf"),
        (dict(sparsity="4:2"), "sparsity='4:2'"),
        (dict(include=("down_proj", "")), "include"),
        (dict(refit=0, rounds=2), "rounds"),
        (dict(method="frank-wolfe", refit=1), "refit"),
        (dict(preset="paper", sparsity="layer:0.6", swaps=1), "swaps"),
    ],
    ids=str,
)
def test_values_and_combinations_that_are_refused(options, named):
    with refused(f"^{named}: "):
        PruneConfig(**options)


def test_options_of_frank_wolfe_go_with_it_alone():
    """Options that are not listed go with any method."""
    assert set(config.OF_FRANK_WOLFE) == set(OTHER)
    for name, value in OTHER.items():
        with refused(f"^{name}: not used by method='wanda', only by sparsefw"):
            PruneConfig(method="wanda", **{name: value})
        # A compared method may use it.
        assert getattr(PruneConfig(method="wanda", compare="sparsefw", **{name: value}), name) == value
    with refused("^target: not used by method='refitted', only by sparsefw"):
        PruneConfig(method="refitted", target="dense")


class TestValues:
    def test_several_take_lists_and_strings(self):
        found = PruneConfig(compare="wanda", include=["mlp", "re:.*attn"], ignore=iter(["down_proj"]))
        assert (found.compare, found.include, found.ignore) == (("wanda",), ("mlp", "re:.*attn"), ("down_proj",))

    def test_methods_once_and_the_written_one_last(self):
        found = PruneConfig(method="ria", compare=["wanda", "ria", "sparsefw", "wanda"])
        assert found.compare == ("wanda", "sparsefw")
        assert found.methods == ("wanda", "sparsefw", "ria")

    def test_equal_where_their_values_are(self):
        assert PruneConfig() == PruneConfig(refit=2, steps=12, include=[])
        assert hash(PruneConfig()) == hash(PruneConfig(refit=2))
        assert PruneConfig() != PruneConfig(refit=3)

    def test_replace_finds_dependent_defaults_anew_and_checks(self):
        first = PruneConfig(sparsity="2:4", alpha=0.5)
        masks = first.replace(refit=0)
        assert masks == PruneConfig(sparsity="2:4", alpha=0.5, refit=0)
        assert masks.replace(refit=2) == first
        with refused("rounds: "):
            PruneConfig(rounds=2).replace(refit=0)


def test_triton_is_told_to_interpret_in_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with refused(r"Triton was imported before.*set TRITON_INTERPRET=1"):
        _ = PruneConfig(kernel="triton", precision="ieee").backend
    monkeypatch.delitem(sys.modules, "triton")
    assert PruneConfig(kernel="triton", precision="ieee").backend.operations == triton_ops
    assert os.environ["TRITON_INTERPRET"] == "1"


class TestForCalibration:
    """Fewer tokens damp more, and few windows are gone through twice."""

    @pytest.mark.parametrize(
        ("tokens", "damp"),
        [(16, 0.4), (32_768, 0.4), (65_536, 0.2), (100_000, 0.13), (131_072, 0.1), (10**6, 0.1)],
    )
    def test_damping(self, tokens, damp):
        for options in (dict(reconstruct=0), dict(preset="fast"), dict(method="wanda", compare=("frank-wolfe",))):
            config = PruneConfig(**options)
            assert config.for_calibration(2, tokens // 2) == config.replace(damp=damp)
        before_a_reconstruction = PruneConfig()
        found = before_a_reconstruction.for_calibration(2, tokens // 2)
        assert found == before_a_reconstruction.replace(damp=1.6)

    @pytest.mark.parametrize("options", [dict(damp=0.3), dict(damp=0), dict(preset="paper"), dict(method="wanda")])
    def test_nothing_else_changes(self, options):
        config = PruneConfig(**options)
        assert config.for_calibration(2, 8) == config

    def test_passes_go_by_the_windows_of_one_rank(self):
        config = PruneConfig()
        assert [config.for_calibration(n, 16, 4).reconstruct for n in (7, 8, 508, 509)] == [0, 2, 2, 1]
        assert PruneConfig(reconstruct=2).for_calibration(128, 16).reconstruct == 2

    def test_too_few_windows_to_reconstruct(self):
        """All is as in a run that is to reconstruct nothing."""
        found = PruneConfig().for_calibration(3, 16, 2)
        assert (found.reconstruct, found.steps, found.refit, found.damp) == (0, 24, 4, 0.4)
        with refused(r"^reconstruct=2: needs 2 calibration"):
            PruneConfig(reconstruct=2).for_calibration(3, 16, 2)
