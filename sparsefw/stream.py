"""A causal language model whose blocks run one at a time.

The model's own class stands there whole at no cost in memory: `from_pretrained` on CPU maps the safetensors files and
reads nothing until it is used. Its own forward tells what every block receives (masks, rotary tables, per-layer
windows), so no architecture is named here: the blocks are tapped, and later run one by one with what was recorded.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from sparsefw.checkpoint import Checkpoint, check_finite
from sparsefw.errors import InputError, first_line

# What loading a checkpoint whose config or tensors do not fit can raise.
_LOADING = (
    ValueError,
    RuntimeError,
    OSError,
    KeyError,
    AttributeError,
    TypeError,
    ImportError,
    IndexError,
    StrictDataclassError,
)


class _Stop(Exception):
    """Ends the model's forward once the last block's arguments are known."""


@dataclass
class Stream:
    """Micro-batches on their way through the blocks.

    Attributes:
        hidden: per micro-batch, the input of the next block, (batch, seqlen, d) on the host.
        calls: per micro-batch and block, its other arguments (args, kwargs); equal tensors are stored once.
    """

    hidden: list[Tensor]
    calls: list[list[tuple]]

    def fork(self) -> "Stream":
        """Another stream at the same point; the two then run apart."""
        return Stream(list(self.hidden), self.calls)


class StreamedModel:
    """A checkpoint's model: embeddings, final norm and head on `device`, blocks there only while they are used.

    Args:
        checkpoint: as `sparsefw.checkpoint.inspect` found it.
        device: where everything runs.

    Attributes:
        blocks: the decoder blocks, in order.
        names: their names in the model, e.g. "model.layers.0".
        max_seqlen: longest window the model takes, or None where it says none.
        notes: one line each about what the user should know of the loading.

    Raises:
        InputError: transformers cannot load it, tensors are missing or do not fit, or no stack of blocks is found.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.device = device
        self.notes: list[str] = []
        self.model = model = self._load(checkpoint)
        self.max_seqlen: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.blocks = _find_blocks(model, checkpoint.folder)
        stack = next(name for name, module in model.named_modules() if module is self.blocks)
        self.names = [f"{stack}.{i}" for i in range(len(self.blocks))]
        inside = {id(t) for t in itertools.chain(self.blocks.parameters(), self.blocks.buffers())}
        for name, parameter in model.named_parameters():
            if id(parameter) not in inside:
                check_finite(name, parameter)
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
        self._returns_tuple: bool | None = None

    def _load(self, checkpoint: Checkpoint) -> nn.Module:
        safe = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, **safe)
            # Some versions of the fused attention leave a cap on attention logits out without a word.
            capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=checkpoint.dtype,
                attn_implementation="eager" if capped else None,
                # One product per expert, where its inputs can be seen.
                experts_implementation="eager",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **safe,
            )
        except _LOADING as error:
            raise InputError(
                f"{checkpoint.folder}: transformers cannot load this model: {first_line(error)}"
            ) from error
        if wrong := sorted(info["mismatched_keys"]):
            name, found, expected = wrong[0]
            raise InputError(f"{name}: the checkpoint has shape {tuple(found)}, the config asks for {tuple(expected)}")
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{missing[0]}: this tensor is missing from the checkpoint ({len(missing)} in all)")
        if unused := sorted(info["unexpected_keys"]):
            self.notes.append(f"not part of the model, not written: {', '.join(unused)}")
        other = sorted(n for n, t in checkpoint.tensors.items() if t.dtype.is_floating_point and t.dtype != model.dtype)
        if other:
            self.notes.append(
                f"read and written as {model.dtype}: {len(other)} tensors of another dtype, {other[0]} first"
            )
        return model.eval().requires_grad_(False)

    def _run(self, ids: Tensor, tap: Any, **kwargs: Any) -> Any:
        """The model's own forward, with every block replaced by tap(block index, hidden, args, kwargs)."""
        for i, block in enumerate(self.blocks):
            block.forward = lambda h, *a, _i=i, **k: tap(_i, h, a, k)
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False, **kwargs)
        except _Stop:
            return None
        finally:
            for block in self.blocks:
                del block.forward

    def _as_block_output(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden

    @torch.no_grad()
    def start(self, ids: Tensor, batch_size: int) -> Stream:
        """Embed windows of tokens and record what the model passes to every block.

        Args:
            ids: (windows, seqlen) tokens.
            batch_size: windows per micro-batch.

        Raises:
            InputError: a token that the model has no embedding for.
        """
        known = self.model.get_input_embeddings().weight.shape[0]
        if ids.max() >= known:
            raise InputError(f"the tokenizer gives token {ids.max()}, but the model embeds {known}: not its tokenizer")
        stream = Stream([], [])

        def tap(i: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
            if self._returns_tuple is None:
                # A tensor or a tuple: annotations do not tell, so a real block is asked once.
                block = self.blocks[0].to(self.device)
                self._returns_tuple = isinstance(type(block).forward(block, hidden, *args, **kwargs), tuple)
            if i == 0:
                stream.hidden.append(hidden.cpu())
                stream.calls.append([])
            first = stream.calls[0][i] if len(stream.calls) > 1 else None
            stream.calls[-1].append(_shared((args, kwargs), first))
            if i == len(self.blocks) - 1:
                raise _Stop
            return self._as_block_output(hidden)

        for batch in ids.split(batch_size):
            self._run(batch, tap)
        return stream

    def open(self, i: int) -> nn.Module:
        """Block i on the device, its parameters checked for NaN and Inf."""
        block = self.blocks[i]
        for name, parameter in block.named_parameters():
            check_finite(f"{self.names[i]}.{name}", parameter)
        return block.to(self.device)

    @torch.no_grad()
    def output(self, i: int, stream: Stream, j: int, block: nn.Module | None = None) -> Tensor:
        """Micro-batch j of a stream after block i, or after another module in its place; (batch, seqlen, d)."""
        args, kwargs = stream.calls[j][i]
        out = (block or self.blocks[i])(stream.hidden[j].to(self.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(
        self, i: int, stream: Stream, batches: Iterable[int] | None = None, block: nn.Module | None = None
    ) -> None:
        """Run a stream through block i: its output is the next block's input.

        Args:
            i: the block.
            stream: moves on.
            batches: only these micro-batches of it; None: all.
            block: another module in the block's place.

        Raises:
            InputError: the output holds NaN or Inf.
        """
        for j in range(len(stream.hidden)) if batches is None else batches:
            out = self.output(i, stream, j, block)
            check_finite(f"activations after {self.names[i]}", out)
            stream.hidden[j] = out.cpu()

    @torch.no_grad()
    def loss(self, ids: Tensor, hidden: Tensor) -> float:
        """Mean negative log-likelihood per predicted token, through the model's own final norm, head and caps.

        Args:
            ids: (batch, seqlen) tokens; all but the first of each window are predicted.
            hidden: (batch, seqlen, d), the last block's output.
        """
        logits = self.logits(ids, hidden)[:, :-1].float()
        targets = ids[:, 1:].to(self.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(batch, seqlen, vocabulary), from the last block's output."""
        last = len(self.blocks) - 1
        hidden = hidden.to(self.device)
        return self._run(ids, lambda i, x, a, k: self._as_block_output(hidden if i == last else x)).logits

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """Block i's tensors under the checkpoint's names, on the host."""
        return self._exported({f"{self.names[i]}.{name}": t for name, t in self.blocks[i].state_dict().items()})

    def other_tensors(self) -> dict[str, Tensor]:
        """All tensors outside the blocks (embeddings, norms, head); of tied ones only the first."""
        stack = self.names[0].rpartition(".")[0] + "."
        tied = self.model.all_tied_weights_keys
        state = self.model.state_dict()
        return self._exported({name: t for name, t in state.items() if not name.startswith(stack) and name not in tied})

    def _exported(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # transformers renames and stacks tensors when it loads some architectures: this is the way back.
        return {k: v.cpu().contiguous() for k, v in revert_weight_conversion(self.model, tensors).items()}

    def close(self, i: int) -> None:
        """Drop block i; it cannot be used again."""
        self.blocks[i].to("meta")


def _find_blocks(model: nn.Module, folder: Path) -> nn.ModuleList:
    """The one list of num_hidden_layers modules in the decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks if other != n)}
    if len(outer) != 1:
        found = f"{len(outer)} of them ({', '.join(outer)}) were found" if outer else "none was found"
        raise InputError(
            f"{folder}: unsupported model {type(model).__name__}: "
            f"one list of {depth} decoder blocks (num_hidden_layers) is needed, {found}"
        )
    return next(iter(outer.values()))


def _shared(new: Any, old: Any) -> Any:
    """`new`, with tensors that equal those of the first micro-batch, `old`, replaced by them."""
    if torch.is_tensor(new):
        same = torch.is_tensor(old) and old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if same else new
    if isinstance(new, tuple | list):
        alike = isinstance(old, tuple | list) and len(old) == len(new)
        return type(new)(_shared(x, old[n] if alike else None) for n, x in enumerate(new))
    if isinstance(new, dict):
        return {k: _shared(v, old.get(k) if isinstance(old, dict) else None) for k, v in new.items()}
    return new
