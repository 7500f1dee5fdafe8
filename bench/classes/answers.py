"""Answer requests with a tiny checkpoint of one class, streamed, and compare the answers with the whole model's.

Outcomes are those of `classes.examine`.
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from classes.examine import REFUSED, SOURCE, WRONG, Ended, of_product, row_of, write_source
from classes.tiny_config import TOKENS
from classes.tiny_model import Case, load
from sparsefw.checkpoint import inspect
from sparsefw.errors import InputError
from sparsefw.evaluation import Request, Score, request_of
from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.packing import Sharing
from sparsefw.evaluation.streaming import embedded, pack_for
from sparsefw.model import StreamedModel

HALF = "half"
# Nats, of a log-likelihood in fp32.
WITHIN = 1e-3
# Either of two logits that are closer may be the larger one.
CLOSE = 1e-4
# Most tokens that are read.
LONGEST = 60
# Tokens that local attention reads: more than some questions have, and fewer than others.
WINDOW = 24


def examine_answers(case: Case, folder: Path) -> dict[str, Any]:
    """Answer requests with a class.

    Args:
        case: the class and its config.
        folder: an empty folder for the checkpoints.

    Returns:
        The row of the results: JSON.
    """
    return row_of(case, folder, _examine)


def _examine(case: Case, folder: Path, row: dict[str, Any]) -> None:
    *_, original, _ = write_source(case, folder, WINDOW)
    requests = drawn_requests()
    row["sharing"] = sharing_in(folder / SOURCE, requests)
    with of_product("answer"):
        try:
            scores = scores_of(folder / SOURCE, requests, Budget())
        except InputError as error:
            raise Ended(REFUSED, str(error).replace(str(folder / SOURCE), "MODEL")) from error
    _compare(row, scores, answers_of_whole(original, requests))
    half = write_half(folder)
    if _runs_in_half(half) and (half_sharing := sharing_in(half, requests)) != row["sharing"]:
        raise Ended(WRONG, f"shares {half_sharing} in bf16, and {row['sharing']} in fp32")


@torch.no_grad()
def _runs_in_half(folder: Path) -> bool:
    """Whether plain transformers runs a checkpoint in bf16."""
    try:
        load(folder, torch.bfloat16)[0](input_ids=torch.arange(2, 2 + LONGEST)[None], use_cache=False)
    # A class that does not run may raise anything.
    except Exception:
        return False
    return True


def write_half(folder: Path) -> Path:
    """A copy of the checkpoint in bf16."""
    source, half = folder / SOURCE, folder / HALF
    shutil.copytree(source, half)
    config = json.loads((source / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(_in_half(config)))
    for path in half.glob("*.safetensors"):
        tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return half


def _in_half(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries of a config with the dtype bf16, those of its parts too."""
    parts = {key: _in_half(value) if isinstance(value, dict) else value for key, value in entries.items()}
    return parts | ({"dtype": "bfloat16"} if "dtype" in entries else {})


def drawn_requests(seed: int = 0) -> list[Request]:
    """Questions with several answers each, one that others begin with, equal ones, the longest and the shortest."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(2, TOKENS) for _ in range(draw.randint(least, most))]

    requests = []
    for n in range(6):
        context = tokens(9, 14) if n % 2 else tokens(25, 30)
        requests += [request_of(context, tokens(1, 9), LONGEST) for _ in range(4)]
    requests += [Request([*requests[0].read, 5, 6], [7]), requests[0]]
    # More than is read, and a single token.
    requests += [request_of(tokens(70, 80), tokens(3, 3), LONGEST), request_of([3], [4], LONGEST)]
    return requests


def sharing_in(folder: Path, requests: Sequence[Request]) -> str:
    """The `Sharing` that a checkpoint allows, by its name."""
    with of_product("share"):
        try:
            streamed = StreamedModel(inspect(folder), torch.device("cpu"))
            with streamed as model, torch.no_grad(), embedded(model, requests):
                return Sharing(pack_for(model, requests).sharing).name
        except InputError as error:
            raise Ended(REFUSED, str(error).replace(str(folder), "MODEL")) from error


@torch.no_grad()
def answers_of_whole(model: PreTrainedModel, requests: Sequence[Request]) -> list[tuple[Score, bool]]:
    """The answers of plain transformers, one request at a time, and whether a flag `greedy` could be either."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # Some versions of the fused attention leave out the cap.
        model.set_attn_implementation("eager")
    return [_answer(model, request) for request in requests]


def _answer(model: PreTrainedModel, request: Request) -> tuple[Score, bool]:
    # Some classes draw random numbers in their forward.
    torch.manual_seed(0)
    ids, targets = torch.tensor([list(request.read)]), torch.tensor(list(request.targets))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(targets) :].double()
    largest = logits.topk(2).values
    total = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    greedy = bool((logits.argmax(-1) == targets).all())
    return Score(total, greedy), bool((largest[:, 0] - largest[:, 1] < CLOSE).any())


def _compare(row: dict[str, Any], scores: Sequence[Score], expected: Sequence[tuple[Score, bool]]) -> None:
    differences = [abs(a.loglikelihood - b.loglikelihood) for a, (b, _) in zip(scores, expected, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    row["difference"] = float(f"{differences[worst]:.2g}")
    if not differences[worst] <= WITHIN:
        one, other = scores[worst].loglikelihood, expected[worst][0].loglikelihood
        raise Ended(WRONG, f"request {worst}: {one:.6g}, of plain transformers {other:.6g}")
    for n, (score, (other_score, either)) in enumerate(zip(scores, expected, strict=True)):
        if score.greedy != other_score.greedy and not either:
            raise Ended(WRONG, f"request {n}: greedy is {score.greedy}, of plain transformers {other_score.greedy}")
