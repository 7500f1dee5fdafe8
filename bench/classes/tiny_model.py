"""List the classes of transformers that generate text, and make a tiny random checkpoint of each."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from classes.tiny_config import TOKENS, parts_of, tiny_config

# The mappings of models that generate text, by a model's input. A class counts for the last one that has it.
MAPPINGS = {
    "text": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "audio": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
# With transformers' usual initialisation all logits would be nearly equal.
SCALE = 0.2


@dataclass(frozen=True)
class Case:
    """A class of transformers with one of its configs.

    Attributes:
        model_type: the config's name.
        class_name: the model's class.
        kind: "text", or its other input: the last of `MAPPINGS` that has it.
    """

    model_type: str
    class_name: str
    kind: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model_type} {self.class_name}"

    @property
    def row(self) -> dict[str, Any]:
        """The beginning of its row of the results."""
        return {"model_type": self.model_type, "class": self.class_name, "kind": self.kind}


def cases() -> Iterator[Case]:
    """Yield every class once for each of its configs."""
    kinds = {}
    for kind, mapping in MAPPINGS.items():
        kinds |= dict.fromkeys(getattr(modeling_auto, mapping, {}).items(), kind)
    for (model_type, class_name), kind in kinds.items():
        # AutoModelForCausalLM makes these of the text part of the config, which has a name of its own.
        if (f"{model_type}_text", class_name) not in kinds:
            yield Case(model_type, class_name, kind)


def build(case: Case) -> PreTrainedModel:
    """Make a tiny random model of a class, in fp32.

    Raises:
        Exception: of any type, where transformers cannot make one.
    """
    torch.manual_seed(0)
    model = getattr(transformers, case.class_name)(config_of(case)).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=SCALE)
    return model


def config_of(case: Case) -> PretrainedConfig:
    """Make the tiny config of a class: its own, or the part that it takes of a config with several parts."""
    wanted = getattr(transformers, case.class_name).config_class
    config = tiny_config(CONFIG_MAPPING[case.model_type])
    # A class may have two names, and the second a config of its own.
    return next((part for part in parts_of(config) if isinstance(part, wanted)), config)


def load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint in fp32 by the class that its config names; returns the model and the report of loading."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), report


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Compute the perplexity of all windows, each of which is one batch.

    Raises:
        Exception: of any type, where the class does not run on token ids alone.
    """
    total = 0.0
    for window in windows:
        # Some classes draw random numbers in their forward.
        torch.manual_seed(0)
        logits = model(input_ids=window[None], use_cache=False).logits
        if logits.shape[:2] != (1, len(window)) or logits.shape[2] < TOKENS:
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(window)} tokens")
        total += F.cross_entropy(logits[0, :-1].float(), window[1:]).item()
    mean = total / len(windows)
    if not math.isfinite(mean) or mean > 500:
        raise FloatingPointError(f"the mean negative log-likelihood is {mean}")
    return math.exp(mean)


def random_text(seed: int, words: int) -> str:
    """Write words of random characters, so that every expert gets tokens."""
    generator = random.Random(seed)
    return " ".join("".join(chr(generator.randrange(33, 127)) for _ in range(5)) for _ in range(words))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, after <s> and </s>."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
