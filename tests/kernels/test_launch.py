"""Launchers choose by the target of compilation."""

from types import SimpleNamespace

import pytest
import triton

from sparsefw.kernels import launch


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [
        ("cuda", 80, "sm_80"),
        ("cuda", 89, "sm_80"),
        ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_90"),
        ("cuda", 110, "sm_90"),
        ("cuda", 120, "sm_80"),
        ("cuda", 121, "sm_80"),
        ("hip", "gfx942", "hip"),
    ],
)
def test_platform_of_every_target(backend, arch, expected, monkeypatch):
    """Targets count together if their instructions and shared memory allow the same configurations."""
    driver = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=backend, arch=arch))
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    assert launch.platform() == expected


def test_the_interpreter_is_a_platform(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", True)
    assert launch.platform() == "interpreter"
