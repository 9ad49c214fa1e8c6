"""What every test shares: offline, seeded, interruptible, one thread a worker; without CUDA kernels are interpreted."""

import gc
import importlib.util
import os
import signal
from contextlib import ExitStack
from pathlib import Path

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # subprocesses of a test inherit it; torch's own setting is below
    os.environ["OMP_NUM_THREADS"] = "1"

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from fast import FAST  # noqa: E402
from hypothesis import settings  # noqa: E402
from interpreter import mend_interpreter  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    mend_interpreter()

_ASIDE = ExitStack()
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` import only files that hold such tests: others need packages that a GPU machine may not have."""
    if config.option.markexpr.strip() != "gpu" or not collection_path.match("test_*.py"):
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST`; skip, visibly, the tests marked `gpu` where torch sees no CUDA device."""
    for item in items:
        words = FAST.get(item.path.relative_to(Path(__file__).parent).as_posix())
        quick = words is not None and "slow" not in item.keywords and "gpu" not in item.keywords
        if quick and (not words or any(word in item.name for word in words)):
            item.add_marker("fast")
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the imports made lives to the end: no collection need look at it again, nor do those of a benchmark."""
    from sinkstream.measure.memory import old_objects_aside

    _ASIDE.enter_context(old_objects_aside())
    gc.set_threshold(7_000)  # ten times the default: a tenth of the collections, each of what imports have made since


def pytest_unconfigure() -> None:
    """The end: modules are taken down in their usual order."""
    _ASIDE.close()


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """Seed Python, NumPy and torch (CUDA too) before each test, so that order and workers change nothing."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
