"""The expected shares of the roof: they are those of the table of compiled kernels, and none is above the roof."""

import json

import expected
import pytest
from compiled import committed

from sparsefw.kernels.operation import OPERATIONS


def test_the_committed_shares_are_true():
    assert json.loads(expected.FILE.read_text("utf-8")) == expected.shares(), "python bench/expected.py"


def test_no_share_is_above_the_roof():
    for target in expected.GPUS:
        for settings in expected.shares()[target].values():
            assert all(0 < found["share"] <= 1 for found in settings.values())


@pytest.mark.parametrize(
    "change", [{"registers": 255}, {"instructions": [[9000, 3000], [900, 300]]}, {"shared": 200_000}]
)
def test_a_heavier_program_is_expected_to_be_slower(change):
    row = committed()["row_step 8192x8192 bfloat16", "sm_90"]
    # With 8 warps, two programs fit a multiprocessor.
    rows = row | {"warps": 8}, row | {"warps": 8} | change
    light, heavy = (expected.expected("sm_90", OPERATIONS["row_step"], "", x)["share"] for x in rows)
    assert heavy < light
