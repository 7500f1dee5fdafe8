"""PruneConfig: its defaults, what it refuses and in which words, and that its fields and tables agree."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from sparsefw.errors import InputError
from sparsefw.flags import DEPENDS
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import KERNELS, TORCH, Backend
from sparsefw.kernels.definitions import PRECISIONS
from sparsefw.solver import PruneConfig, config
from sparsefw.solver.methods import METHODS, SALIENCIES

FIELDS = {f.name: f for f in dataclasses.fields(PruneConfig)}
FRANK_WOLFE = [name for name, f in FIELDS.items() if f.metadata.get("frank_wolfe")]
# For each field a value that is none of its defaults.
OTHER = dict(
    warm_start="ria", steps=7, step_rule="open-loop", alpha=0.3, penalty=0.4, swaps=5, refit=3, rounds=1,
    target="layer", damp=0.7,
)  # fmt: skip


class TestDefaults:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, dict(steps=12, penalty=0.7, alpha=0, swaps=0, refit=2, rounds=3, target="dense", damp=0.1)),
            (dict(refit=3), dict(steps=12, alpha=0, swaps=0, refit=3, rounds=3, target="dense", damp=0.1)),
            (dict(refit=0), dict(steps=40, penalty=1, alpha=0, swaps=100, refit=0, rounds=0, target="layer", damp=0.2)),
            (dict(refit=0, alpha=0.25, swaps=0, damp=0), dict(alpha=0.25, swaps=0, damp=0)),
            (dict(alpha=0.5, target="layer"), dict(alpha=0.5, target="layer")),
            (dict(preset="fast"), dict(steps=3, penalty=1, alpha=0, swaps=0, refit=4, rounds=0, target="layer")),
            (dict(preset="fast", refit=0), dict(steps=10, swaps=0, refit=0, rounds=0, target="layer", damp=0.2)),
            (dict(preset="paper"), dict(alpha=0.9, swaps=0, refit=0, rounds=0, target="layer", damp=0)),
            (dict(preset="paper", refit=2), dict(alpha=0.9, swaps=0, rounds=0, target="dense", damp=0.1)),
        ],
    )
    def test_go_with_the_refit(self, options, expected):
        assert expected.items() <= dataclasses.asdict(PruneConfig(**options)).items()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (dict(reconstruct=0), (24, 4)),
            (dict(reconstruct=0, refit=2), (24, 2)),
            (dict(reconstruct=3), (12, 2)),
            (dict(reconstruct=1, steps=5), (5, 2)),
            (dict(target="layer"), (12, 2)),
            (dict(compare=("wanda",)), (12, 2)),
            # The run reconstructs Wanda's blocks.
            (dict(method="wanda", reconstruct=2, compare=("sparsefw",)), (24, 4)),
            (dict(refit=0, reconstruct=2), (40, 0)),
            (dict(preset="fast", reconstruct=2), (3, 4)),
            (dict(preset="paper", reconstruct=2), (2000, 0)),
        ],
    )
    def test_go_with_the_reconstruction(self, options, expected):
        found = PruneConfig(**options)
        assert (found.steps, found.refit) == expected

    @pytest.mark.parametrize(
        ("options", "passes"),
        [
            ({}, 2),
            (dict(target="layer"), 2),
            (dict(compare=("wanda",)), 2),
            (dict(reconstruct=0), 0),
            (dict(refit=0), 0),
            (dict(preset="fast"), 0),
            (dict(preset="paper", refit=2), 0),
            (dict(method="sparsegpt"), 0),
            (dict(method="wanda", compare=("sparsefw",)), 0),
            (dict(method="wanda", reconstruct=3), 3),
        ],
    )
    def test_which_runs_reconstruct(self, options, passes):
        assert PruneConfig(**options).reconstruct == passes

    def test_do_not_depend_on_more(self):
        found = PruneConfig()
        assert (found.sparsity, found.method, found.compare, found.preset) == ("0.6", "sparsefw", (), "sparsefw")
        assert (found.include, found.ignore, found.keep_zeros, found.warm_start) == ((), (), False, "wanda")
        assert found.step_rule == "line-search"
        assert (PruneConfig.paper().step_rule, PruneConfig.paper().penalty) == ("open-loop", 0)
        assert PruneConfig.paper().steps == PruneConfig.paper(refit=2).steps == 2000

    @pytest.mark.parametrize(("cuda", "expected"), [(True, ("triton", "bf16")), (False, ("torch", "ieee"))])
    def test_go_with_the_machine(self, cuda, expected, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        found = PruneConfig()
        assert (found.kernel, found.precision) == expected
        assert PruneConfig(kernel="torch").precision == expected[1]

    @pytest.mark.parametrize("refit", [0, 4])
    @pytest.mark.parametrize("preset", config.PRESETS)
    def test_cover_exactly_the_fields_that_depend(self, preset, refit):
        """Every field without a default of its own gets one, once, and each of these is a field."""
        machine = ["kernel", "precision"]
        names = [*config.DEFAULTS[preset, bool(refit)], *machine]
        assert sorted(names) == sorted(name for name, f in FIELDS.items() if f.default is DEPENDS)
        found = PruneConfig(preset=preset, refit=refit)
        assert all(getattr(found, name) is not DEPENDS for name in FIELDS)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(method="newton"), "--method newton: expected one of sparsefw, sparsegpt, magnitude, wanda, ria"),
            (dict(compare=("wanda", "newton")), "--compare newton: expected one of sparsefw, sparsegpt, magnitude"),
            (dict(steps=-1), "--steps -1: expected at least 0"),
            (dict(steps=True), "--steps True: expected a whole number"),
            (dict(alpha=1.5), "--alpha 1.5: expected at least 0 and at most 1"),
            (dict(alpha=float("nan")), "--alpha nan: expected at least 0 and at most 1"),
            (dict(reconstruct=10**5), "--reconstruct 100000: expected at least 0 and at most 10000"),
            (dict(damp=float("inf")), "--damp inf: expected at least 0 and at most 1048576"),
            (dict(sparsity="4:2"), "--sparsity 4:2: n:m keeps n of every m weights"),
            (dict(include=("down_proj", "")), "--include: empty"),
            (dict(refit=0, rounds=2), "--rounds: masks are chosen again for refitted weights, and --refit 0"),
            *(
                (dict(preset="paper", sparsity="layer:0.6") | {name: 1}, f"--{name}: not available with --preset paper")
                for name in ("penalty", "swaps", "refit")
            ),
        ],
        ids=str,
    )
    def test_values_and_combinations(self, options, message):
        with pytest.raises(InputError) as error:
            PruneConfig(**options)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)

    def test_the_same_is_allowed_of_rows(self):
        for name in ("penalty", "swaps", "refit"):
            assert getattr(PruneConfig.paper(**{name: 1}), name) == 1
            assert getattr(PruneConfig(sparsity="layer:0.6", **{name: 1}), name) == 1
        assert PruneConfig.paper(refit=1, rounds=2).rounds == 2

    @pytest.mark.parametrize("name", FRANK_WOLFE)
    def test_options_that_a_method_does_not_use(self, name):
        method, flag = "wanda", f"--{name.replace('_', '-')}"
        with pytest.raises(InputError, match=f"^{flag}: --method {method} does not use it, only sparsefw does$"):
            PruneConfig(method=method, **{name: OTHER[name]})
        # A compared method may use it.
        assert getattr(PruneConfig(method=method, compare="sparsefw", **{name: OTHER[name]}), name) == OTHER[name]

    def test_every_option_of_frank_wolfe_is_marked(self):
        """Options that are not marked go with any method."""
        assert set(FRANK_WOLFE) == set(OTHER)
        others = dict(sparsity="2:4", compare="ria", preset="paper", include="mlp", ignore="down_proj", keep_zeros=True)
        others |= dict(method="wanda", kernel="torch", precision="tf32", reconstruct=3)
        assert set(others) | set(FRANK_WOLFE) == set(FIELDS)
        assert PruneConfig(**others).given == others | {n: (others[n],) for n in ("compare", "include", "ignore")}


class TestValues:
    def test_several_take_lists_and_strings(self):
        found = PruneConfig(compare="wanda", include=["mlp", "re:.*attn"], ignore=iter(["down_proj"]))
        assert (found.compare, found.include, found.ignore) == (("wanda",), ("mlp", "re:.*attn"), ("down_proj",))

    def test_methods_once_and_the_written_one_last(self):
        found = PruneConfig(method="ria", compare=["wanda", "ria", "sparsefw", "wanda"])
        assert found.compare == ("wanda", "sparsefw")
        assert found.methods == ("wanda", "sparsefw", "ria")

    def test_whole_numbers_where_fractions_are_allowed(self):
        assert PruneConfig(alpha=1, damp=0, penalty=0).alpha == 1

    def test_equal_where_their_values_are(self):
        assert PruneConfig() == PruneConfig(refit=2, steps=12, include=[])
        assert hash(PruneConfig()) == hash(PruneConfig(refit=2))
        assert PruneConfig() != PruneConfig(refit=3)
        assert PruneConfig(compare=["wanda"]) == PruneConfig(compare=("wanda", "wanda"))

    def test_given(self):
        assert PruneConfig().given == {}
        assert PruneConfig(refit=4, sparsity="2:4", compare="ria").given == dict(
            refit=4, sparsity="2:4", compare=("ria",)
        )

    def test_replace_finds_dependent_defaults_anew(self):
        first = PruneConfig(sparsity="2:4", alpha=0.5)
        masks = first.replace(refit=0)
        assert masks == PruneConfig(sparsity="2:4", alpha=0.5, refit=0)
        assert (masks.steps, masks.swaps, masks.target, masks.damp, masks.alpha) == (40, 100, "layer", 0.2, 0.5)
        assert (first.steps, first.refit) == (12, 2)
        assert masks.replace(refit=2) == first
        assert first.replace(preset="paper").alpha == 0.5
        assert first.replace(sparsity="0.3").pattern.sparsity == PruneConfig(sparsity="0.3").pattern.sparsity

    def test_replace_checks(self):
        with pytest.raises(InputError, match="--rounds"):
            PruneConfig(rounds=2).replace(refit=0)
        with pytest.raises(InputError, match="--steps -1"):
            PruneConfig().replace(steps=-1)
        with pytest.raises(TypeError, match="stepps"):
            PruneConfig().replace(stepps=1)

    def test_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PruneConfig().steps = 3

    def test_named_configs(self):
        assert PruneConfig.paper(steps=5) == PruneConfig(preset="paper", steps=5)
        assert PruneConfig.masks_only(steps=5) == PruneConfig(refit=0, steps=5)

    def test_what_follows(self):
        assert PruneConfig(sparsity="layer:0.6").pattern.scope == "layer"
        whole = [PruneConfig(preset=p, sparsity=s).whole_matrix for p in config.PRESETS for s in ("0.6", "layer:0.6")]
        assert whole == [False, False, False, False, False, True]
        assert PruneConfig().fallback_to_warm_start
        assert not PruneConfig.paper().fallback_to_warm_start
        assert PruneConfig().uses_dense_target
        assert PruneConfig(method="wanda", compare="sparsefw").uses_dense_target
        assert not PruneConfig(method="wanda").uses_dense_target
        assert not PruneConfig(target="layer").uses_dense_target

    @pytest.mark.parametrize("passes", [0, 2])
    def test_a_reconstruction_needs_the_dense_model_and_changes_no_target(self, passes):
        """Whatever the method; compared methods are not reconstructed."""
        for options in ({}, dict(refit=0), dict(method="wanda"), dict(method="sparsegpt"), dict(preset="fast")):
            found = PruneConfig(reconstruct=passes, **options)
            assert found.uses_dense_target == PruneConfig(reconstruct=0, **options).uses_dense_target
            assert found.uses_dense_stream == (found.uses_dense_target or passes > 0)
            assert found.replace(reconstruct=0) == PruneConfig(reconstruct=0, **options)

    def test_rows_of_a_method(self):
        rows = {method: PruneConfig().rows_independent(method) for method in METHODS}
        assert rows == {method: method != "sparsegpt" for method in METHODS}
        whole = PruneConfig.paper(sparsity="layer:0.6")
        assert [method for method in METHODS if not whole.rows_independent(method)] == ["sparsefw", "sparsegpt"]

    def test_selects(self):
        found = PruneConfig(include="mlp", ignore="down_proj")
        assert found.selects("model.layers.0.mlp.up_proj.weight")
        assert not found.selects("model.layers.0.mlp.down_proj.weight")
        assert not found.selects("model.layers.0.self_attn.q_proj.weight")


class TestFields:
    def test_choices_are_what_there_is(self):
        choices = {name: f.metadata["choices"] for name, f in FIELDS.items() if f.metadata["choices"] is not None}
        assert choices == dict(
            method=METHODS, compare=METHODS, preset=config.PRESETS, warm_start=SALIENCIES, step_rule=config.STEP_RULES,
            target=config.TARGETS, kernel=KERNELS, precision=PRECISIONS,
        )  # fmt: skip

    def test_each_has_help_and_numbers_a_range(self):
        for name, f in FIELDS.items():
            assert f.metadata["help"], name
            assert (f.metadata["least"] is None) == (f.type not in (int, float)), name
            assert f.metadata["several"] == (f.type == tuple[str, ...]), name


# Asks a fresh process for Triton's kernels without a GPU.
FRESH = """
import os, sys
{before}
from sparsefw.solver import PruneConfig
from sparsefw.errors import InputError
config = PruneConfig(kernel="triton")
try:
    print(config.backend.operations.__name__, os.environ["TRITON_INTERPRET"])
except InputError as error:
    print(error)
"""


class TestBackend:
    def test_torch(self):
        assert PruneConfig(kernel="torch", precision="ieee").backend == TORCH
        assert PruneConfig(kernel="torch", precision="tf32").backend == Backend(cpu, "tf32")

    def test_triton(self):
        assert PruneConfig(kernel="triton", precision="bf16").backend == Backend(triton_ops, "bf16")

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="Triton needs no interpreter")
    @pytest.mark.parametrize(
        ("before", "expected"),
        [
            ("os.environ.pop('TRITON_INTERPRET', None)", "sparsefw.kernels.triton_ops 1"),
            (
                "os.environ.pop('TRITON_INTERPRET', None)\nimport triton",
                "--kernel triton: there is no CUDA device, and Triton was imported before it could be told to "
                "interpret its kernels; set TRITON_INTERPRET=1 before Python starts, or use --kernel torch",
            ),
        ],
    )
    def test_triton_is_told_to_interpret_in_time(self, before, expected):
        """A config by itself imports no Triton. Its backend does, and refuses if it is too late to interpret."""
        done = subprocess.run(
            [sys.executable, "-c", FRESH.format(before=before)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
