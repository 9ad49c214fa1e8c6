"""Where the time of a step goes, kernel by kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sinkstream.measure.timing import synchronise

PROFILED_STEPS = 4


def profile_steps(decode: Callable[[int], object], device: torch.device) -> list[dict[str, Any]]:
    """Run a few steps under torch's profiler; `decode` decodes the given number of tokens.

    Returns, for each kernel (on a CPU: each operator, self time), the longest first: `kernel`, `calls` and `us` a step,
    and `share` of the total time.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise(device)
    with profile(activities=activities) as profiler:
        decode(PROFILED_STEPS)
        synchronise(device)
    found = [
        (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if (event.device_type == DeviceType.CUDA) == cuda
    ]
    total = sum(us for _, _, us in found)
    rows = [
        {"kernel": name, "calls": calls / PROFILED_STEPS, "us": us / PROFILED_STEPS, "share": us / total}
        for name, calls, us in found
        if us > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])
