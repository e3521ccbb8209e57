"""Time and memory of calls that are compared, for the benchmarks beside this file."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turn(
    functions: dict[str, Callable], device: torch.device, repeats: int, limit: float = 2.0
) -> dict[str, tuple[float, float | None]]:
    """Least time of each, and MiB that its first call took at its peak beyond what was there before.

    The least, as other work on the machine only ever adds to it. The first call's time is not counted, unless it is
    above ``limit`` seconds: then it is the only one.
    """
    first = {name: peak_memory(function, device) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if first[name][0] < limit:
                times[name].append(seconds(function, device))
    return {name: (min(times[name] or [taken]), peak) for name, (taken, peak) in first.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds and MiB of a call; None where the system does not tell its memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        taken = seconds(function, device)
        return taken, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # Linux: give back what was freed, and forget the peak so far.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, KeyError, AttributeError):
        return seconds(function, device), None
    taken = seconds(function, device)
    return taken, max(0, _status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def table(headings: list[str], rows: list[list]) -> str:
    def text(value) -> str:
        if value is None:
            return "not measured"
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines) + "\n"
