"""Define the inputs and the output of commands. Flags, ranges and help are made from the fields, as for PruneConfig."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from sparsefw.data.text import GENERAL, MIXTURE, SELF, is_own
from sparsefw.errors import InputError, option, shown
from sparsefw.fields import check_fields, check_needs, flag, set_defaults, set_field

# Name of the built-in model, which is in the package, and of the built-in text, which comes with every CPython.
DEFAULT = "default"
DEFAULT_MODEL = Path(__file__).with_name("default") / "model"

# The largest memory limit in GiB: more than any machine has.
MOST_MEMORY = 2**20

# Nominal memory of GPUs, in 10^9 bytes. They have a little more, which is left to the driver.
CARDS = {
    "a10": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a6000": 48,
    "b200": 180,
    "h100": 80,
    "h200": 141,
    "l4": 24,
    "l40s": 48,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
}

# Defaults with the built-in model, and with other models. With HF_HUB_OFFLINE, other models generate their own text.
BUILT_IN = dict(dataset=(DEFAULT,), nsamples=64, seqlen=128, evaluate=(DEFAULT,))
OTHERS = dict(dataset=("c4",), nsamples=256, seqlen=2048, evaluate=())


def _memory_flag(what: str) -> Any:
    """Make the field of a memory limit."""
    text = f"take at most this of the {what}'s memory (default: what is free, less a tenth)"
    return flag(text, metavar="GIB", least=0, most=MOST_MEMORY)


@dataclass(frozen=True)
class Inputs:
    """The model and the texts of a run, by name. An instance has defaults that depend on the model filled in.

    Raises:
        InputError: a value is out of range.
    """

    model: str = flag("checkpoint folder or Hub id (default: the built-in model)", DEFAULT, metavar="ID|PATH")
    dataset: tuple[str, ...] = flag(
        "calibration text: c4, wikitext, a .txt, .jsonl or .parquet file, or a datasets id; general: a mixture of the "
        "Hub; self: the model writes it, self=PROMPTS: as answers to a text's prompts; may be repeated: each has as "
        "many of the windows, or its share of them where =N follows (default: c4; self with HF_HUB_OFFLINE=1; the "
        "built-in text for the built-in model)",
        metavar="NAME|PATH[=N]", several=True,
    )  # fmt: skip
    nsamples: int = flag(
        "calibration sequences, here called windows (default: 256; built-in model: 64)",
        metavar="N",
        least=1,
        most=10**9,
    )
    seqlen: int = flag(
        "sequence length: tokens in a window, at most the model's maximum (default: 2048; built-in model: 128)",
        metavar="N",
        least=2,
        most=10**9,
    )
    seed: int = flag("seed of calibration windows, drawn or written", 0, metavar="N", least=0, most=2**63 - 1)
    evaluate: tuple[str, ...] = flag(
        "held-out text for perplexity, named like a dataset, except general and self; may be repeated (default: none; "
        "built-in model: its own)",
        metavar="wikitext|PATH", several=True,
    )  # fmt: skip
    eval_windows: int | None = flag(
        "evaluate at most this many windows of --seqlen tokens (default: all)", metavar="N", least=1, most=10**9
    )

    def __post_init__(self) -> None:
        check_fields(self)
        others = OTHERS | dict(dataset=(SELF,)) if constants.HF_HUB_OFFLINE else OTHERS
        set_defaults(self, BUILT_IN if self.built_in else others)
        set_field(self, "dataset", tuple(text for dataset in self.dataset for text in _texts_of(dataset)))
        _check_datasets(self.dataset)
        check_needs("evaluate", self.evaluate, eval_windows=self.eval_windows)

    @property
    def built_in(self) -> bool:
        """Tell whether the model is the built-in one."""
        return self.model == DEFAULT

    @property
    def options(self) -> dict[str, Any]:
        """Return defaults of PruneConfig that depend on the model: a run of the built-in model compares with Wanda."""
        return {"compare": ("wanda", "frank-wolfe", "refitted")} if self.built_in else {}

    @property
    def shares(self) -> dict[str, float]:
        """Return by name the share of each calibration text in the windows."""
        return dict(map(name_and_share, self.dataset))

    @property
    def own(self) -> str | None:
        """Return the name of the text that the model writes itself; None: it writes none."""
        return next(filter(is_own, self.shares), None)

    @property
    def paths(self) -> list[Path]:
        """List the names of all texts as paths; a text may be a file."""
        names = (*self.shares, *self.evaluate)
        return [Path(os.path.expanduser(name.removeprefix(f"{SELF}="))) for name in names]


@dataclass(frozen=True)
class Output:
    """Where a run writes, and the memory that it may take.

    Attributes:
        folder: folder of the pruned checkpoint.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard the finished blocks of an unfinished run.
        gpu_memory, host_memory: memory limits in GiB; None: the free memory, less a tenth.
        hours: hours of a recovery; None: no limit.

    Raises:
        InputError: a value is out of range.
    """

    folder: Path = flag("folder for the result", Path("pruned"), metavar="DIR")
    overwrite: bool = flag("replace the older checkpoint in the output folder", False)
    restart: bool = flag(
        "discard what an interrupted run has finished; without this flag the same command resumes", False
    )
    gpu_memory: float | None = _memory_flag("GPU")
    host_memory: float | None = _memory_flag("host")
    hours: float | None = flag(
        "end the recovery after this many hours with the best weights so far; without --recover it takes as many "
        "tokens as fit into them, and is refused where the default is no recovery (default: no limit)",
        None, metavar="H", least=0, most=10**6,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class EvaluationInputs:
    """The models, tasks and texts of an evaluation, and its output.

    Attributes:
        models: folders or Hub ids of checkpoints in safetensors, `against` first.
        tasks: names of tasks, groups and tags of lm-evaluation-harness; "paper": the paper's seven zero-shot tasks.
        texts: texts for perplexity, by name or path as for `--eval`.
        against: reference checkpoint, with which all others are compared, document by document; None: no comparison.
        limit: most documents of each task; below 1: the share of documents; None: all.
        num_fewshot: examples before each question; None: as the task says.
        include_path: a folder with more tasks in the harness's format.
        seqlen: tokens in a window of a text; None: 2048.
        eval_windows: most windows of each text; None: all.
        gpu_memory, host_memory: memory limits in GiB; None: the free memory, less a tenth.
        output: folder for evaluation.json; None: no file is written.
        overwrite: whether an older evaluation.json in `output` may be replaced.

    Raises:
        InputError: a value is not a name or path, or is out of range; or two values contradict each other.
    """

    models: tuple[str, ...] = flag(
        "checkpoint folder or Hub id; several are evaluated one after the other", (), metavar="MODEL", several=True
    )
    tasks: tuple[str, ...] = flag(
        "tasks, groups and tags of lm-evaluation-harness; paper: the seven zero-shot tasks of the paper; may be "
        "repeated", (), metavar="A,B", several=True,
    )  # fmt: skip
    texts: tuple[str, ...] = flag(
        "text for perplexity: wikitext, c4, a .txt, .jsonl or .parquet file, or a datasets id; may be repeated", (),
        metavar="wikitext|PATH", several=True,
    )  # fmt: skip
    against: str | None = flag(
        "compare all models with this one, paired by document: differences with their standard errors",
        metavar="DENSE",
    )
    limit: float | None = flag(
        "most documents of each task; below 1: the share of documents (default: all)", metavar="N", least=0
    )
    num_fewshot: int | None = flag("examples before each question (default: as the task says)", metavar="K", least=0)
    include_path: Path | None = flag("folder with more tasks in the harness's format", metavar="DIR")
    seqlen: int | None = flag(
        "sequence length: tokens in a window of a text, at most the model's maximum (default: 2048)",
        metavar="N",
        least=2,
    )
    eval_windows: int | None = flag("at most this many windows of each text (default: all)", metavar="N", least=1)
    gpu_memory: float | None = _memory_flag("GPU")
    host_memory: float | None = _memory_flag("host")
    output: Path | None = flag("folder for evaluation.json", metavar="DIR")
    overwrite: bool = flag("replace an older evaluation.json in the output folder", False)

    def __post_init__(self) -> None:
        check_fields(self)
        names = tuple(name.strip() for several in self.tasks for name in several.split(",") if name.strip())
        if self.tasks and not names:
            raise InputError(f"{option('tasks')}: names no task; give tasks, or leave it out")
        set_field(self, "tasks", names)
        first = () if self.against is None else (self.against,)
        set_field(self, "models", tuple(dict.fromkeys([*first, *self.models])))
        set_field(self, "texts", tuple(dict.fromkeys(self.texts)))
        if not self.models:
            raise InputError("models: none is named; give one")
        if self.limit == 0:
            raise InputError(f"{option('limit', 0)}: expected more than 0")
        if not names and not self.texts:
            raise InputError(f"{option('tasks')}, {option('texts')}: give tasks, or a text for perplexity")
        check_needs("tasks", names, limit=self.limit, num_fewshot=self.num_fewshot, include_path=self.include_path)
        check_needs("texts", self.texts, seqlen=self.seqlen, eval_windows=self.eval_windows)
        check_needs("output", self.output, overwrite=self.overwrite or None)


def name_and_share(dataset: str) -> tuple[str, float]:
    """Split NAME=SHARE into name and share; a name without a share has share 1."""
    name, _, number = dataset.rpartition("=")
    try:
        return (name, float(number)) if name else (dataset, 1.0)
    except ValueError:
        return dataset, 1.0


def _texts_of(dataset: str) -> list[str]:
    """Replace the mixture "general" by its texts, which divide its share equally; another dataset stays."""
    name, share = name_and_share(dataset)
    if name != GENERAL or not 0 < share < math.inf:
        return [dataset]
    return [f"{text}={share / len(MIXTURE):g}" for text in MIXTURE]


def _check_datasets(datasets: Sequence[str]) -> None:
    """Refuse an empty list, shares that are not above 0, and a text that is named twice.

    Windows of a text named twice would be drawn twice, so that held-out windows might be learned from.
    """
    if not datasets:
        raise InputError(f"{option('dataset')}: no text is named; give one")
    names = dict[str, str]()
    for dataset in datasets:
        name, share = name_and_share(dataset)
        place = os.path.realpath(os.path.expanduser(name))
        if not 0 < share < math.inf:
            raise InputError(f"{option('dataset', dataset)}: expected a share above 0 after the last =")
        if place in names:
            of_mixture = f"; {GENERAL} includes it" if name in MIXTURE else ""
            once = f"give it once, with a share: {shown(name)}=2{of_mixture}"
            raise InputError(f"{option('dataset', name)}: given twice; {once}")
        names[place] = name
    if sum(map(is_own, names.values())) > 1:
        raise InputError(f"{option('dataset', SELF)}: given twice; give one of them")


def locate(model: str) -> Path:
    """Find the folder of a checkpoint: for "default" the built-in model's, else by `source.locate`."""
    from sparsefw.checkpoint import source

    return DEFAULT_MODEL if model == DEFAULT else source.locate(model)
