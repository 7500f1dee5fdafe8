"""Settings of transformers and torch: a forward returns only what a run needs, and each matrix product is a torch call.

A torch function mode (`tape.Calls`) then sees every product with a matrix.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sparsefw.errors import InputError


@contextmanager
def attention_by_calls() -> Iterator[None]:
    """Let `nn.MultiheadAttention` show its matrix products to torch function modes inside the `with` block.

    By default a torch function mode sees a single call: a fused function, or a Python function as a whole.
    """
    fast, whole = torch.backends.mha.get_fastpath_enabled(), functional.multi_head_attention_forward
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.multi_head_attention_forward = _not_dispatched(whole)
        yield
    finally:
        functional.multi_head_attention_forward = whole
        torch.backends.mha.set_fastpath_enabled(fast)


def _not_dispatched(function: Any) -> Any:
    """Copy a Python function so that a torch function mode sees the calls inside, and not the function itself."""
    names = function.__globals__ | {"has_torch_function": lambda operands: False}
    same = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def one_by_one(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run transformers' experts one at a time, with a single wait for the GPU.

    The products are those of transformers' own loop ("eager"), in the same order, and give the same bits. But that loop
    waits for the GPU five times for each expert. Here the tokens are sorted by expert first.

    Args:
        experts: a module of experts whose class has transformers' decorator `use_experts_implementation`.
        hidden_states: (tokens, d).
        top_k_index: (tokens, k) numbers of each token's experts.
        top_k_weights: (tokens, k) factors for the outputs of these experts.
    """
    out, count = torch.zeros_like(hidden_states), len(top_k_index)
    with torch.no_grad():
        chosen = top_k_index.T.flatten()
        order = chosen.argsort(stable=True)
        numbers = torch.arange(experts.num_experts + 1, device=chosen.device)
        bounds = torch.searchsorted(chosen[order], numbers).tolist()
        # For each pair of a token and one of its experts: the column in `top_k_index`, and the token. The pairs are
        # sorted by expert, and within an expert as in transformers' loop.
        places, tokens = order.div(max(1, count), rounding_mode="floor"), order % max(1, count)

    def product(x: Tensor, name: str, n: int) -> Tensor:
        weight, bias = getattr(experts, name)[n], getattr(experts, f"{name}_bias")[n] if experts.has_bias else None
        if not experts.is_transposed:
            return functional.linear(x, weight, bias)
        return x @ weight if bias is None else x @ weight + bias

    for n, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            place, token = places[begin:end], tokens[begin:end]
            if experts.has_gate:
                x = experts._apply_gate(product(hidden_states[token], "gate_up_proj", n))
            else:
                x = experts.act_fn(product(hidden_states[token], "up_proj", n))
            x = product(x, "down_proj", n)
            if getattr(experts, "has_post_expert_norm", False):
                x = experts.post_expert_norm(x)
            x = x * top_k_weights[token, place, None]
            out.index_add_(0, token, x.to(out.dtype))
    return out


ONE_BY_ONE = "sparsefw_one_by_one"
ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)


@contextmanager
def masks_kept() -> Iterator[None]:
    """Let transformers give a block a mask whenever the batch has a mask, or the block has an attention window.

    This holds inside the `with` block. By default transformers drops a mask that hides nothing. So a block would run
    differently for a batch without padding, or for a batch that is shorter than the attention window.
    """
    # transformers asks these functions whether to drop a mask.
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    before = {name: getattr(masking_utils, name) for name in names}
    try:
        vars(masking_utils).update({name: partial(_ignores_mask, ignores) for name, ignores in before.items()})
        yield
    finally:
        vars(masking_utils).update(before)


def _ignores_mask(ignores: Callable[..., bool], mask: Tensor | None, *sizes: Any) -> bool:
    # The last of the sizes is the attention window.
    return mask is None and sizes[-1] is None and ignores(mask, *sizes)


# Entries of a config, and their values in a run. A forward returns no optional outputs, and has no cache of keys and
# values. Mixtures of experts multiply with one expert at a time, so that each expert's input is a tensor.
_ENTRIES: dict[str, Any] = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
_ENTRIES |= {"return_dict": True, "use_cache": False, "_experts_implementation_internal": ONE_BY_ONE}


def ask_for_no_more(config: Any) -> None:
    """Change a config and its sub-configs so that a forward returns only what a run needs."""
    _ask(config)
    for name in getattr(config, "sub_configs", ()):
        ask_for_no_more(getattr(config, name, None))


def _ask(config: Any) -> None:
    for name, value in _ENTRIES.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


@contextmanager
def asked_for_no_more(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put a model in memory into evaluation mode, with the config entries of a run, inside the `with` block.

    Its functions are torch's own, without kernels of the Hub.

    Yields a function that undoes this before the end of the block, so that a model is written with its own config.

    Raises:
        InputError: the model has kernels of the Hub, and this transformers cannot take them out.
    """
    # By id, since modules may share a config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, name, getattr(config, name, None)) for config in configs for name in _ENTRIES]
    before += [(module, "training", module.training) for module in model.modules()]
    # transformers 5.25 puts kernels of the Hub into a model on a GPU, some of them for inference only. Older versions
    # do so if asked, and cannot take them out.
    kernelized: list[Any] = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.use_kernels]
    before += [(module, "use_kernels", True) for module in kernelized]
    if any(not hasattr(module, "reset_kernels") for module in kernelized):
        raise InputError("model: its kernels of the Hub may have no gradients; load it without use_kernels")

    def set_back() -> None:
        for owner, name, value in before:
            if value is not None and getattr(owner, name) != value:
                setattr(owner, name, value)

    try:
        for module in kernelized:
            module.reset_kernels()
        model.eval()
        for config in configs:
            _ask(config)
        yield set_back
    finally:
        set_back()
