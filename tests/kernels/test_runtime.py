"""What a launch asks of the driver."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from ring_case import Case

from sinkstream.kernels import runtime
from sinkstream.kernels.config import AttentionConfig


class Kernel:
    """A kernel that counts its launches and compiles once."""

    def __init__(self):
        self.compiled, self.launches, self.options = SimpleNamespace(function=7), 0, {}

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launches += 1
            self.options = options
            assert not {"carveout", "registers"} & options.keys(), "of the launch, not of the kernel"
            return self.compiled

        return run


def test_the_driver_is_asked_once_for_a_carve_out(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "prefer_shared", lambda function, percent: asked.append((function, percent)))
    kernel = Kernel()
    runtime.launch(kernel, (1,), pdl=False)
    assert asked == [], "the control, a launch that says nothing"
    for percent in (45, 45, 60, 60, 0, 0):
        runtime.launch(kernel, (1,), pdl=False, carveout=percent)
    assert asked == [(7, 45), (7, 60), (7, -1)] and kernel.launches == 7, "0 leaves it to the driver again"


def test_the_most_registers_of_a_thread_are_the_compilers_option(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    kernel = Kernel()
    runtime.launch(kernel, (1,), pdl=False, registers=96, num_warps=4)
    assert kernel.options.items() >= {"maxnreg": 96, "num_warps": 4}.items()
    runtime.launch(kernel, (1,), pdl=False, num_warps=4)
    assert "maxnreg" not in kernel.options, "the control: the compiler's own choice"


def test_a_driver_that_refuses_is_named(monkeypatch):
    driver = SimpleNamespace(cuFuncSetAttribute=lambda function, attribute, percent: int(percent > 100))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    runtime.prefer_shared(7, 100)
    with pytest.raises(RuntimeError, match="the driver refuses a carve-out of 101 percent for shared memory: error 1"):
        runtime.prefer_shared(7, 101)


@pytest.mark.gpu
def test_attention_has_the_carve_out_of_its_configuration(monkeypatch):
    asked, prefer = [], runtime.prefer_shared
    monkeypatch.setattr(
        runtime, "prefer_shared", lambda function, percent: (asked.append(function), prefer(function, percent))
    )
    case = Case(torch.float16, query_heads=6, kv_heads=2, order="blocks", head_dim=64, rotary=64, pinned_slots=4,
                ring=150, pinned=4, first=77, length=140)  # fmt: skip
    case.run("triton", **vars(AttentionConfig(3, 64, 4, dot=True, columns=64, carveout=45)))
    percent = ctypes.c_int()
    error = ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(ctypes.byref(percent), 9, ctypes.c_void_p(asked[-1]))
    assert (error, percent.value) == (0, 45)
