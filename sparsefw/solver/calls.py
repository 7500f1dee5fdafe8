"""How often one solve calls each operation, as a function of the config alone.

The counts follow the loops of `frank_wolfe`, `reselect`, `refit` and `target`; a test counts the calls of real solves.
"""

from dataclasses import dataclass

from sparsefw.solver.config import PruneConfig
from sparsefw.solver.frank_wolfe import CERTIFIED
from sparsefw.solver.methods import METHODS
from sparsefw.solver.reselect import RESTART
from sparsefw.solver.stack import TARGET_STEPS


@dataclass(frozen=True)
class Calls:
    """Calls of one solve: products by their purpose, and the other operations.

    Attributes:
        target: products on the way from the weights to their target.
        starts: products that give a Frank-Wolfe run its first R.
        steps: products of Frank-Wolfe steps.
        refits: products of refits.
        fits: refits; each is one product and one more for every conjugate-gradient step.
        errors: exact products, for errors and swaps.
        errors_of_weights: those among them for errors of weights that were changed.
        row_steps, lmos, roundings, row_swaps: calls of these operations; a rounding is an operation of its own.
    """

    target: int = 0
    starts: int = 0
    steps: int = 0
    refits: int = 0
    fits: int = 0
    errors: int = 0
    errors_of_weights: int = 0
    row_steps: int = 0
    lmos: int = 0
    roundings: int = 0
    row_swaps: int = 0

    @property
    def products(self) -> int:
        """All products."""
        return self.target + self.starts + self.steps + self.refits + self.errors

    @property
    def descents(self) -> list[tuple[int, int, bool]]:
        """Conjugate-gradient descents: how many, with how many steps each, and whether under a mask."""
        targets, fits = (1, self.target, False), (self.fits, self.refits // max(1, self.fits) - 1, True)
        return [(count, steps, mask) for count, steps, mask in (targets, fits) if count and steps > 0]


def calls(method: str, config: PruneConfig, uses_dense_target: bool) -> Calls:
    """The calls of a solve of rows that read the same input.

    Args:
        method: one of METHODS.
        config: the config of the run.
        uses_dense_target: whether the rows approximate the dense model's outputs.
    """
    if method != "sparsefw":
        # A mask by saliency has one error. Chosen weights have their own, that of their mask and that of the warm
        # start.
        masks_only = METHODS[method].saliency == method
        return Calls(errors=1 if masks_only else 3, errors_of_weights=int(not masks_only), lmos=1)
    steps, refit, rounds = config.steps, config.refit, config.rounds
    restarts = bool(refit and rounds)
    more_steps = round(RESTART * steps) if restarts else 0
    bounds = {max(1, round(share * steps)) for share in CERTIFIED}
    # One refit of the first mask, one of the second Frank-Wolfe's, and one in each round.
    fits = (2 + rounds if restarts else 1) if refit else 0
    return Calls(
        target=TARGET_STEPS if uses_dense_target else 0,
        # Without damping, the first run starts from the product of the warm start's error.
        starts=bool(steps and config.damp and not refit) + restarts,
        steps=steps + more_steps,
        refits=fits * (1 + refit),
        fits=fits,
        errors=2 + bool(config.swaps) + bool(refit),
        errors_of_weights=int(bool(refit)),
        row_steps=steps + more_steps,
        # One for the warm start, one for fixed entries. Then the bounds and the first vertex. The second Frank-Wolfe
        # takes its warm start and its first vertex. Each round takes one.
        lmos=1 + bool(config.alpha) + (len(bounds) + 1 if steps else 0) + (2 + rounds) * restarts,
        roundings=bool(steps) + restarts,
        row_swaps=int(bool(config.swaps)),
    )
