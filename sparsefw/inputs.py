"""What a run reads and where it writes. Flags, ranges and help are made from these fields, as from PruneConfig's."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefw.errors import InputError, shown
from sparsefw.flags import DEPENDS, check_fields, check_needs, checked_path, flag, make_tuples, set_field
from sparsefw.memory import MOST_MEMORY
from sparsefw.solver.config import PruneConfig

# Name of the embedded model, which the package carries, and of the embedded text, which every CPython carries.
DEFAULT = "default"
DEFAULT_MODEL = Path(__file__).with_name("default") / "model"

# Defaults with the embedded model, and with other models.
EMBEDDED = dict(dataset=(DEFAULT,), nsamples=64, seqlen=128, evaluate=(DEFAULT,))
OTHERS = dict(dataset=("c4",), nsamples=256, seqlen=2048, evaluate=())


@dataclass(frozen=True)
class Inputs:
    """Names of what a run reads. A default that depends on the model has its value in every instance.

    Raises:
        InputError: a value is out of its range.
    """

    model: str = flag("checkpoint folder or Hub id (default: the embedded model)", DEFAULT, metavar="ID|PATH")
    dataset: tuple[str, ...] = flag(
        "calibration text: c4, wikitext, a .txt, .jsonl or .parquet file, or a datasets id; may be repeated: each has "
        "as many of the windows, or its share of them where =N follows (default: c4; the embedded text for the "
        "embedded model)", metavar="NAME|PATH[=N]", several=True,
    )  # fmt: skip
    nsamples: int = flag("calibration windows (default: 256; embedded model: 64)", metavar="N", least=1, most=10**9)
    seqlen: int = flag(
        "tokens in a window, at most the model's maximum (default: 2048; embedded model: 128)",
        metavar="N",
        least=2,
        most=10**9,
    )
    seed: int = flag("seed of the drawing of calibration windows", 0, metavar="N", least=0, most=2**63 - 1)
    evaluate: tuple[str, ...] = flag(
        "held-out text for perplexity, named like a dataset; may be repeated (default: none; embedded model: its own)",
        metavar="wikitext|PATH", several=True,
    )  # fmt: skip
    eval_windows: int | None = flag(
        "evaluate at most this many windows of --seqlen tokens (default: all)", metavar="N", least=1, most=10**9
    )

    def __post_init__(self) -> None:
        make_tuples(self)
        check_fields(self)
        for name, default in (EMBEDDED if self.embedded else OTHERS).items():
            if getattr(self, name) is DEPENDS:
                set_field(self, name, default)
        _check_datasets(self.dataset)
        check_needs("evaluate", bool(self.evaluate), eval_windows=self.eval_windows)

    @property
    def embedded(self) -> bool:
        """Whether the model is the embedded one."""
        return self.model == DEFAULT

    @property
    def shares(self) -> dict[str, float]:
        """The share of each calibration text in the windows, by its name."""
        return dict(map(name_and_share, self.dataset))


@dataclass(frozen=True)
class Output:
    """Where a run writes, and the memory that it may take.

    Attributes:
        folder: folder of the pruned checkpoint.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard what an unfinished run left.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.

    Raises:
        InputError: a value is out of its range.
    """

    folder: Path = flag("folder for the result", Path("pruned"), metavar="DIR")
    overwrite: bool = flag("replace the older checkpoint in the output folder", False)
    restart: bool = flag(
        "discard what an interrupted run has finished; without it the same command goes on from there", False
    )
    gpu_memory: float | None = flag(
        "the run takes at most this of the GPU's memory (default: what is free, less a tenth)",
        metavar="GIB",
        least=0,
        most=MOST_MEMORY,
    )
    host_memory: float | None = flag(
        "the run takes at most this of the host's memory (default: what is free, less a tenth)",
        metavar="GIB",
        least=0,
        most=MOST_MEMORY,
    )

    def __post_init__(self) -> None:
        check_fields(self)


def name_and_share(dataset: str) -> tuple[str, float]:
    """The name of a text and its share, from NAME or NAME=SHARE. A name without a share has 1."""
    name, _, number = dataset.rpartition("=")
    try:
        return (name, float(number)) if name else (dataset, 1.0)
    except ValueError:
        return dataset, 1.0


def _check_datasets(datasets: Sequence[str]) -> None:
    """Refuse shares that are not above 0, and a text that is given twice or not at all.

    Windows of a text that is drawn from twice would be there twice, and what is held out would be learned, too.
    """
    if not datasets:
        raise InputError("--dataset: no text is named")
    places = set()
    for dataset in datasets:
        name, share = name_and_share(dataset)
        if not 0 < share < math.inf:
            raise InputError(f"--dataset {shown(dataset)}: expected a share above 0 behind the last =")
        # A file may be given by several names.
        place = os.path.realpath(checked_path("dataset", name))
        if place in places:
            raise InputError(f"--dataset {shown(name)}: given twice; give it once, with a share: {shown(name)}=2")
        places.add(place)


def config_for(inputs: Inputs, options: dict[str, Any]) -> PruneConfig:
    """The config of these options. By default the embedded model is compared with Wanda."""
    return PruneConfig(**({"compare": ("wanda",)} if inputs.embedded else {}) | options)
