"""Steps in plain torch, except for the selection, arranged for a CPU, for `--kernel torch`.

For formulas and arguments see the Triton kernel of the same name. The steps work in place, in blocks of rows that stay
in the cache, and without arithmetic on bool tensors (`masks.py` says why). They make few temporaries, since the system
may take longer to allocate one than torch to compute it. The results are the same for any size of the blocks. The steps
also run on a GPU, but are not tuned for GPUs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from ..definitions import ADAM_EPSILON, CONVERGED, DECAYS, RowState
from ..masks import as_float, masked
from ..plain import row_blocks
from .selection import select


def row_step(
    state: RowState,
    *,
    eta: float | Tensor | None = None,
    theta: float | Tensor = 0.0,
    next_theta: float | Tensor = 0.0,
) -> None:
    """Make a Frank-Wolfe step in every row, in place, in blocks of rows that stay in the cache.

    The next scores overwrite U. `state.threshold` is ignored.
    """
    W, k, fixed, target_gap = state.W, state.k, state.fixed, state.target_gap
    theta, next_theta = float(theta), float(next_theta)
    for rows in row_blocks(W):
        w, m, r, u, v = W[rows].float(), state.M[rows], state.R[rows], state.U[rows], state.V[rows]
        D, B = as_float(v).sub_(m), u.sub_(r)
        q = w.square().mul_(state.diag) if theta or next_theta else None
        state.eta[rows] = _line_search(w, q, m, r, D, B, theta) if eta is None else eta
        eta_rows = state.eta[rows, None]
        m.addcmul_(D, eta_rows)
        r.addcmul_(B, eta_rows)
        # Half of each score is computed, which selects the same entries.
        score = torch.mul(w, r, out=u)
        removed = 1 - m
        state.error[rows] = (score * removed).sum(1)
        if q is not None and next_theta:
            score.addcmul_(removed.sub_(0.5), q, value=-next_theta)
        budget = k[rows] if isinstance(k, Tensor) else k
        fixed_rows = None if fixed is None else fixed[rows]
        select(score, budget, group=state.group, fixed=fixed_rows, positive=next_theta < 1, out=v)
        E = state.E[rows]
        removed = torch.mul(w, as_float(~v), out=E if E.dtype == w.dtype else removed)
        removed = removed if target_gap is None else removed.add_(target_gap[rows])
        if removed is not E:
            E.copy_(removed)


def _line_search(w: Tensor, q: Tensor | None, m: Tensor, r: Tensor, D: Tensor, B: Tensor, theta: float) -> Tensor:
    """Compute the step sizes (rows,) of a line search, with D = V - M and B = U - R."""
    wD = w * D
    # `half` is -lin / 2. There are few calls, since a call on one value a row takes as long as a call on whole rows.
    half, quad = (wD * r).sum(1), wD.mul_(B).sum(1).neg_()
    if q is not None and theta:
        qD = torch.mul(q, D, out=wD)
        half.add_((m - 0.5).mul_(qD).sum(1), alpha=theta)
        quad.sub_(qD.mul_(D).sum(1), alpha=theta)
    return torch.where(quad > 0, (half / quad).clamp_(0, 1), quad < 2 * half)


def conjugate_step(
    Z: Tensor,
    R: Tensor,
    P: Tensor,
    U: Tensor,
    rz: Tensor,
    enough: Tensor,
    inverse: Tensor,
    *,
    mask: Tensor | None = None,
    first: bool = False,
    last: bool = False,
) -> None:
    """Make a step of conjugate gradients in every row, except for the product, in place, in blocks of rows."""
    for rows in row_blocks(Z):
        r, p = R[rows], P[rows].float()
        if not first:
            u, before = U[rows], rz[rows]
            a = ratio(before, (p * u).sum(1)).masked_fill_(before <= enough[rows], 0)[:, None]
            Z[rows].addcmul_(p, a)
            r.addcmul_(u, -a)
        if last:
            continue
        r = r if mask is None else masked(r, mask[rows])
        z = r * inverse
        now = (r * z).sum(1)
        if first:
            p.copy_(z)
            enough[rows] = CONVERGED * now
        else:
            p.mul_(ratio(now, before)[:, None]).add_(z)
        if p.dtype != P.dtype:
            P[rows] = p
        rz[rows] = now


def adam_step(
    W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float, step: int
) -> None:
    """Make a step of Adam for the entries of W at `index`."""
    # `adam` takes the number of finished steps, and adds 1 to it.
    done = torch.full((), step - 1.0, dtype=torch.float32, device=W.device)
    g = gradient.index_select(0, index).to(weight.dtype)
    adam(
        [weight], [g], [m], [v], [], [done], fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
        beta1=DECAYS[0], beta2=DECAYS[1], lr=rate, eps=ADAM_EPSILON,
    )  # fmt: skip
    W.index_copy_(0, index.long(), weight.to(W.dtype))


def take_rows(X: Tensor, Y: Tensor, taken: Tensor) -> None:
    """Set X[taken] = Y[taken]."""
    if X.device.type != "cpu":
        # Indexing by a bool tensor would make the host wait for the GPU to count the rows.
        X.copy_(torch.where(taken[:, None], Y, X))
        return
    rows = torch.from_numpy(np.flatnonzero(taken.numpy()))
    X.index_copy_(0, rows, Y[rows])


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`, and yield after each run, as in `repeat.py`. `like` is ignored."""
    for row in numbers:
        step(*row)
        yield


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide. The result is 0 where the denominator is not positive, since such a row has converged."""
    return torch.where(denominator > 0, numerator / denominator, 0)
