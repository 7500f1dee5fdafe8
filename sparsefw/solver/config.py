"""PruneConfig: how a model is pruned, in the user's words. Its fields make the flags, their ranges and their help.

A default that depends on other fields is `None` in the class and has its value in every instance:
`PruneConfig().steps` is 12, `PruneConfig(reconstruct=0).steps` is 24, `PruneConfig(refit=0).steps` is 40.
A config means the same on every machine: `kernel` and `precision` stay `None` until `on` settles them for a device.
"""

import copy
import numbers
import os
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sparsefw import selection
from sparsefw.errors import InputError, option
from sparsefw.fields import DEPENDS, check_fields, flag, set_field
from sparsefw.solver import patterns
from sparsefw.solver.patterns import Pattern

if TYPE_CHECKING:
    import torch

    from sparsefw.kernels.backend import Backend


@dataclass(frozen=True)
class Method:
    """Needs and effects of a method; `methods.CHOOSE` has its function.

    Attributes:
        saliency: the saliency of the warm start; None: the config's.
        rows_independent: whether rows do not depend on each other, so that layers are stacked and solved in chunks.
            Otherwise the rows of a layer share one budget.
        frank_wolfe: whether the method takes the fields of a config that are marked `frank_wolfe`.
        dense_target: whether the method takes a damped Gram matrix, and its layers may approximate the dense model's
            outputs, see `targets`.
        changes_weights: whether the method changes kept weights. Frank-Wolfe does so where `refit` is not 0.
    """

    saliency: str | None = None
    rows_independent: bool = True
    frank_wolfe: bool = False
    dense_target: bool = False
    changes_weights: bool = False


# Saliencies, each of which is a method, too; and the saliencies that depend on the columns of a matrix, too.
WARM_STARTS, OF_MATRIX = ("magnitude", "wanda", "ria"), ("ria",)

METHODS: dict[str, Method] = {
    "sparsefw": Method(frank_wolfe=True, dense_target=True),
    "sparsegpt": Method(saliency="wanda", rows_independent=False, changes_weights=True),
    **{name: Method(saliency=name) for name in WARM_STARTS},
}

PRESETS = ("sparsefw", "fast", "paper")
# Defaults by preset, with a refit of the kept weights and without one, where the mask is final.
_NAMES = ("steps", "step_rule", "alpha", "penalty", "swaps", "refit", "rounds", "target", "damp", "reconstruct")
DEFAULTS = {
    ("sparsefw", True): (24, "line-search", 0.0, 0.7, 0, 4, 3, "dense", 0.1, 2),
    ("sparsefw", False): (40, "line-search", 0.0, 1.0, 100, 0, 0, "layer", 0.2, 0),
    ("fast", True): (3, "line-search", 0.0, 1.0, 0, 4, 0, "layer", 0.1, 0),
    ("fast", False): (10, "line-search", 0.0, 1.0, 0, 0, 0, "layer", 0.2, 0),
    ("paper", True): (2000, "open-loop", 0.9, 0.0, 0, 0, 0, "dense", 0.1, 0),
    ("paper", False): (2000, "open-loop", 0.9, 0.0, 0, 0, 0, "layer", 0.0, 0),
}
# Kernel and precision by device.
ON_GPU = dict(kernel="triton", precision="bf16")
ON_CPU = dict(kernel="torch", precision="ieee")
# Before a reconstruction, where more steps gain nothing, these replace the preset's.
BEFORE_RECONSTRUCTION = dict(steps=12, refit=2)
# A Gram matrix of few tokens says less of other text. The default damping of a refit is MAX_DAMP for up to FEW_TOKENS
# tokens, and falls as 1 / tokens with more, down to the preset's.
FEW_TOKENS, MAX_DAMP = 32_500, 0.4
# Damping costs quality on the calibration's text and gains it on other text; a reconstruction makes up for the cost.
DAMP_BEFORE_RECONSTRUCTION = 1.6
# Passes of a reconstruction over MANY_WINDOWS windows or more: one pass makes as many steps as two over half of them.
MANY_WINDOWS, PASSES_OF_MANY = 128, 1
# Windows that a reconstruction needs on every rank: one to fit weights to, and one to hold out.
MIN_WINDOWS = 2


@dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned.

    Two configs are equal if their values are, whether the user or a default has set them. `replace` changes some fields
    and finds the defaults that depend on them anew; `dataclasses.replace` keeps the old ones.

    Raises:
        InputError: a value is out of its range, or values do not go together.
    """

    sparsity: str = flag(
        "0.6: that fraction of every row is removed; layer:0.6: of every matrix; 2:4 (semi-structured): 2 of every 4 "
        "weights are kept",
        "0.6", metavar="PATTERN",
    )  # fmt: skip
    method: str = flag("how masks are chosen", "sparsefw", choices=METHODS)
    compare: tuple[str, ...] = flag(
        "prune with this method too, of those that --method takes, for the table; may be repeated (default: none; "
        "built-in model: wanda)",
        (), metavar="METHOD", choices=METHODS, several=True,
    )  # fmt: skip
    preset: str = flag(
        "sparsefw: line search, integrality penalty, 12 steps, alpha 0, refit 2, 3 rounds; with --reconstruct 0, 24 "
        "steps and refit 4; with --refit 0, 40 steps and swaps; fast: 3 steps, one refit and targets of the layers "
        "themselves, at SparseGPT's cost; paper: open loop, 2000 steps, no penalty, alpha 0.9, last iterate rounded, "
        "no refit",
        "sparsefw", choices=PRESETS,
    )  # fmt: skip
    include: tuple[str, ...] = flag(
        "prune only these layers; may be repeated. A name stands for all layers that have it as whole parts of their "
        "name (down_proj, layers.0, model.layers.3.mlp), re:PATTERN for those whose name the pattern matches from its "
        "start (default: all)",
        (), metavar="NAME", several=True,
    )  # fmt: skip
    ignore: tuple[str, ...] = flag(
        "leave these layers dense, named as for --include; may be repeated (default: none)",
        (), metavar="NAME", several=True,
    )  # fmt: skip
    keep_zeros: bool = flag("weights that are zero in the input stay zero (default: a refit may revive them)", False)
    warm_start: str = flag(
        "saliency (importance score) of the first mask (default: wanda)", choices=WARM_STARTS, frank_wolfe=True
    )
    steps: int = flag(
        "Frank-Wolfe steps (default: 12; 24 with --reconstruct 0; 40 with --refit 0; 3 with --preset fast, 10 with "
        "both; 2000 with --preset paper)",
        metavar="N", least=0, most=10**6, frank_wolfe=True,
    )  # fmt: skip
    step_rule: str = flag(
        "exact line search, or steps of 2 / (t + 2) (default: line-search; open-loop with --preset paper)",
        choices=("line-search", "open-loop"), frank_wolfe=True,
    )  # fmt: skip
    alpha: float = flag(
        "fraction of kept weights fixed by saliency (default: 0; 0.9 with --preset paper)",
        metavar="A", least=0, most=1, frank_wolfe=True,
    )  # fmt: skip
    penalty: float = flag(
        "final weight of the integrality penalty, 0 to 1 (default: 0.7; 1 with --refit 0 and with --preset fast; 0 "
        "with --preset paper)",
        metavar="P", least=0, most=1, frank_wolfe=True,
    )  # fmt: skip
    swaps: int = flag(
        "1-swaps at most of every row's mask after Frank-Wolfe, each of which lowers the row's error (default: 0; 100 "
        "with --refit 0 and without another --preset)",
        metavar="N", least=0, most=10**6, frank_wolfe=True,
    )  # fmt: skip
    refit: int = flag(
        "weight update: conjugate-gradient steps with which kept weights make up for removed ones, in each refit; 0 "
        "leaves kept weights as they are (default: 2; 4 with --reconstruct 0 and with --preset fast; 0 with --preset "
        "paper)",
        metavar="STEPS", least=0, most=10**6, frank_wolfe=True,
    )  # fmt: skip
    rounds: int = flag(
        "rounds of choosing the mask again for refitted weights; 0 only refits (default: 3; 0 with --refit 0 and with "
        "--preset fast and paper)",
        metavar="N", least=0, most=10**6, frank_wolfe=True,
    )  # fmt: skip
    target: str = flag(
        "what layers approximate. dense: the dense model's outputs, so that they make up for pruned ones before them; "
        "layer: what the layer itself makes of its input, without the dense model (default: dense; layer with "
        "--refit 0 and with --preset fast, and with --preset paper unless --refit is given)",
        choices=("dense", "layer"), frank_wolfe=True,
    )  # fmt: skip
    damp: float = flag(
        "dampening: this share of the diagonal of the Gram matrix (the Hessian X X^T) is added to it where masks and "
        "weights are chosen, so that they hold on other text (default: 1.6; with --reconstruct 0 and with --preset "
        "fast: 0.4 with up to 32500 tokens of calibration, with more 13000 / tokens, at least 0.1; 0.2 with --refit 0; "
        "0 with --preset paper unless --refit is given)",
        # Far more than is of use; a diagonal of real inputs stays finite in fp32 with it.
        metavar="D", least=0, most=2**20, frank_wolfe=True,
    )  # fmt: skip
    reconstruct: int = flag(
        "block-wise reconstruction: passes over the calibration windows that fit the kept weights of each block "
        "together, after --method; 0 leaves them as the method makes them (default: 1; 2 with fewer than 128 windows "
        "on a rank; 0 with --refit 0, with another --method or --preset, and with a single window on a rank)",
        metavar="PASSES", least=0, most=10**4,
    )  # fmt: skip
    kernel: str = flag(
        "triton without a GPU runs in the interpreter: exact and slow (default: triton where CUDA is available, else "
        "torch)",
        choices=("triton", "torch"),
    )  # fmt: skip
    precision: str = flag(
        "precision of the matrix products (default: bf16 on a GPU, else ieee)",
        choices=("ieee", "tf32x3", "tf32", "bf16"),
    )

    def __post_init__(self) -> None:
        # Python users write a number where the command line has a text.
        if isinstance(self.sparsity, numbers.Real):
            set_field(self, "sparsity", str(float(self.sparsity)))
        check_fields(self)
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        set_field(self, "_given", given)
        set_field(self, "compare", tuple(name for name in dict.fromkeys(self.compare) if name != self.method))
        set_field(self, "_pattern", patterns.parse(self.sparsity))
        self._with_defaults(self._defaults())
        self._check_together()
        for name in ("include", "ignore"):
            selection.check_patterns(name, getattr(self, name))

    def _defaults(self) -> dict[str, Any]:
        """Find the defaults that depend on other fields."""
        refit = self.preset != "paper" if self.refit is DEPENDS else self.refit
        values = DEFAULTS[self.preset, bool(refit)]
        defaults: dict[str, Any] = dict(zip(_NAMES, values, strict=True))
        defaults["warm_start"] = "wanda"
        if not METHODS[self.method].frank_wolfe:
            defaults["reconstruct"] = 0
        elif self.preset == "sparsefw" and refit and (self.reconstruct is DEPENDS or self.reconstruct):
            defaults |= BEFORE_RECONSTRUCTION
        return defaults

    def _check_together(self) -> None:
        unused = [f.name for f in fields(self) if f.metadata.get("frank_wolfe") and f.name in self.given]
        if unused and not self.uses_frank_wolfe:
            others = ", ".join(name for name, method in METHODS.items() if method.frank_wolfe)
            raise InputError(f"{option(unused[0])}: not used by {option('method', self.method)}, only by {others}")
        if self.rounds and not self.refit:
            raise InputError(f"{option('rounds')}: masks for refitted weights, and {option('refit', 0)} refits none")
        for name in ("penalty", "swaps", "refit"):
            if self.whole_matrix and getattr(self, name):
                raise InputError(
                    f"{option(name)}: not of {option('preset', 'paper')} with layer:, which solves by matrix"
                )

    def replace(self, **changes: Any) -> "PruneConfig":
        """Change some fields, and find the defaults that depend on them anew."""
        changed = type(self)(**(self.given | changes))
        return changed._with_defaults({name: getattr(self, name) for name in ON_CPU})

    def on(self, device: "torch.device") -> "PruneConfig":
        """Settle kernel and precision for tensors on a device, unless the user names them."""
        return copy.copy(self)._with_defaults(ON_CPU if device.type == "cpu" else ON_GPU)

    def _with_defaults(self, values: dict[str, Any]) -> "PruneConfig":
        """Set fields that have no value yet."""
        for name, value in values.items():
            if getattr(self, name) is DEPENDS:
                set_field(self, name, value)
        return self

    def for_calibration(self, windows: int, seqlen: int, ranks: int = 1) -> "PruneConfig":
        """Settle the passes of a reconstruction and the damping for a calibration, unless the user sets them.

        Args:
            windows, seqlen: number of calibration windows, and tokens in each.
            ranks: number of ranks that share the windows.

        Raises:
            InputError: the user asks for a reconstruction, and a rank has too few windows for it.
        """
        passes, fewest, most = self.reconstruct, windows // ranks, -(-windows // ranks)
        if passes and fewest < MIN_WINDOWS:
            if "reconstruct" in self.given:
                raise InputError(
                    f"{option('reconstruct', passes)}: takes {MIN_WINDOWS} calibration windows or batches on "
                    f"every rank, one to hold out, and one rank has {fewest}; give more, or {option('reconstruct', 0)}"
                )
            passes = 0
        elif passes and "reconstruct" not in self.given and most >= MANY_WINDOWS:
            passes = PASSES_OF_MANY
        config = self.replace(reconstruct=passes) if self.reconstruct else self
        if "damp" in self.given or not self.refit or not self.uses_frank_wolfe:
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
        """List all methods of the run; the weights of the last one are written."""
        return (*self.compare, self.method)

    @property
    def whole_matrix(self) -> bool:
        """Tell whether a `layer:` budget is one problem with one step size, as in the paper, and not one per row."""
        return self.preset == "paper" and self.pattern.scope == "layer"

    def rows_independent(self, method: str) -> bool:
        """Tell whether a method solves every row by itself, so that layers that share an input can be stacked."""
        return METHODS[method].rows_independent and not (METHODS[method].frank_wolfe and self.whole_matrix)

    def rows_shared(self, method: str) -> bool:
        """Tell whether ranks may share the rows of a layer: no budget, saliency or factor is common to all rows."""
        by_row = (METHODS[method].saliency or self.warm_start) not in OF_MATRIX
        return self.rows_independent(method) and self.pattern.scope != "layer" and by_row

    @property
    def uses_frank_wolfe(self) -> bool:
        """Tell whether any method of the run takes the fields that are marked `frank_wolfe`."""
        return any(METHODS[method].frank_wolfe for method in self.methods)

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
        """Tell whether the windows return to a block's input for a reconstruction, after stages have moved them."""
        return self.reconstruct > 0 and self.dense_target(self.method)

    @property
    def backend(self) -> "Backend":
        """Load the operations of the kernel at the precision, which `on` has settled.

        Raises:
            InputError: the kernel is Triton's, there is no GPU, and this process cannot interpret kernels any more.
        """
        # Imported here: --help does not wait for it.
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
