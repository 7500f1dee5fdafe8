"""Calls without data give tensors of the forms that torch gives, also when they are made again."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsefw.model import parts
from sparsefw.model.parts import call_without_data


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    results = {}
    monkeypatch.setattr(parts, "_results", results)
    return results


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def forms(value):
    if isinstance(value, Tensor):
        return value.is_meta, value.shape, value.stride(), value.dtype
    return [forms(item) for item in value]


X, Y = torch.randn(2, 3, 8), torch.randn(3, 8).half()
SQUARE, PARTS = torch.zeros(2, 2), (slice(1, 2), slice(0, 1), slice(0, 2, 2))
HEADS = torch.randn(1, 2, 6, 4)
CALLS = [
    (Tensor.mul, (X, X), {}),
    (Tensor.add, (X, Y), {}),
    (Tensor.transpose, (X, 0, 2), {}),
    (Tensor.__getitem__, (X, (..., slice(None, 4))), {}),
    (Tensor.__getitem__, (X, (slice(None), torch.tensor([2, 0]))), {}),
    (torch.cat, ([X, X],), {"dim": -1}),
    (Tensor.split, (X, 3, -1), {}),
    (Tensor.max, (X, 1), {}),
    (Tensor.float, (Y,), {}),
    (Tensor.to, (X,), {"dtype": torch.bfloat16}),
    (Tensor.to, (X, torch.device("cpu"), torch.float16), {}),
    (functional.linear, (X, nn.Parameter(torch.randn(5, 8)), None), {}),
    (functional.scaled_dot_product_attention, (HEADS, HEADS, HEADS), {"is_causal": True, "dropout_p": 0.0}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_forms_are_those_of_a_call(call, forgotten):
    func, args, kwargs = call
    expected = forms(func(*args, **kwargs))
    results = [call_without_data(func, args, kwargs)[0] for _ in range(2)]
    found = [forms(result) for result in results]
    assert found[0] == found[1]
    assert found[0] == _on_meta(expected)
    assert len(forgotten) == 1
    assert results[0] is not results[1]


def _on_meta(form):
    return (True, *form[1:]) if isinstance(form, tuple) else [_on_meta(item) for item in form]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((Tensor.mul, torch.tensor([2]), 1), (Tensor.mul, torch.tensor([2]), 1.0)),
        ((Tensor.mul, torch.tensor([True]), 1), (Tensor.mul, torch.tensor([True]), True)),
        ((torch.relu, SQUARE), (torch.relu, SQUARE.T)),
        ((torch.relu, X), (torch.relu, X.double())),
        ((Tensor.sum, X, 0), (Tensor.sum, X, 1)),
        ((Tensor.amax, X, 0), (Tensor.argmax, X, 0)),
        *[((Tensor.__getitem__, X, slice(0, 2)), (Tensor.__getitem__, X, part)) for part in PARTS],
    ],
)
def test_what_differs_is_told_apart(first, second):
    found = [forms(call_without_data(func, args, {})[0]) for func, *args in (first, second)]
    assert found == [_on_meta(forms(func(*args))) for func, *args in (first, second)]
    assert found[0] != found[1]


def test_tensors_that_are_written_to_are_told_every_time(forgotten):
    def add_twice(x, y):
        return x.add_(y) + y

    x, y = torch.zeros(3), torch.ones(3)
    for _ in range(2):
        out, written = call_without_data(add_twice, (x, y), {})
        assert out.shape == (3,)
        assert [id(tensor) for tensor in written] == [id(x)]
    assert not forgotten
    assert x.tolist() == [0, 0, 0]


def test_few_results_are_remembered(monkeypatch, forgotten):
    monkeypatch.setattr(parts, "MOST_RESULTS", 3)
    for size in range(1, 9):
        assert call_without_data(torch.relu, (torch.zeros(size),), {})[0].shape == (size,)
        assert len(forgotten) <= 3
