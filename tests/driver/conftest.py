"""Fixtures that several files of reconstructed runs start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def constants() -> Iterator[None]:
    """The constants of a reconstruction that suit models made of noise."""
    from helpers.reconstructed import set_constants

    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    from helpers.commands import make_place

    return make_place(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)
