"""What a step costs beside seconds: floating-point operations and energy, where they can be read (R7)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

POWERCAP = Path("/sys/class/powercap")
LEAST = 2.0
"""Seconds that a reading of energy must span: the counters of a GPU move every 20 to 100 ms."""


def step_flops(step: Callable[[], Any]) -> int | None:
    """Operations of one step in products of matrices, convolutions and attention; None where none is counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() or None


class Energy:
    """Joules of the whole processor package, or of the GPU, from ``start()`` to ``spent(steps)``, per step.

    Read from the kernel's RAPL counters or from NVML; absent (None) where neither can be read, and where the steps took
    too little time to tell. Whatever else runs on the device is in it.
    """

    def __init__(self, device: str = "cpu", powercap: Path = POWERCAP) -> None:
        self._read = _nvml(device) if device.startswith("cuda") else lambda: _rapl(powercap)
        self._began, self._first = 0.0, dict[str, tuple[float, float]]()

    def start(self) -> None:
        self._began, self._first = time.perf_counter(), self._read()

    def spent(self, steps: int) -> float | None:
        """Joules per step since the start."""
        now = self._read()
        if not self._first or self._first.keys() != now.keys() or time.perf_counter() - self._began < LEAST:
            return None
        used = (now[name][0] - joules for name, (joules, _) in self._first.items())
        around = (self._first[name][1] for name in now)  # a counter starts again at 0 beyond its range
        return sum(joules if joules >= 0 else joules + most for joules, most in zip(used, around)) / steps


def _rapl(powercap: Path) -> dict[str, tuple[float, float]]:
    """Package → (joules so far, joules at which the counter starts again)."""
    found = {}
    for package in sorted(powercap.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") == 1:  # the parts of a package are in its own count
            try:
                joules, most = ((int((package / n).read_text())) / 1e6 for n in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError):
                return {}
            found[package.name] = (joules, most)
    return found


def _nvml(device: str) -> Callable[[], dict[str, tuple[float, float]]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
    except Exception:  # no NVML, no such device: energy is absent
        return dict
    return lambda: {device: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)}
