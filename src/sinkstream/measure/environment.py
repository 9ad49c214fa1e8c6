"""Where a run happened: source revision, package versions, hardware, numeric switches. No host, user or path names."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

import sinkstream

PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "datasets")
COMMIT_VARIABLE = "SINKSTREAM_GIT_COMMIT"
_PACKAGE_DIRECTORY = Path(sinkstream.__file__).resolve().parent


def utc_now() -> str:
    """The current time as ISO 8601 in UTC, to the millisecond, so that the runs of one second keep their order."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def environment(device: torch.device | str) -> dict[str, Any]:
    """The machine and the software of a run on `device`, for a record or a bug report; MB are 2**20 bytes.

    Without a GPU as device the fields of `gpu` are None.
    """
    device = torch.device(device)
    return {
        "timestamp": utc_now(),
        "device": device.type,
        "git": git_revision(),
        "versions": package_versions(),
        "gpu": _gpu(device),
        "cpu": {
            "model": _cpu_model(),
            "cores_logical": os.cpu_count(),
            "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_average": _load_average(),
        },
        "memory_mb": psutil.virtual_memory().total // 2**20,
        "platform": _platform(),
        "tf32": tf32_switches(),
    }


def _load_average() -> float | None:
    """Processes that ran or waited for a core in the last minute, this one included; None where it is not known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def format_environment(info: dict[str, Any]) -> str:
    """The dict of `environment` as aligned lines, one per figure, to paste into a bug report."""
    rows = []
    for key, value in info.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {name}".strip(), "-" if entry is None else str(entry)) for name, entry in entries]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def hardware(info: dict[str, Any]) -> str:
    """What an environment computed on: its GPU, or its CPU where that did the work."""
    return info["gpu"]["name"] or info["cpu"]["model"]


def git_revision(package_directory: Path = _PACKAGE_DIRECTORY) -> dict[str, Any]:
    """Commit of the checkout that the package's source is tracked in, and whether the source differs from it.

    `dirty` looks at the package's own folder only: a record written elsewhere in the checkout changes no result.
    Where the source was copied without its history (a container, a remote machine), the environment variable
    SINKSTREAM_GIT_COMMIT may state the commit, with "-dirty" appended if it was; `reason` then says so. Where neither
    is known, `commit` and `dirty` are None.
    """
    if _git(package_directory, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package_directory, "rev-parse", "--verify", "HEAD")
        status = _git(package_directory, "status", "--porcelain", "--untracked-files=normal", "--", ".")
        if commit and status is not None:
            return {"commit": commit, "dirty": bool(status), "reason": None}
    stated = os.environ.get(COMMIT_VARIABLE, "").strip()
    if stated:
        if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", stated):
            raise ValueError(f"{COMMIT_VARIABLE} = {stated!r}: expected 40 hex digits, optionally with -dirty appended")
        commit, _, dirty = stated.partition("-")
        return {"commit": commit, "dirty": bool(dirty), "reason": f"stated by {COMMIT_VARIABLE}"}
    return {"commit": None, "dirty": None, "reason": "the source is not tracked in a git checkout, or git is missing"}


def package_versions() -> dict[str, str | None]:
    """Version of Python, of sinkstream and of the packages that can change a result; None where absent."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "sinkstream": sinkstream.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__
    return versions


def tf32_switches() -> dict[str, bool]:
    """Whether float32 matrix products and cuDNN convolutions may use TF32.

    Reads the `fp32_precision` attributes, because reading `allow_tf32` raises once a program has set the newer ones.
    """
    cudnn: Any = torch.backends.cudnn  # which declares no `conv`
    return {
        "matmul": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "cudnn": cudnn.conv.fp32_precision == "tf32",
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command in `directory`, or None if it failed. Takes no locks."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu(device: torch.device) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": None, "memory_mb": None, "driver": None, "cuda_runtime": torch.version.cuda}
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        fields |= {"name": properties.name, "memory_mb": properties.total_memory // 2**20, "driver": _nvidia_driver()}
    return fields


def _nvidia_driver() -> str | None:
    """Version of the NVIDIA driver: nvidia-smi's answer, or the kernel module's where that tool is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done and done.returncode == 0 and done.stdout.split():
        return done.stdout.split()[0]
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _cpu_model() -> str | None:
    """Name of the CPU: /proc/cpuinfo on Linux, the platform's own word elsewhere."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else (platform.processor() or platform.machine() or None)


def _platform() -> str:
    """System, kernel version without a distributor's suffix, architecture and C library."""
    kernel = re.split(r"[^\d.]", platform.release(), maxsplit=1)[0]
    return " ".join(part for part in (platform.system(), kernel, platform.machine(), *platform.libc_ver()) if part)
