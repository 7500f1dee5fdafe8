"""SparseFWModifier: Frank-Wolfe masks in a recipe of llm-compressor.

Importing this module registers the name for recipes in YAML. The module uses only the solver of this package:
llm-compressor reads the texts, makes the windows, chooses the order of the layers and writes the files.
"""

from dataclasses import dataclass
from typing import Any

try:
    from llmcompressor.core import Event, LifecycleCallbacks, State
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install -e '.[llmcompressor]' brings it", name=error.name) from error
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    match_targets,
    patch_attr,
    update_offload_parameter,
)
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.utils.metric_logging import CompressionLogger
from loguru import logger
from pydantic import model_validator
from torch import Tensor, device, float32, nn

from sparsefw.errors import InputError
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import solve_layer

# Fields of the modifier that are passed to `PruneConfig`.
SETTINGS = ("preset", "warm_start", "steps", "penalty", "swaps", "refit", "rounds", "damp", "kernel", "precision")


@dataclass
class Calibrated:
    """A layer's config, the lower triangle of its Gram matrix, and the number of tokens added to the matrix."""

    config: PruneConfig
    gram: Tensor
    tokens: int = 0


class SparseFWModifier(SparsityModifierBase):
    """Choose masks of linear layers by Frank-Wolfe, and refit the kept weights. Replaces SparseGPTModifier.

    Each layer approximates its own dense output on its own inputs, as in a run with `--target layer` and
    without reconstruction and recovery.
    llm-compressor's other pruning modifiers describe the fields that are missing here.

    Args:
        sparsity: fraction of every row that is removed; 0 leaves a layer dense. A list has a fraction for each of
            `targets`. None: `mask_structure` fixes the fraction.
        mask_structure: "n:m": n of every m consecutive weights are removed, as llm-compressor counts them.
        ignore: names or classes of layers that stay dense. The default is the head, which may share the embedding.
        preserve_sparsity_mask: whether weights that are zero stay zero.
        offload_hessians: whether Gram matrices are on the host between two batches.
        preset, warm_start, steps, penalty, swaps, refit, rounds, damp, kernel, precision: see `PruneConfig`; None: the
            preset's value, or for `kernel` the default on the layer's device.
        dampening_frac, block_size: for recipes of SparseGPTModifier. The first is `damp`; the second has no
            effect, since all columns of a layer are chosen together.
    """

    sparsity: float | list[float] | None = None
    ignore: list[str] = ["re:.*lm_head"]  # noqa: RUF012
    preserve_sparsity_mask: bool = False
    offload_hessians: bool = False
    preset: str | None = None
    warm_start: str | None = None
    steps: int | None = None
    penalty: float | None = None
    swaps: int | None = None
    refit: int | None = None
    rounds: int | None = None
    damp: float | None = None
    kernel: str | None = None
    precision: str | None = None
    dampening_frac: float | None = None
    block_size: int | None = None

    # pydantic copies mutable defaults, such as this one, for every instance.
    _calibrated: dict[nn.Module, Calibrated] = {}  # noqa: RUF012

    @model_validator(mode="after")
    def check_settings(self) -> "SparseFWModifier":
        """Refuse wrong settings before the calibration. Layers get their configs only when it has begun."""
        if isinstance(self.targets, str):
            # The base class would read a string as a list of letters.
            self.targets = [self.targets]
        if None not in (self.damp, self.dampening_frac):
            raise InputError(f"dampening_frac={self.dampening_frac}: is damp, which is given, too; leave one out")
        self.damp = self.dampening_frac if self.damp is None else self.damp
        if self.block_size is not None:
            logger.info(f"block_size={self.block_size}: has no effect, since all columns are chosen together")
        n, m, sparsity = self._prune_n, self._prune_m, self.sparsity
        if sparsity is None and not n:
            raise InputError('sparsity: missing; give a fraction of the weights to remove, or mask_structure="2:4"')
        if n and (self.sparsity_profile or sparsity not in (None, n / m)):
            raise InputError(
                f"mask_structure={self.mask_structure!r}: fixes the sparsity; leave out sparsity and profile"
            )
        for one in filter(None, sparsity) if isinstance(sparsity, list) else [sparsity]:
            self._config(one, device("cpu"))
        return self

    def _config(self, sparsity: float | None, of: device) -> PruneConfig:
        """Make the config of a layer on a device."""
        n, m = self._prune_n, self._prune_m
        settings: dict[str, Any] = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        settings |= dict(keep_zeros=self.preserve_sparsity_mask, reconstruct=0)
        # PruneConfig's n:m counts kept weights, and the mask structure's n:m counts removed ones.
        return PruneConfig(f"{m - n}:{m}" if n else str(sparsity), **settings).on(of)

    def _get_activations(self, *args: Any) -> Any:
        # This forward fires calibration events before all modifiers are initialized: ignore these events.
        with patch_attr(LifecycleCallbacks, "event", lambda *_, **__: None):
            return super()._get_activations(*args)

    def _infer_owl_layer_sparsity(self, *args: Any) -> list[float]:
        """Return the profile's sparsity of each target's block as a list, which the base class expects."""
        average: Any = self.sparsity
        blocks = super()._infer_owl_layer_sparsity(*args)
        return [
            next((sparsity for block, sparsity in blocks.items() if f"{target}.".startswith(f"{block}.")), average)
            for target in self._target_layers
        ]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register hooks on the layers to prune."""
        super().on_calibration_start(state, event, **kwargs)
        for module, name in list(self._module_names.items()):
            # The base class appends a dot to the name of a layer that is a target, so that it matches no ignored name.
            self._module_names[module] = name.rstrip(".")
            dense = self._module_sparsities[module] == 0 and not self._prune_n
            if dense or match_targets(name.rstrip("."), module, self.ignore):
                del self._module_sparsities[module]
        if not self._module_sparsities:
            raise InputError(f"targets={self.targets}: no layer is left to prune; change targets, ignore or sparsity")

    def calibrate_module(self, module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        """Add a batch of a layer's inputs, (..., in), to its Gram matrix."""
        if module not in self._module_sparsities:
            return
        on = get_execution_device(module)
        X = args[0].detach().to(on).flatten(0, -2)
        if module not in self._calibrated:
            if not isinstance(module, nn.Linear):
                raise InputError(
                    f"{self._module_names[module]}: is a {type(module).__name__}, not a linear layer; add it to ignore"
                )
            config = self._config(self._module_sparsities[module], on)
            self._calibrated[module] = Calibrated(config, X.new_zeros(X.shape[1], X.shape[1], dtype=float32))
        layer = self._calibrated[module]
        layer.tokens += len(X)
        layer.gram = layer.config.backend.gram_accumulate(layer.gram.to(on), X)
        if self.offload_hessians:
            layer.gram = layer.gram.cpu()

    def compress_modules(self) -> None:
        """Prune the layers whose Gram matrices have been measured."""
        for module in list(self._calibrated):
            layer, name = self._calibrated.pop(module), self._module_names[module]
            del self._module_sparsities[module]
            if not layer.tokens:
                logger.warning(f"{name}: left dense: no calibration token reached this layer")
                continue
            with align_module_device(module), CompressionLogger(module) as log:
                weight: Any = module.weight
                config = layer.config.for_calibration(1, layer.tokens)
                G = config.backend.mirror_lower(layer.gram.to(weight.device))
                _, pruned, result = solve_layer(weight, G, config, name=name)
                log.set_results("SparseFW", result.error)
            logger.info(f"{name}: {result.relative_error:.1%} of the error of {result.warm_start}'s mask")
            update_offload_parameter(module, "weight", pruned)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Remove the hooks, and log a warning for each layer that the calibration never ran."""
        if not self.ended_:
            self.on_end(state, None)
        for module in self._module_sparsities:
            logger.warning(f"{self._module_names[module]}: left dense: the calibration did not run this layer")
        self._module_names, self._module_sparsities = {}, {}
        return True


ModifierFactory.register("SparseFWModifier", SparseFWModifier)
