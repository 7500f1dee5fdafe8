"""Inputs: calibration texts and their shares."""

import numpy as np
import pytest
from helpers.texts import refused

from sparsefw.data.text import MIXTURE
from sparsefw.inputs import Inputs, Output, name_and_share


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        ("c4=3", ("c4", 3.0)),
        ("a=1.txt=2", ("a=1.txt", 2.0)),
        ("=2", ("=2", 1.0)),
    ],
)
def test_names_and_shares(dataset, found):
    assert name_and_share(dataset) == found


def test_shares_by_name():
    inputs = Inputs(dataset=["c4", "code.txt=0.5"])
    assert inputs.dataset == ("c4", "code.txt=0.5")
    assert inputs.shares == {"c4": 1.0, "code.txt": 0.5}
    assert Inputs(dataset="c4").dataset == ("c4",)
    # The bytes of a name in another encoding.
    with refused("dataset: .*surrogates not allowed; rename the file or folder"):
        Inputs(dataset="\udce9.txt")


@pytest.mark.parametrize("share", ["0", "-1", "nan", "1e999"])
def test_shares_are_above_zero(share):
    with refused(f"dataset='a.txt={share}': expected a share above 0 after the last ="):
        Inputs(dataset=["b.txt", f"a.txt={share}"])


def test_general_is_a_mixture():
    shares = Inputs(dataset=("a.txt", "general=6")).shares
    assert shares == {"a.txt": 1, **dict.fromkeys(MIXTURE, 2)}


def test_numbers_of_numpy_are_numbers():
    inputs = Inputs(nsamples=np.int64(6), seqlen=np.int32(32))
    assert [type(x) for x in (inputs.nsamples, inputs.seqlen)] == [int, int]
    assert type(Output(host_memory=np.float32(4)).host_memory) is float


def test_default_text(monkeypatch):
    """Of the Hub, or the model's own where there is no network; the built-in model has one."""
    assert Inputs(model="m").dataset == ("c4",)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [Inputs(model=name).dataset for name in ("m", "default")] == [("self",), ("default",)]
