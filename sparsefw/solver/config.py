"""PruneConfig: the settings of pruning. The flags of the command, with ranges and help, are made from its fields.

A default that depends on other fields is `None` in the class and has its value in every instance:
`PruneConfig().steps` is 12, `PruneConfig(reconstruct=0).steps` is 24, `PruneConfig(refit=0).steps` is 40.
A config means the same on every machine: `kernel` and `precision` stay `None` until `on` sets them for a device.
"""

import copy
import numbers
import os
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sparsefw import selection
from sparsefw.errors import InputError, option
from sparsefw.fields import DEPENDS, check_fields, flag, set_defaults, set_field
from sparsefw.solver import patterns
from sparsefw.solver.patterns import Pattern

if TYPE_CHECKING:
    import torch

    from sparsefw.kernels.backend import Backend


@dataclass(frozen=True)
class Method:
    """Properties of a method. The method's function is in `methods.CHOOSE`.

    Attributes:
        saliency: the saliency of the warm start; None: `PruneConfig.warm_start`.
        rows_independent: whether each row is solved by itself once its saliency and its budget are known. Then layers
            are stacked and solved in chunks. If not, a fraction is one budget for all rows together. Under n:m each
            group keeps its budget.
        frank_wolfe: whether the method uses the fields of `PruneConfig` in OF_FRANK_WOLFE, such as `damp`.
        refits: whether it fits kept weights to a mask, unless `PruneConfig.refit` is 0.
        dense_target: whether its layers may approximate the dense model's outputs, see `targets`. By default blocks are
            then reconstructed, and the model is recovered.
        changes_weights: whether the method always changes kept weights.
    """

    saliency: str | None = None
    rows_independent: bool = True
    frank_wolfe: bool = False
    refits: bool = False
    dense_target: bool = False
    changes_weights: bool = False

    def damps(self, config: "PruneConfig") -> bool:
        """Tell whether it damps the Gram matrix.

        Masks alone that are compared with Frank-Wolfe and a reconstruction are not damped: what pays before a
        reconstruction is too much for them.
        """
        run = METHODS[config.method]
        too_much = config.reconstruct and run.frank_wolfe and run is not self and not self.refits
        return self.frank_wolfe and not too_much


# All saliencies, each of which is also a method; and the saliencies that need the sums of a matrix's columns.
WARM_STARTS, COLUMN_SALIENCIES = ["magnitude", "wanda", "ria"], ["ria"]

METHODS: dict[str, Method] = {
    "sparsefw": Method(frank_wolfe=True, refits=True, dense_target=True),
    "frank-wolfe": Method(frank_wolfe=True),
    "refitted": Method(frank_wolfe=True, refits=True),
    "sparsegpt": Method(saliency="wanda", rows_independent=False, changes_weights=True),
    **{name: Method(saliency=name) for name in WARM_STARTS},
}


def method_of(name: str) -> Method:
    """Return the properties of a method.

    Raises:
        InputError: there is no method of this name.
    """
    if name not in METHODS:
        raise InputError(f"{name}: no method of this name; if it is your own, add it first, in the same process")
    return METHODS[name]


PRESETS = ("sparsefw", "fast", "paper")
# Defaults of the fields in _NAMES, by preset and by whether kept weights are refitted.
_NAMES = ("steps", "step_rule", "alpha", "penalty", "swaps", "refit", "rounds", "target", "damp", "reconstruct")
DEFAULTS = {
    ("sparsefw", True): (24, "line-search", 0.0, 0.7, 0, 4, 3, "dense", 0.1, 2),
    ("sparsefw", False): (40, "line-search", 0.0, 1.0, 100, 0, 0, "layer", 0.1, 0),
    ("fast", True): (3, "line-search", 0.0, 1.0, 0, 4, 0, "layer", 0.1, 0),
    ("fast", False): (10, "line-search", 0.0, 1.0, 0, 0, 0, "layer", 0.1, 0),
    ("paper", True): (2000, "open-loop", 0.9, 0.0, 0, 0, 0, "dense", 0.1, 0),
    ("paper", False): (2000, "open-loop", 0.9, 0.0, 0, 0, 0, "layer", 0.0, 0),
}
# Fields that only Frank-Wolfe uses: two, and all of _NAMES but `reconstruct`. Fields that only methods with refits use.
OF_FRANK_WOLFE, OF_REFITS = ("preset", "warm_start", *_NAMES[:-1]), ("refit", "rounds")
# Defaults of kernel and precision on each device.
ON_GPU = dict(kernel="triton", precision="bf16")
ON_CPU = dict(kernel="torch", precision="ieee")
# These replace the preset's values if a reconstruction follows: then more steps gain nothing.
BEFORE_RECONSTRUCTION = dict(steps=12, refit=2)
# The fewer tokens a Gram matrix has, the less it says about other text. So the default damping is MAX_DAMP for up to
# FEW_TOKENS tokens. With more tokens it falls as 1 / tokens, down to the preset's value.
FEW_TOKENS, MAX_DAMP = 32_500, 0.4
# Damping lowers the quality on the calibration text and raises it on other text. A reconstruction makes up for the
# loss, so more damping pays before it.
DAMP_BEFORE_RECONSTRUCTION = 1.6
# A reconstruction makes PASSES passes. With MANY_WINDOWS windows or more it makes PASSES_OF_MANY: one pass over all
# windows has as many steps as two passes over half of them. A recovery takes RECOVERED times as many tokens as these
# passes, and about as long as the run before it.
PASSES, MANY_WINDOWS, PASSES_OF_MANY, RECOVERED = 2, 128, 1, 2
# Minimum number of windows on a rank for a reconstruction: one window to fit weights to, and one held out.
MIN_WINDOWS = 2


def _count_flag(text: str, metavar: str = "N", most: int = 10**6) -> Any:
    """Make the field of a number of steps, rounds or tokens, whose default depends on other fields."""
    return flag(text, metavar=metavar, least=0, most=most)


@dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned.

    Two configs with the same values are equal, even if the user has set a value in one and a default has set it in the
    other. `replace` changes some fields and computes the defaults that depend on them again; `dataclasses.replace`
    would keep the old defaults.

    Raises:
        InputError: a value is out of its range, or two values contradict each other.
    """

    sparsity: str = flag(
        "0.6: remove this fraction of every row (sparsegpt: of every matrix); layer:0.6: remove this fraction of every "
        "matrix; 2:4 (semi-structured): keep 2 of every 4 weights",
        "0.6", metavar="PATTERN",
    )  # fmt: skip
    method: str = flag("how masks are chosen", "sparsefw", choices=METHODS)
    compare: tuple[str, ...] = flag(
        "another method to prune with, for the table of results; may be repeated (default: none; built-in model: "
        "wanda, frank-wolfe and refitted)",
        (), metavar="METHOD", choices=METHODS, several=True,
    )  # fmt: skip
    preset: str = flag(
        "sparsefw: line search, integrality penalty, 12 steps, alpha 0, refit 2, 3 rounds (24 steps and refit 4 with "
        "--reconstruct 0; 40 steps and swaps with --refit 0); fast: 3 steps, refit 4, no rounds and --target layer, in "
        "about SparseGPT's time; paper: open loop, 2000 steps, no penalty, alpha 0.9, last iterate rounded, no refit",
        "sparsefw", choices=PRESETS,
    )  # fmt: skip
    include: tuple[str, ...] = flag(
        "prune only these layers; may be repeated. NAME selects every layer that has it as whole parts of its dotted "
        "name (down_proj, layers.0, model.layers.3.mlp); re:PATTERN selects every layer whose name begins with a match "
        "of the regular expression (default: all)",
        (), metavar="NAME", several=True,
    )  # fmt: skip
    ignore: tuple[str, ...] = flag(
        "leave these layers dense, named as for --include; may be repeated (default: none)",
        (), metavar="NAME", several=True,
    )  # fmt: skip
    keep_zeros: bool = flag("weights that are zero before pruning stay zero (default: a refit may change them)", False)
    warm_start: str = flag("saliency (importance score) of the first mask (default: wanda)", choices=WARM_STARTS)
    steps: int = _count_flag(
        "Frank-Wolfe steps (default: 12; 24 with --reconstruct 0; 40 with --refit 0; 3 with --preset fast; 10 with "
        "--preset fast --refit 0; 2000 with --preset paper)",
    )
    step_rule: str = flag(
        "line-search: exact line search; open-loop: steps of 2 / (t + 2) (default: line-search; open-loop with "
        "--preset paper)",
        choices=("line-search", "open-loop"),
    )  # fmt: skip
    alpha: float = flag(
        "fraction of the kept weights that saliency fixes before the first step (default: 0; 0.9 with --preset paper)",
        metavar="A", least=0, most=1,
    )  # fmt: skip
    penalty: float = flag(
        "final weight of the integrality penalty, 0 to 1 (default: 0.7; 1 with --refit 0 and with --preset fast; 0 "
        "with --preset paper)",
        metavar="P", least=0, most=1,
    )  # fmt: skip
    swaps: int = _count_flag(
        "make at most N 1-swaps in every row's mask after Frank-Wolfe; each swap lowers the row's error (default: 0; "
        "100 with --refit 0, unless another --preset is named)",
    )
    refit: int = _count_flag(
        "weight update: conjugate-gradient steps of each refit, in which kept weights make up for removed ones; with 0 "
        "kept weights do not change (default: 2; 4 with --reconstruct 0 and with --preset fast; 0 with --preset paper)",
        "STEPS",
    )  # fmt: skip
    rounds: int = _count_flag(
        "rounds that choose the mask again for refitted weights; with 0 the mask is only refitted (default: 3; 0 with "
        "--refit 0 and with --preset fast and paper)",
    )
    target: str = flag(
        "what a layer approximates. dense: its output in the dense model, so that it makes up for the layers pruned "
        "before it; layer: the output of its own dense weight, without passes of the dense model (default: dense; "
        "layer with --refit 0 and with --preset fast, and with --preset paper unless --refit is given)",
        choices=("dense", "layer"),
    )  # fmt: skip
    damp: float = flag(
        "dampening: masks and weights are chosen on the Gram matrix (the Hessian X X^T) with this share of its "
        "diagonal added to the diagonal, so that they also suit other text (default: 1.6; without a reconstruction "
        "0.4 for up to 32500 calibration tokens, 13000 / tokens for more, at least 0.1; 0 with --preset paper unless "
        "--refit is given)",
        # The limit is far above useful values. Up to it, the damped diagonal of real inputs stays finite in fp32.
        metavar="D", least=0, most=2**20,
    )  # fmt: skip
    reconstruct: int = _count_flag(
        "block-wise reconstruction: passes over the calibration windows that fit all kept weights of a block together, "
        "after --method has pruned its layers; 0: no reconstruction (default: 1; 2 with fewer than 128 windows on a "
        "rank; 0 with --refit 0, with another --method or --preset, and with a single window on a rank)",
        "PASSES", 10**4,
    )  # fmt: skip
    recover: int = _count_flag(
        "accuracy recovery after the last block: fit all kept weights of the model together to the dense model's "
        "predictions of this many tokens (default: twice the calibration tokens, four times with fewer than 128 "
        "windows, if the whole model fits into memory; else 0, no recovery; 0 with --refit 0, another --method or "
        "--preset)",
        "TOKENS", 10**12,
    )  # fmt: skip
    kernel: str = flag(
        "triton: Triton kernels, which without a GPU run in the interpreter, exact and slow; torch: plain torch "
        "(default: triton if CUDA is available, else torch)",
        choices=("triton", "torch"),
    )  # fmt: skip
    precision: str = flag(
        "precision of the matrix products (default: bf16 on a GPU, else ieee)",
        choices=("ieee", "tf32x3", "tf32", "bf16"),
    )

    def __post_init__(self) -> None:
        # From Python the sparsity may be a number. On the command line it is always text.
        if isinstance(self.sparsity, numbers.Real):
            set_field(self, "sparsity", str(float(self.sparsity)))
        check_fields(self)
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        set_field(self, "_given", given)
        set_field(self, "compare", tuple(name for name in dict.fromkeys(self.compare) if name != self.method))
        set_field(self, "_pattern", patterns.parse(self.sparsity))
        set_defaults(self, self._defaults())
        self._check_together()
        for name in ("include", "ignore"):
            selection.check_patterns(name, getattr(self, name))

    def _defaults(self) -> dict[str, Any]:
        """Find the defaults that depend on other fields."""
        method = METHODS[self.method]
        refit = self.preset != "paper" if self.refit is DEPENDS else self.refit
        # A compared method gets these values, too.
        refit = refit and (method.refits or not method.frank_wolfe)
        defaults: dict[str, Any] = dict(zip(_NAMES, DEFAULTS[self.preset, bool(refit)], strict=True))
        defaults["warm_start"] = "wanda"
        if not (method.dense_target and self.preset == "sparsefw" and refit):
            defaults["reconstruct"] = defaults["recover"] = 0
        elif self.reconstruct is DEPENDS or self.reconstruct:
            defaults |= BEFORE_RECONSTRUCTION
        return defaults

    def _check_together(self) -> None:
        for names, kind in ((OF_FRANK_WOLFE, "frank_wolfe"), (OF_REFITS, "refits"), (("target",), "dense_target")):
            unused = [name for name in names if name in self.given]
            able = [name for name, method in METHODS.items() if getattr(method, kind)]
            if unused and not {*able} & {*self.methods}:
                own = option("method", self.method)
                raise InputError(f"{option(unused[0])}: not used by {own}, only by {', '.join(able)}")
        if self.rounds and not self.refit:
            raise InputError(f"{option('rounds')}: needs refitted weights, but {option('refit', 0)} turns refits off")
        for name in ("penalty", "swaps", "refit"):
            if self.whole_matrix and getattr(self, name):
                raise InputError(
                    f"{option(name)}: must be 0 with {option('preset', 'paper')} and layer:, which solve whole matrices"
                )

    def replace(self, **changes: Any) -> "PruneConfig":
        """Change some fields, and compute the defaults that depend on them again."""
        changed = type(self)(**(self.given | changes))
        set_defaults(changed, {name: getattr(self, name) for name in ON_CPU})
        return changed

    def on(self, device: "torch.device") -> "PruneConfig":
        """Set kernel and precision for tensors on a device, unless the user has named them."""
        config = copy.copy(self)
        set_defaults(config, ON_CPU if device.type == "cpu" else ON_GPU)
        return config

    def for_calibration(self, windows: int, seqlen: int, ranks: int = 1) -> "PruneConfig":
        """Choose the passes of a reconstruction and the damping for a calibration, unless the user has set them.

        Args:
            windows, seqlen: number of calibration windows, and tokens in each.
            ranks: number of ranks that share the windows.

        Raises:
            InputError: the user asks for a reconstruction, but a rank has too few windows for one.
        """
        passes, fewest, most = self.reconstruct, windows // ranks, -(-windows // ranks)
        if passes and fewest < MIN_WINDOWS:
            if "reconstruct" in self.given:
                raise InputError(
                    f"{option('reconstruct', passes)}: needs {MIN_WINDOWS} calibration windows or batches on every "
                    f"rank, one of them held out, but a rank has {fewest}; give more, or {option('reconstruct', 0)}"
                )
            passes = 0
        elif passes and "reconstruct" not in self.given and most >= MANY_WINDOWS:
            passes = PASSES_OF_MANY
        config = self.replace(reconstruct=passes) if self.reconstruct else self
        frank_wolfe = any(METHODS[method].frank_wolfe for method in self.methods)
        if "damp" in self.given or not self.damp or not frank_wolfe:
            return config
        if config.reconstruct and METHODS[config.method].frank_wolfe:
            return config.replace(damp=DAMP_BEFORE_RECONSTRUCTION)
        return config.replace(damp=round(max(config.damp, MAX_DAMP * min(1.0, FEW_TOKENS / (windows * seqlen))), 2))

    @property
    def given(self) -> dict[str, Any]:
        """Return names and values of the fields that the user has set."""
        return self._given  # type: ignore[attr-defined]  # set in __post_init__

    @property
    def pattern(self) -> Pattern:
        """Return the parsed `sparsity`."""
        return self._pattern  # type: ignore[attr-defined]  # set in __post_init__

    @property
    def methods(self) -> tuple[str, ...]:
        """List all methods of the run. The checkpoint gets the weights of the last method."""
        return (*self.compare, self.method)

    @property
    def whole_matrix(self) -> bool:
        """Tell whether a whole matrix is solved as one row, with one budget and one step size, as in the paper."""
        return self.preset == "paper" and self.pattern.scope == "layer"

    def rows_independent(self, method: str) -> bool:
        """Tell whether a method solves each row by itself, so that layers with the same input can be stacked.

        The saliency and the budget of a row may still depend on the layer's other rows, see `rows_shared`.
        """
        return METHODS[method].rows_independent and not (METHODS[method].frank_wolfe and self.whole_matrix)

    def rows_shared(self, method: str) -> bool:
        """Tell whether ranks may divide the rows of a layer.

        They may if neither the solution of a row nor its saliency nor its budget depends on other rows.
        """
        by_row = {METHODS[method].saliency, self.warm_start}.isdisjoint(COLUMN_SALIENCIES)
        return self.rows_independent(method) and self.pattern.scope != "layer" and by_row

    def dense_target(self, method: str) -> bool:
        """Tell whether layers that a method prunes approximate the dense model's outputs."""
        return self.target == "dense" and METHODS[method].dense_target

    @property
    def uses_dense_target(self) -> bool:
        """Tell whether the layers of any method approximate the dense model's outputs."""
        return any(map(self.dense_target, self.methods))

    @property
    def uses_dense_stream(self) -> bool:
        """Tell whether the calibration windows also go through the dense model."""
        return self.uses_dense_target or self.reconstruct > 0

    @property
    def goes_back(self) -> bool:
        """Tell whether the windows, which stages move into a block, return to its input for a reconstruction."""
        return self.reconstruct > 0 and self.dense_target(self.method)

    @property
    def backend(self) -> "Backend":
        """Load the operations of `kernel` at `precision`. `on` must have set both.

        Raises:
            InputError: the kernel is Triton's, there is no GPU, and Triton was imported without its interpreter.
        """
        # Imported here, so that --help does not wait for torch.
        import torch

        from sparsefw.kernels.backend import load_backend

        if self.kernel == "triton" and not torch.cuda.is_available():
            # Triton decides whether it interprets its kernels when it is first imported.
            if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
                raise InputError(
                    f"{option('kernel', 'triton')}: there is no CUDA device, and Triton was imported before it could "
                    "be told to interpret its kernels; set TRITON_INTERPRET=1 before Python starts, or use "
                    f"{option('kernel', 'torch')}"
                )
            os.environ["TRITON_INTERPRET"] = "1"
        return load_backend(self.kernel, self.precision)

    def selects(self, layer: str) -> bool:
        """Tell whether a layer of this name is to be pruned."""
        return selection.selected(layer, self.include, self.ignore)


def default_recovery(windows: int, seqlen: int) -> int:
    """Count the tokens that a recovery takes by default, after a run on `windows` windows of `seqlen` tokens."""
    return RECOVERED * (PASSES_OF_MANY if windows >= MANY_WINDOWS else PASSES) * windows * seqlen
