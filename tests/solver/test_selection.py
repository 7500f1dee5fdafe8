"""Names that patterns stand for, and patterns that are refused."""

import pytest

from sparsefw.errors import InputError
from sparsefw.solver.selection import check_patterns, check_used, matches, selected

DOWN = "model.layers.0.mlp.down_proj.weight"
EXPERT = "model.layers.0.mlp.experts.down_proj[3]"


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("down_proj", DOWN),
        ("down_proj", "down_proj.weight"),
        ("down_proj", "down_proj"),
        ("layers.0", DOWN),
        ("model.layers.0.mlp", DOWN),
        ("model", DOWN),
        (DOWN, DOWN),
        (DOWN.removesuffix(".weight"), DOWN),
        (DOWN, DOWN.removesuffix(".weight")),
        ("down_proj.weight", DOWN),
        # A regular expression matches from the start, and need not reach the end.
        ("re:model", DOWN),
        (r"re:.*\.mlp\.", DOWN),
        (r"re:.*layers\.(0|1)\..*down_proj$", DOWN),
        # A stacked parameter stands for all of its experts.
        ("down_proj", EXPERT),
        ("experts", EXPERT),
        ("experts.down_proj", EXPERT),
        ("down_proj[3]", EXPERT),
        (EXPERT, EXPERT),
        (r"re:.*down_proj\[[0-3]\]", EXPERT),
    ],
)
def test_whole_parts_of_a_name(pattern, layer):
    assert matches(pattern, layer)


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("down_proj", "model.layers.0.mlp.xdown_proj.weight"),
        ("down_proj", "model.layers.0.mlp.down_projx.weight"),
        ("down", DOWN),
        ("proj", DOWN),
        ("layers.1", "model.layers.10.mlp.down_proj.weight"),
        ("1.mlp", "model.layers.11.mlp.down_proj.weight"),
        ("layers.mlp", DOWN),
        ("mlp.layers", DOWN),
        ("Down_proj", DOWN),
        # Without re: a pattern is no regular expression, and with it a match must begin at the start.
        (".*down_proj", DOWN),
        ("layers.?", DOWN),
        ("re:down_proj", DOWN),
        ("re:.*weight", DOWN),
        ("down_proj[2]", EXPERT),
        ("down_proj[3]", "model.layers.0.mlp.experts.down_proj[33]"),
        ("[3]", EXPERT),
        ("down_proj", "model.layers.0.mlp.experts.xdown_proj[3]"),
    ],
)
def test_other_names(pattern, layer):
    assert not matches(pattern, layer)


@pytest.mark.parametrize(
    ("include", "ignore", "expected"),
    [
        ((), (), ["a.q", "a.k", "b.q", "b.k"]),
        (("q",), (), ["a.q", "b.q"]),
        (("q", "b"), (), ["a.q", "b.q", "b.k"]),
        ((), ("q",), ["a.k", "b.k"]),
        ((), ("q", "b"), ["a.k"]),
        (("a",), ("q",), ["a.k"]),
        (("q",), ("q",), []),
        (iter(["q"]), iter(["b"]), ["a.q"]),
    ],
)
def test_included_and_not_ignored(include, ignore, expected):
    include, ignore = tuple(include), tuple(ignore)
    assert [layer for layer in ("a.q", "a.k", "b.q", "b.k") if selected(layer, include, ignore)] == expected


def test_iterators_are_read_once():
    assert not selected("a.q", iter(["q"]), iter(["a"]))
    assert selected("a.q", iter(["k", "q"]), iter(["b"]))


class TestCheckPatterns:
    @pytest.mark.parametrize("pattern", ["", "re:"])
    def test_empty(self, pattern):
        with pytest.raises(InputError, match=r"^--ignore: empty; give the name of a layer or block, or re:PATTERN$"):
            check_patterns("--ignore", ["mlp", pattern])

    @pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[a", "re:(?P<x>a)(?P<x>b)", "re:a{99999999999}"])
    def test_not_a_regular_expression(self, pattern):
        with pytest.raises(InputError) as error:
            check_patterns("--include", [pattern])
        assert str(error.value).startswith(f"--include {pattern}: not a regular expression (")
        assert "\n" not in str(error.value)

    def test_too_deep(self):
        with pytest.raises(InputError, match=r"^--include re:\(+\.\.\. .*: not a regular expression \(.*recursion"):
            check_patterns("--include", ["re:" + "(" * 5000 + ")" * 5000])

    def test_what_can_be_one(self):
        check_patterns("--include", [])
        check_patterns("--include", ["down_proj", "re:.*", "(", "re:a|b"])


class TestCheckUsed:
    LAYERS = ("model.layers.0.q.weight", "model.layers.0.k.weight", "model.layers.10.q.weight")

    @pytest.mark.parametrize(
        ("include", "ignore"), [((), ()), (("q",), ()), (("layers.0",), ("k",)), ((), ("re:.*k",))]
    )
    def test_every_pattern_stands_for_something(self, include, ignore):
        check_used(iter(self.LAYERS), iter(include), iter(ignore))

    @pytest.mark.parametrize("pattern", ["down_proj", "layers.1", "re:q"])
    @pytest.mark.parametrize("flag", ["--include", "--ignore"])
    def test_a_pattern_that_stands_for_nothing(self, flag, pattern):
        patterns = {"--include": (), "--ignore": ()} | {flag: ("k", pattern)}
        with pytest.raises(InputError) as error:
            check_used(self.LAYERS, patterns["--include"], patterns["--ignore"])
        assert str(error.value) == f"{flag} {pattern}: no layer of the model has this name; one is {self.LAYERS[0]}"

    @pytest.mark.parametrize(("include", "ignore"), [(("q",), ("q",)), ((), ("model",)), (("k",), ("layers.0",))])
    def test_nothing_is_left(self, include, ignore):
        with pytest.raises(InputError, match=r"^--include, --ignore: no layer is left to prune$"):
            check_used(self.LAYERS, include, ignore)
