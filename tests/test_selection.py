"""Names that patterns stand for, and patterns that are refused."""

import pytest
from helpers.checkpoints import refused

from sparsefw.selection import check_patterns, check_used, matches, selected

DOWN = "model.layers.0.mlp.down_proj.weight"
EXPERT = "model.layers.0.mlp.experts.down_proj[3]"


@pytest.mark.parametrize(
    ("layer", "patterns"),
    [
        (DOWN, ("down_proj", "layers.0", "model.layers.0.mlp", "model", DOWN, DOWN.removesuffix(".weight"))),
        # A regular expression matches from the start, and need not reach the end.
        (DOWN, ("re:model", r"re:.*\.mlp\.", r"re:.*layers\.(0|1)\..*down_proj$", "down_proj.weight")),
        ("down_proj", ("down_proj",)),
        # A stacked parameter stands for all of its experts.
        (EXPERT, ("down_proj", "experts", "experts.down_proj", "down_proj[3]", EXPERT, r"re:.*down_proj\[[0-3]\]")),
    ],
)
def test_whole_parts_of_a_name(layer, patterns):
    assert all(matches(pattern, layer) for pattern in patterns)


@pytest.mark.parametrize(
    ("layer", "patterns"),
    [
        ("model.layers.0.mlp.xdown_proj.weight", ("down_proj",)),
        ("model.layers.10.mlp.down_proj.weight", ("layers.1", "0.mlp")),
        (DOWN, ("down", "proj", "layers.mlp", "mlp.layers", "Down_proj")),
        # Without re: a pattern is no regular expression, and with it a match must begin at the start.
        (DOWN, (".*down_proj", "layers.?", "re:down_proj", "re:.*weight")),
        (EXPERT, ("down_proj[2]", "[3]")),
        ("model.layers.0.mlp.experts.down_proj[33]", ("down_proj[3]",)),
    ],
)
def test_other_names(layer, patterns):
    assert not any(matches(pattern, layer) for pattern in patterns)


@pytest.mark.parametrize(
    ("include", "ignore", "expected"),
    [
        (("q", "b"), (), ["a.q", "b.q", "b.k"]),
        ((), ("q", "b"), ["a.k"]),
        (("a",), ("q",), ["a.k"]),
    ],
)
def test_included_and_not_ignored(include, ignore, expected):
    layers = ("a.q", "a.k", "b.q", "b.k")
    assert [layer for layer in layers if selected(layer, include, ignore)] == expected


LAYERS = ("model.layers.0.q.weight", "model.layers.0.k.weight", "model.layers.10.q.weight")


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999}", "re:" + "(" * 5000, "", "re:"])
def test_patterns_that_are_none_are_refused(pattern):
    with refused(r"^include.*: "):
        check_patterns("include", ["mlp", pattern])


def test_every_pattern_stands_for_something():
    for include, ignore in (((), ()), (("q",), ()), (("layers.0",), ("k",)), ((), ("re:.*k",))):
        check_used(LAYERS, include, ignore)
    for include, ignore, hint in (
        (("k", "down_proj"), (), LAYERS[0]),
        ((), ("layers.1",), r"did you mean layers\.10"),
        ((), ("re:.*layrs",), r"did you mean layers\?"),
    ):
        with refused(f"no layer of the model has this name.*{hint}"):
            check_used(LAYERS, include, ignore)
    # A head is never pruned: to ignore it is no mistake, as it is with libraries that would prune it.
    check_used(LAYERS, (), ("lm_head", "re:.*head", "k"), ("model", "lm_head"))
    with refused(r"^include='lm_head': is never pruned; one is model"):
        check_used(LAYERS, ("lm_head",), (), ("model", "lm_head"))
    for include, ignore in ((("q",), ("q",)), ((), ("model",))):
        with refused(r"^include, ignore: no layer is left to prune$"):
            check_used(LAYERS, include, ignore)
