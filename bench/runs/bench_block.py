"""One whole block through the driver: random weights of Llama's shapes, calibrated, pruned and written.

The note beside a time has the measured and the expected peak of memory, and the seconds of each phase.
"""

from pathlib import Path

import pytest
import torch
from operations import DEVICE, GPU, record
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsefw import checkpoint
from sparsefw.checkpoint import Writer
from sparsefw.data import Windows
from sparsefw.driver import prune_model
from sparsefw.driver.block import Run
from sparsefw.estimate import Workload
from sparsefw.estimate.memory import memory_needs
from sparsefw.kernels.cost import Cost
from sparsefw.model import Placement, StreamedModel, shape_of
from sparsefw.model.placement import BATCH_TOKENS
from sparsefw.process import peak_memory, resident
from sparsefw.solver import PruneConfig

# Hidden and intermediate size, heads, heads of keys and values.
LLAMA = {"Llama-3.1-8B": (4096, 14336, 32, 8), "Llama-3-70B": (8192, 28672, 64, 8)}
MODELS = LLAMA if GPU else {"tiny": (64, 96, 4, 2)}
NSAMPLES, SEQLEN = (128, 2048) if GPU else (4, 64)
CONFIGS = {"the default": {}, "--refit 0": {"refit": 0}}


def save(folder: Path, model: str) -> Path:
    """A checkpoint of one block."""
    hidden, intermediate, heads, pairs = MODELS[model]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=SEQLEN,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_block(benchmark, model, config, tmp_path):
    source = checkpoint.inspect(save(tmp_path / "model", model))
    ids = torch.randint(1024, (NSAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    given = PruneConfig(**CONFIGS[config])
    workload = Workload(NSAMPLES, (), SEQLEN, given, GPU, torch.get_num_threads(), resident())
    outcomes, config, shape = [], workload.config, shape_of(source)
    # As a run has them: with so few windows each is a step of a reconstruction.
    placement = Placement(1 if config.reconstruct else max(1, BATCH_TOKENS["gpu" if GPU else "cpu"] // SEQLEN))
    expected = memory_needs(shape, workload, placement)

    def fresh() -> tuple[tuple, dict]:
        return (StreamedModel(source, torch.device(DEVICE)),), {}

    def prune(streamed: StreamedModel) -> None:
        with (
            streamed,
            Writer(tmp_path / "pruned", len(streamed.blocks) + len(streamed.pieces), overwrite=True) as writer,
        ):
            run = Run(
                streamed,
                config,
                config.backend,
                placement.solver,
                frozenset(shape.layer_names),
                predicts=shape.blocks[-1].predicts,
                experts=tuple(block.experts for block in shape.blocks),
            )
            outcomes.append(prune_model(run, Windows(ids, "random", ""), [], writer, placement))
            writer.finish(source.folder)

    benchmark.pedantic(prune, setup=fresh, rounds=1, warmup_rounds=1 if GPU else 0)
    peak, least = (peak_memory()["gpu_bytes"], expected.gpu) if GPU else (peak_memory()["host_bytes"], expected.host)
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in outcomes[-1].timeline.seconds().items())
    record(benchmark, Cost(0, 0), note=f"peak {peak / 2**30:.2f} GiB ({least / 2**30:.2f} expected); seconds: {phases}")
    assert all(0 < row.error < row.error_warm_start for row in outcomes[-1].layers)
