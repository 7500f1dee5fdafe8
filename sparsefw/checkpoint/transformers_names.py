"""Undocumented names of transformers that the checks of a checkpoint need.

transformers may change these in any version. They were tested with 5.17 to 5.24. `model.transformers_private` holds
what models need of this kind. All imports are in functions: transformers is slow to import, and most checkpoints that
are refused are refused without it.
"""

import importlib.metadata
from functools import cache
from typing import Any


def tokenizer_class_of(model_type: str) -> str:
    """Name of the tokenizer's class for a type of model; "" where transformers names none."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type) or ""


def knows_model_type(model_type: str) -> bool:
    """Whether transformers has a config for a type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def version() -> str:
    """The installed version of transformers."""
    return importlib.metadata.version("transformers")


@cache
def public_names() -> frozenset[str]:
    """All names that can be looked up in the package, where transformers looks up the name of a tokenizer."""
    import transformers

    return frozenset(dir(transformers))


def is_tokenizer_class(name: str) -> bool:
    """Whether one of `public_names` is a tokenizer; this imports what the name stands for."""
    import transformers

    value: Any = getattr(transformers, name)
    # DummyObject stands in for a class whose library is missing, and says so when it is used.
    return type(value).__name__ == "DummyObject" or issubclass(value, transformers.PreTrainedTokenizerBase)
