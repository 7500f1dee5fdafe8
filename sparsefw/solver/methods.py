"""The methods that `--method` names, and what sets them apart; `choices` has what each of them does."""

from dataclasses import dataclass

from sparsefw.solver.saliency import SALIENCIES


@dataclass(frozen=True)
class Method:
    """How a method chooses masks.

    Attributes:
        saliency: saliency of the warm start; None takes the config's.
        rows_independent: whether rows do not depend on each other, so that layers are stacked and solved in chunks.
            Otherwise the rows of a layer share one budget.
        uses_damping: whether it uses `Rows.damped`.
        uses_target: whether its layers may approximate the dense model's outputs, see `target`; it then uses damping.
    """

    saliency: str | None = None
    rows_independent: bool = True
    uses_damping: bool = False
    uses_target: bool = False


METHODS: dict[str, Method] = {
    "sparsefw": Method(uses_damping=True, uses_target=True),
    "sparsegpt": Method(saliency="wanda", rows_independent=False),
    **{name: Method(saliency=name) for name in SALIENCIES},
}
