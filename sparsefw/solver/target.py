"""Targets: the weights that would make up for what the layers before have become.

Earlier layers are pruned, so a layer reads X and puts out Y where the dense model puts out Y + D. Its own weight W
passes the difference on; its target makes up for it where the input allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

and pruning then approximates T instead of W: each layer repairs what the layers before it broke. What a layer puts out
includes the residual stream that it writes to.
"""

from types import ModuleType

from torch import Tensor

from sparsefw.solver.refit import descend


def target(W: Tensor, G: Tensor, B: Tensor, steps: int, *, precision: str = "ieee", ops: ModuleType) -> Tensor:
    """T, by conjugate gradients from W; (rows, d) fp32.

    Few steps on a damped G: directions in which the input hardly varies say little about D, and T stays at W there.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) fp32 Gram matrix, damped as it should be.
        B: (rows, d) fp32 cross matrix; used up.
        steps: each is one product.
        precision: of the products.
        ops: the operations, `sparsefw.kernels.cpu` or `sparsefw.kernels.triton_ops`.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, G, None, steps, precision=precision, ops=ops)
    return T
