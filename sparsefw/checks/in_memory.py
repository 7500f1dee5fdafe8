"""Check a model that was pruned in memory, on batches: whatever it reads, and by whatever library it was written.

Its blocks are known only while it runs, and it was in memory as a whole when it was pruned. So it is loaded as a whole,
and not run.

Several ranks do not share it: each of them would have to hold the whole model. One of them does it.
"""

from pathlib import Path

from torch import Tensor

from sparsefw import checkpoint
from sparsefw.checkpoint import CONFIG, read_tensors
from sparsefw.checkpoint.source import read_json
from sparsefw.checkpoint.tensors import dequantized
from sparsefw.checkpoint.trust import MAX_CONFIG_BYTES
from sparsefw.checks.claims import Claims
from sparsefw.checks.verdict import Verdict
from sparsefw.checks.weights import by_slices, check_layer, compare_others
from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.model import load_whole
from sparsefw.model.transformers_private import has_class

IN_MEMORY = "the model was in memory; name a checkpoint of it with --against"
NOT_LOADED = f"{CONFIG} names no class of transformers; tensors were read by their names in the files"


def check_in_memory(verdict: Verdict, claims: Claims, output: Path, source: Path | None) -> None:
    """Check a model.

    Args:
        verdict: receives the findings of all checks but "sums".
        claims: the report's claims about the model.
        output: folder of the model.
        source: folder of a checkpoint with the weights that it had before; None: they are not compared.

    Raises:
        InputError: the source cannot be used.
    """
    checks = verdict.checks
    if source is None:
        verdict.not_compared = IN_MEMORY
        verdict.skip("no source", "zeros", "kept", "others")
        before = None
    else:
        try:
            before = by_slices(_state(source)[0], claims.layers)
        except InputError as error:
            raise InputError(f"the source: {error}") from error
    try:
        state, loaded = _state(output)
    except InputError as error:
        checks["model"].failures.append(str(error))
        verdict.skip("the model does not load", *checks.keys() - {"sums", "model"})
        return
    checks["files"].count = checks["model"].count = len(state)
    if not loaded:
        verdict.skip(NOT_LOADED, "model")
    for name, tensor in state.items():
        checks["finite"].count += 1
        try:
            check_finite(name, tensor)
        except InputError as error:
            checks["finite"].failures.append(str(error))
    after = by_slices(state, claims.layers)
    for layer in claims.layers.values():
        check_layer(verdict, claims, layer, after.get(layer.name), before)
    if before is not None:
        compare_others(checks["others"], after, before, claims.layers)


def _state(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a model by the model's own names, and whether transformers has the class that its config names.

    Raises:
        InputError: the files are damaged, or the model does not load.
    """
    config = read_json(folder / CONFIG, MAX_CONFIG_BYTES) if (folder / CONFIG).is_file() else {}
    if has_class(config.get("architectures")):
        return load_whole(checkpoint.inspect(folder)), True
    read = read_tensors(checkpoint.tensors_in(folder))
    return {name: dequantized(tensor) for name, tensor in read.items()}, False
