"""Load packed checkpoints in transformers, as one of its quantizers; `sparsefw.packed` registers it.

Linear layers hold packed tensors and multiply with them. An expert is unpacked when it is used.
`quantization_config=PackedConfig(dequantize=True)` gives the dense model. This needs the quantizer interface of
transformers 5.17 to 5.24.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsefw.checkpoint.packed import FORMAT, MASK, check, kernels_for, starts_of, unpack
from sparsefw.checkpoint.quantization import GUARD
from sparsefw.errors import InputError
from sparsefw.model.skeleton import with_masks
from sparsefw.solver import patterns

METHOD = "sparsefw"


def form_of(name: str) -> str:
    """Return the name of a parameter with `*` in place of numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


class PackedConfig(QuantizationConfigMixin):
    """How a checkpoint is packed: the entry `quantization_config` of its config.json.

    Args:
        parameters: names of the packed parameters, in which `*` stands for any number.
        sparsity: the sparsity pattern, "0.6" or "2:4".
        budget: "row" or "layer": whether each row or each matrix has a budget.
        kept: fraction of the weights that are kept.
        format: version of the layout.
        dequantize: whether to load the model dense, with its zeros.
    """

    def __init__(
        self,
        parameters: list[str] | None = None,
        sparsity: str = "",
        budget: str = "row",
        kept: float = 0.0,
        format: int = FORMAT,
        dequantize: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum has only its own methods
        self.parameters, self.sparsity, self.budget, self.kept = parameters or [], sparsity, budget, kept
        self.format, self.dequantize = format, dequantize

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings that `from_pretrained` takes from its argument and not from the checkpoint."""
        return {"dequantize": self.dequantize}

    def has(self, name: str) -> bool:
        """Tell whether a parameter is packed. A prefix of the name is ignored: classes of one model differ in it."""
        return any(
            f".{p}".endswith(f".{own}") or f".{own}".endswith(f".{p}")
            for p in self.parameters
            for own in (name, form_of(name))
        )

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of a parameter's kept values. The parameter has shape (..., rows, cols)."""
        *lead, rows, cols = shape
        pattern = patterns.parse(self.sparsity)
        width, most = patterns.budget(pattern, rows, cols, self.budget == "row")
        return (rows * cols // width * most,) if self.budget == "layer" else (*lead, rows, cols // width * most)


class PackedLinear(nn.Linear):
    """A linear layer whose `weight` holds the kept values, and `weight_mask` their places, see `checkpoint.packed`."""

    weight_mask: Tensor
    starts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, unpack(self.weight, self.weight_mask).to(x.dtype), self.bias)
        if self.weight.dim() == 1 and (self.starts is None or self.starts.device != self.weight.device):
            self.starts = starts_of(self.weight_mask)
        packed_product = kernels_for(x, self.weight).packed_product
        y = packed_product(x.reshape(-1, x.shape[-1]).contiguous(), self.weight, self.weight_mask, self.starts)
        y = y.view(x.shape[:-1] + y.shape[1:])
        return y if self.bias is None else y + self.bias


class PackedStack:
    """A packed parameter of several matrices, such as experts: `stack[i]` unpacks the i-th matrix.

    All else is that of the kept values. They are found in the module at each use, since accelerate exchanges them.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __getitem__(self, index: Any) -> Tensor:
        values, mask = _packed_in(self.module)[self.name]
        return unpack(values[index], mask[index])

    def __getattr__(self, name: str) -> Any:
        # A copy of a model looks for methods of copying.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module._parameters[self.name], name)


def holds(module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a module can hold a packed parameter: plain linear layers, and experts that are used one by one."""
    # transformers gives this method to classes of experts that have a loop over them.
    return type(module) is nn.Linear or (parameter.dim() == 3 and hasattr(module, "_apply_gate"))


class PackedQuantizer(HfQuantizer):
    """Replaces parameters of a model by packed tensors, before transformers loads them."""

    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint in another format."""
        if self.quantization_config.format != FORMAT:
            raise InputError(f"the checkpoint is packed in format {self.quantization_config.format}: update sparsefw")

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the config's entry that stops other loaders, and choose the code that uses one expert at a time."""
        config.__dict__.pop(GUARD, None)
        config._experts_implementation = "eager"
        return config

    # Before 5.22 transformers calls this method instead.
    update_tp_plan = update_attn_implementation

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Rename and stack masks as their weights."""
        return with_masks(weight_conversions, MASK)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config, found = self.quantization_config, 0
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not config.has(f"{path}.{name}"):
                    continue
                found += 1
                values = parameter.new_empty(config.shape(parameter.shape))
                bits = parameter.new_empty((*parameter.shape[:-1], parameter.shape[-1] // 8), dtype=torch.uint8)
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))
                module.register_parameter(name + MASK, nn.Parameter(bits, requires_grad=False))
                if not holds(module, parameter):
                    raise InputError(
                        f"{path}.{name}: packed, but not a linear layer; unpack the folder: python -m sparsefw.unpack"
                    )
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
        if not found:
            raise InputError(
                "the model has no matrix of this packed checkpoint; load it with the class that was packed"
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for path, module in model.named_modules():
            for name, (values, mask) in _packed_in(module).items():
                # A mask on the meta device is offloaded to the disk, and accelerate reads it later.
                if not mask.is_meta:
                    check(f"{path}.{name}", values, mask)
                if not isinstance(module, PackedLinear):
                    # An entry of __dict__ takes precedence over a parameter of the same name.
                    module.__dict__[name] = PackedStack(module, name)
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: nn.Module, dtype: object = None) -> nn.Module:
        for module in model.modules():
            for name, (values, mask) in _packed_in(module).items():
                module._parameters[name] = nn.Parameter(unpack(values, mask))
                del module._parameters[name + MASK]
                module.__dict__.pop(name, None)
            if isinstance(module, PackedLinear):
                module.__class__ = nn.Linear  # type: ignore[assignment]  # its base class
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Tell that `save_pretrained` can write the model. It writes a packed checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that the model cannot be trained, since kept weights get no gradients."""
        return False


def _packed_in(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the kept values and the mask of each packed parameter of a module, by name."""
    own = dict(module.named_parameters(recurse=False))
    return {name: (own[name], own[name + MASK]) for name in own if name + MASK in own}
