"""One whole block through the driver: random weights of Llama's shapes, calibrated, pruned and written.

The note beside a time has the peak of memory, the one that was expected, and the seconds of each phase.
"""

from pathlib import Path

import pytest
import torch
from operations import DEVICE, GPU, record
from transformers import AutoModelForCausalLM, LlamaConfig

import sparsefw.run
from sparsefw import checkpoint
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver.loop import prune_model
from sparsefw.estimate.memory import Work, needs
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.cost import Cost
from sparsefw.model.placement import BATCH_TOKENS, Placement
from sparsefw.model.shapes import shape_of
from sparsefw.model.streamed import StreamedModel
from sparsefw.process import peak_memory, resident

# Hidden and intermediate size, heads, heads of keys and values.
LLAMA = {"Llama-3.1-8B": (4096, 14336, 32, 8), "Llama-3-70B": (8192, 28672, 64, 8)}
MODELS = LLAMA if GPU else {"tiny": (64, 96, 4, 2)}
NSAMPLES, SEQLEN = (128, 2048) if GPU else (4, 64)
FLAGS = {"the default": [], "--refit 0": ["--refit", "0"]}


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


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("model", MODELS)
def test_block(benchmark, model, flags, tmp_path):
    source = checkpoint.inspect(save(tmp_path / "model", model))
    ids = torch.randint(1024, (NSAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    settings = sparsefw.run.settings_of(sparsefw.run.parse_arguments(FLAGS[flags]))
    outcomes, placement = [], Placement(max(1, BATCH_TOKENS // SEQLEN))
    work = Work(NSAMPLES, (), SEQLEN, ("sparsefw",), settings, GPU, torch.get_num_threads(), resident())
    expected = needs(shape_of(source), work, placement)

    def fresh() -> tuple[tuple, dict]:
        return (StreamedModel(source, torch.device(DEVICE)),), {}

    def prune(streamed: StreamedModel) -> None:
        with Writer(tmp_path / "pruned", len(streamed.blocks) + 1, overwrite=True) as output:
            windows = Windows(ids, "random", "")
            ops = triton_ops if GPU else cpu
            outcomes.append(
                prune_model(streamed, windows, [], ["sparsefw"], settings, ops, output, placement=placement)
            )
            output.finish(source.folder)

    benchmark.pedantic(prune, setup=fresh, rounds=1, warmup_rounds=1 if GPU else 0)
    peak, least = (peak_memory()["gpu_bytes"], expected.gpu) if GPU else (peak_memory()["host_bytes"], expected.host)
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in outcomes[-1].timeline.seconds().items())
    record(benchmark, Cost(0, 0), note=f"peak {peak / 2**30:.2f} GiB ({least / 2**30:.2f} expected); seconds: {phases}")
    assert all(0 < row.error < row.error_warm_start for row in outcomes[-1].layers)
