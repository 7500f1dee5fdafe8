"""Launchers choose by the target of compilation."""

from types import SimpleNamespace

import pytest
import torch
import triton

from sparsefw.kernels import conjugate, launch, product, step


@pytest.mark.parametrize(("arch", "expected"), {80: "sm_80", 90: "sm_90", 100: "sm_90", 120: "sm_80", 0: "hip"}.items())
def test_platform_of_every_target(arch, expected, monkeypatch):
    """Targets count together if their instructions and shared memory allow the same configurations."""
    target = SimpleNamespace(backend="cuda" if arch else "hip", arch=arch or "gfx942")
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    assert launch.platform() == expected


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_no_product_is_in_tf32_on_amd(precision, monkeypatch):
    """Triton compiles the name for one of its GPUs alone."""
    monkeypatch.setattr(product, "platform", lambda: "hip")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert product.dot_options((dtype, dtype), precision)["PRECISION"] == "ieee"


@pytest.mark.parametrize("d", [120, 360, 480, 960, 4080, 30720])
@pytest.mark.parametrize(("module", "more"), [(conjugate, ()), *((step, (group,)) for group in (0, 3, 5, 8, 12))])
def test_no_entry_belongs_to_two_warps(module, more, d, monkeypatch):
    """Rows change in place, without a barrier between loads and stores: a warp could read what another has stored."""
    monkeypatch.setattr(module, "platform", lambda: "sm_80")
    monkeypatch.setattr(module, "warps", lambda n: n)
    config = module.configuration(64, d, *more)
    # A thread has at most 4 adjacent columns, see `device.columns`.
    warps = config["BLOCK_R"] * config["BLOCK_D"] // (4 * 32)
    assert config["num_warps"] <= max(1, warps)
