"""What of a PruneConfig depends on the calibration."""

import pytest

from sparsefw.errors import InputError
from sparsefw.solver.config import PruneConfig


class TestForCalibration:
    """Fewer tokens damp more, and few windows are gone through twice."""

    @pytest.mark.parametrize(
        ("tokens", "damp"),
        [(16, 0.4), (32_768, 0.4), (65_536, 0.2), (100_000, 0.13), (131_072, 0.1), (10**6, 0.1)],
    )
    def test_of_a_refit(self, tokens, damp):
        for options in (
            dict(reconstruct=0),
            dict(preset="fast"),
            dict(method="wanda", compare=("sparsefw",)),
            dict(method="wanda", reconstruct=2, compare=("sparsefw",)),
        ):
            config = PruneConfig(**options)
            assert config.for_calibration(2, tokens // 2) == config.replace(damp=damp)

    @pytest.mark.parametrize("tokens", [16, 32_768, 10**9])
    def test_of_a_refit_before_a_reconstruction(self, tokens):
        for options in ({}, dict(preset="fast", reconstruct=1)):
            config = PruneConfig(**options)
            assert config.for_calibration(2, tokens // 2) == config.replace(damp=1.6)

    @pytest.mark.parametrize("options", [dict(damp=0.3), dict(damp=0), dict(refit=0), dict(preset="paper")])
    def test_nothing_else_changes(self, options):
        config = PruneConfig(**options)
        assert config.for_calibration(2, 8) == config

    @pytest.mark.parametrize(
        ("options", "few", "many"),
        [
            ({}, 2, 1),
            (dict(damp=0.3), 2, 1),
            (dict(reconstruct=2), 2, 2),
            (dict(reconstruct=0), 0, 0),
            (dict(refit=0), 0, 0),
            (dict(method="wanda", reconstruct=3), 3, 3),
        ],
    )
    def test_passes(self, options, few, many):
        config = PruneConfig(**options)
        assert config.for_calibration(127, 16).reconstruct == few
        assert config.for_calibration(128, 16).reconstruct == many

    def test_passes_go_by_the_windows_of_one_rank(self):
        config = PruneConfig()
        assert [config.for_calibration(n, 16, 4).reconstruct for n in (7, 8, 508, 509)] == [0, 2, 2, 1]

    @pytest.mark.parametrize(("windows", "ranks"), [(1, 1), (3, 2)])
    def test_too_few_windows_to_reconstruct(self, windows, ranks):
        # All is as in a run that is to reconstruct nothing.
        found = PruneConfig().for_calibration(windows, 16, ranks)
        assert (found.reconstruct, found.steps, found.refit, found.damp) == (0, 24, 4, 0.4)
        for method in ("sparsefw", "wanda"):
            asked = PruneConfig(method=method, reconstruct=2)
            with pytest.raises(InputError, match=r"--reconstruct 2: takes 2 calibration .* one rank has 1; give more"):
                asked.for_calibration(windows, 16, ranks)

    def test_of_methods_without_damping(self):
        config = PruneConfig(method="wanda")
        assert config.for_calibration(2, 8) == config
