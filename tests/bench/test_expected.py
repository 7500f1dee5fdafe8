"""The expected shares of the roof: they are those of the table of compiled kernels, and none is above the roof."""

import json

import expected


def test_the_committed_shares_are_true():
    assert json.loads(expected.FILE.read_text("utf-8")) == expected.shares(), "python bench/expected.py"


def test_no_share_is_above_the_roof():
    for target in expected.GPUS:
        for settings in expected.shares()[target].values():
            assert all(0 < found["share"] <= 1 for found in settings.values())
