"""Tiny models that read something else than text, and batches for them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsefw import PruneResult, prune
from sparsefw.data.batches import BATCHES
from sparsefw.selection import without_index

VOCABULARY, WIDTH = 99, 32
_SIZES = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_CODER = dict(
    d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip


def random_ids(*shape: int) -> Tensor:
    """Tokens that are no special ones."""
    return torch.randint(3, VOCABULARY, shape)


class DiffusionBlock(nn.Module):
    """A block of a diffusion transformer: what it does depends on the time, and it is given that by name."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        """Attention and an MLP, scaled and shifted."""
        shift, scale, gate = self.modulation(nn.functional.silu(time))[:, None].chunk(3, dim=-1)
        q, k, v = self.qkv(self.norm(hidden_states) * (1 + scale) + shift).chunk(3, dim=-1)
        hidden_states = hidden_states + gate * self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return hidden_states + self.mlp(self.norm(hidden_states))


class TwoStreamBlock(nn.Module):
    """A block that is given two streams by name, and returns them in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.read_text, self.write_text = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Each stream reads the mean of the other one."""
        image = self.read(hidden_states + encoder_hidden_states.mean(1, keepdim=True)).relu()
        text = self.read_text(encoder_hidden_states + hidden_states.mean(1, keepdim=True)).relu()
        return encoder_hidden_states + self.write_text(text), hidden_states + self.write(image)


class Diffusion(nn.Module):
    """A diffusion transformer with blocks of two kinds, one kind after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.text = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(8, WIDTH)
        self.doubles = nn.ModuleList(TwoStreamBlock() for _ in range(2))
        self.singles = nn.ModuleList(DiffusionBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The noise in a sample, and with the true noise the loss."""
        hidden, encoded, time = self.embed(noisy), self.text(text), self.time(time)
        for block in self.doubles:
            encoded, hidden = block(hidden_states=hidden, encoder_hidden_states=encoded)
        hidden = torch.cat([encoded, hidden], 1)
        for block in self.singles:
            hidden = block(hidden, time=time)
        predicted = self.head(hidden[:, encoded.shape[1] :])
        return {"predicted": predicted} | ({} if noise is None else {"loss": (predicted - noise).square().mean()})


class Halving(nn.Module):
    """Blocks that halve the number of positions and double their width, as towers for images do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(_Halve(8), _Halve(16))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of three classes, and the loss."""
        logits = self.head(self.stages(x).mean(1))
        return {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


class _Halve(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.merge = nn.Linear(2 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return self.merge(x.reshape(x.shape[0], x.shape[1] // 2, -1))


class Block(nn.Module):
    """An MLP that may be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Add what the MLP makes."""
        y = self.fc2(self.act(self.fc1(x)))
        return x + (y if scale is None else y * scale)


class Small(nn.Module):
    """Blocks that run in an order, each once unless it is given."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order or (0, 1)
        self.blocks = nn.ModuleList(Block() for _ in {*self.order})

    def forward(self, x: Tensor, target: Tensor | None = None, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The hidden states, and with a target the loss."""
        for n in self.order:
            x = self.blocks[n](x, scale=scale)
        return {"x": x} if target is None else {"loss": (x - target).square().mean()}


# A model, and a function that draws a batch.
Drawing = tuple[nn.Module, Callable[[], dict]]


def vit() -> Drawing:
    """A tower for images."""
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **_SIZES)
    model = transformers.ViTForImageClassification(config)
    return model, lambda: {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(0, 5, (2,))}


def bert() -> Drawing:
    """A model of masked tokens."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **_SIZES))
    mask = torch.ones(2, 12, dtype=torch.int64)
    return model, lambda: {"input_ids": random_ids(2, 12), "attention_mask": mask, "labels": random_ids(2, 12)}


def whisper() -> Drawing:
    """An encoder of sound and a decoder of text."""
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_CODER, **sizes))
    return model, lambda: {"input_features": torch.randn(2, 8, 20), "labels": random_ids(2, 7)}


def clip() -> Drawing:
    """Two towers side by side."""
    text = {"vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **_SIZES}
    vision = {"image_size": 16, "patch_size": 4, **_SIZES, "hidden_size": 24}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return model, lambda: {
        "input_ids": random_ids(2, 7), "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True
    }  # fmt: skip


def mixtral() -> Drawing:
    """A mixture of experts."""
    config = transformers.MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4, **_SIZES)
    return transformers.MixtralForCausalLM(config), lambda: dict.fromkeys(("input_ids", "labels"), random_ids(2, 12))


def diffusion() -> Drawing:
    """See `Diffusion`."""
    return Diffusion(), lambda: {
        "noisy": torch.randn(2, 6, 4), "time": torch.rand(2, 1), "text": torch.randn(2, 3, 8),
        "noise": torch.randn(2, 6, 4),
    }  # fmt: skip


def halving() -> Drawing:
    """See `Halving`."""
    return Halving(), lambda: {"x": torch.randn(2, 8, 8), "labels": torch.randint(0, 3, (2,))}


# By name: what makes a model and its batches. Both are drawn from torch's generator.
STACKS = {f.__name__: f for f in (vit, bert, whisper, clip, mixtral, diffusion, halving)}


def drawn(name: str, batches: int = 3) -> tuple[nn.Module, list[dict]]:
    """A model with random weights in evaluation mode, and batches."""
    torch.manual_seed(0)
    model, draw = STACKS[name]()
    return model.eval(), [draw() for _ in range(batches)]


def small(*order: int) -> Small:
    """See `Small`, with random weights."""
    torch.manual_seed(0)
    return Small(*order).eval()


def small_batches(*shapes: tuple[int, ...]) -> list[dict]:
    """Batches for `Small`, by default three that are alike."""
    shapes = shapes or ((2, 5),) * 3
    return [{"x": torch.randn(*shape, 8), "target": torch.randn(*shape, 8)} for shape in shapes]


# A run with few steps, and one without.
QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, recover=0, sparsity="0.5")
WANDA = dict(kernel="torch", method="wanda", sparsity="0.5")


def check_pruned(model: nn.Module, batches: list[dict], method: str = "sparsefw", **options: Any) -> PruneResult:
    """Prune a model in place; the report has to be of the model itself, and nothing else than its layers changes."""
    before, dense = weights_of(model), perplexity_of_whole(model, batches)
    options = (QUICK if method == "sparsefw" else WANDA) | {"method": method} | options
    result = prune(model, calibration=batches, evaluate=batches, **options)
    assert result.perplexity[BATCHES]["dense"] == pytest.approx(dense, rel=1e-5)
    assert result.perplexity[BATCHES][method] == pytest.approx(perplexity_of_whole(model, batches), rel=1e-5)
    layers, pruned = [layer.name for layer in result.report.layers_of(method)], weights_of(model)
    assert {name for name, x in pruned.items() if not torch.equal(x, before[name])} == {*map(without_index, layers)}
    for name in layers:
        W = pruned[without_index(name)]
        W = W if name in pruned else W[int(name.rpartition("[")[2][:-1])]
        assert ((W != 0).sum(1) <= W.shape[1] // 2).all()
    return result


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, by their names whatever is wrapped around the modules."""
    return {name.replace("_orig_mod.", ""): x.clone() for name, x in model.state_dict().items()}


@torch.no_grad()
def perplexity_of_whole(model: nn.Module, batches: list[dict]) -> float:
    """exp of the mean loss that a model returns."""
    return math.exp(sum(float(model(**batch)["loss"]) for batch in batches) / len(batches))
