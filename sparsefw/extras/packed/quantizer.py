"""Packed checkpoints in transformers: `AutoModelForCausalLM.from_pretrained("packed/")` once sparsefw is imported.

Linear layers hold the packed tensors and multiply with them, experts are unpacked one at a time when they are used.
`quantization_config=PackedConfig(dequantize=True)` gives the dense model. transformers calls this a quantizer, and its
interface is that of 5.17 to 5.24.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsefw.checkpoint.packed import FORMAT, MASK, check, form_of, kernels_for, starts_of, unpack
from sparsefw.checkpoint.quantization import GUARD
from sparsefw.errors import InputError
from sparsefw.solver import patterns

METHOD = "sparsefw"


class PackedConfig(QuantizationConfigMixin):
    """How a checkpoint is packed: the entry `quantization_config` of its config.json.

    Args:
        parameters: names of the packed parameters, where `*` stands for any number.
        sparsity: the sparsity pattern, "0.6" or "2:4".
        budget: "row", or "layer": each matrix has one budget.
        kept: fraction of the weights that are kept.
        format: version of the layout.
        dequantize: whether the model is loaded with its zeros.
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
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum there, of its own methods
        self.parameters, self.sparsity, self.budget, self.kept = parameters or [], sparsity, budget, kept
        self.format, self.dequantize = format, dequantize

    def get_loading_attributes(self) -> dict[str, Any]:
        """The part that the argument of `from_pretrained` decides, and not the checkpoint."""
        return {"dequantize": self.dequantize}

    def has(self, name: str) -> bool:
        """Whether a parameter is packed. In another class of the same model its name may begin later."""
        names = (name, form_of(name))
        return any(f".{p}".endswith(f".{own}") or f".{own}".endswith(f".{p}") for p in self.parameters for own in names)

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the values of a packed parameter (..., rows, cols)."""
        *lead, rows, cols = shape
        pattern = patterns.parse(self.sparsity)
        width, most = patterns.budget(pattern, rows, cols, self.budget == "row")
        return (rows * cols // width * most,) if self.budget == "layer" else (*lead, rows, cols // width * most)


class PackedLinear(nn.Linear):
    """A linear layer whose `weight` are the kept values, beside `weight_mask`, see `checkpoint.packed`."""

    weight_mask: Tensor
    starts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, unpack(self.weight, self.weight_mask).to(x.dtype), self.bias)
        if self.weight.dim() == 1 and (self.starts is None or self.starts.device != self.weight.device):
            self.starts = starts_of(self.weight_mask)
        packed_product = kernels_for(x, self.weight).packed_product
        y = packed_product(x.reshape(-1, x.shape[-1]).contiguous(), self.weight, self.weight_mask, self.starts)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PackedStack:
    """A stacked parameter of a module whose tensors are packed: `stack[i]` is its i-th matrix, with its zeros."""

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self._values, self._mask = values, mask
        self.device, self.dtype = values.device, values.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return unpack(self._values[index], self._mask[index])


class PackedQuantizer(HfQuantizer):
    """Puts packed tensors into a model's modules."""

    quantization_config: PackedConfig
    # Converters of names and stacks take masks as they take weights.
    serialized_names = {"weight": ["weight", f"weight{MASK}"]}  # noqa: RUF012  # as its base class has it

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse later formats."""
        if self.quantization_config.format != FORMAT:
            raise InputError(f"the checkpoint is packed in format {self.quantization_config.format}: update sparsefw")

    def update_attn_implementation(self, config: Any) -> Any:
        """The config without the entry that keeps other loaders out, and with experts that are used one at a time."""
        config.__dict__.pop(GUARD, None)
        config._experts_implementation = "eager"
        return config

    # Which is called here before 5.22.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config, found = self.quantization_config, 0
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not config.has(f"{path}.{name}"):
                    continue
                found += 1
                shape, mask = config.shape(parameter.shape), (*parameter.shape[:-1], parameter.shape[-1] // 8)
                values = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))
                bits = torch.empty(mask, dtype=torch.uint8, device=parameter.device)
                module.register_parameter(name + MASK, nn.Parameter(bits, requires_grad=False))
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
                elif isinstance(module, nn.Linear) or parameter.dim() < 3:
                    raise InputError(f"{path}.{name}: packed, and no linear layer; sparsefw unpack makes it dense")
        if not found:
            raise InputError("the checkpoint is packed, and the model has none of its packed matrices")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for path, module in model.named_modules():
            for name, (values, mask) in _packed_in(module).items():
                # The hooks of accelerate read what is on the disk still.
                if not mask.is_meta:
                    check(f"{path}.{name}", values, mask)
                if not isinstance(module, PackedLinear):
                    # A module's own entries come before its parameters.
                    module.__dict__[name] = PackedStack(values, mask)
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: nn.Module, dtype: object = None) -> nn.Module:
        for module in model.modules():
            for name, (values, mask) in _packed_in(module).items():
                module._parameters[name] = nn.Parameter(unpack(values, mask))
                del module._parameters[name + MASK]
                module.__dict__.pop(name, None)
            if isinstance(module, PackedLinear):
                module.__class__ = nn.Linear  # type: ignore[assignment]  # of which it is a subclass
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes a packed checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Kept weights have no gradients."""
        return False


def _packed_in(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and mask of the packed parameters of a module, by name."""
    own = dict(module.named_parameters(recurse=False))
    return {name: (own[name], own[name + MASK]) for name in own if name + MASK in own}
