"""Saliencies against their definitions."""

import torch

from sparsefw.solver.saliency import SALIENCIES


def test_definitions():
    W = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    diag = torch.tensor([4.0, 9.0])
    assert torch.equal(SALIENCIES["magnitude"](W, diag), torch.tensor([[1.0, 2], [3, 4]]))
    assert torch.equal(SALIENCIES["wanda"](W, diag), torch.tensor([[2.0, 6], [6, 12]]))
    relative = torch.tensor([[1 / 3 + 1 / 4, 2 / 3 + 2 / 6], [3 / 7 + 3 / 4, 4 / 7 + 4 / 6]])
    torch.testing.assert_close(SALIENCIES["ria"](W, diag), relative * torch.tensor([2.0, 3.0]).sqrt())


def test_rows_and_columns_of_zeros_stay_zero():
    W = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    for saliency in SALIENCIES.values():
        S = saliency(W.bfloat16(), torch.tensor([0.0, 9.0]))
        assert S.dtype == torch.float32
        assert (S > 0).tolist() == [[False, False], [False, True]]
