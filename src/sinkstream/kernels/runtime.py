"""Triton and the device: optional Triton, the choice between kernel and twin, launching, prefetching, shape checks.

Triton is optional. Without it (or on tensors that live on a CPU) every op runs its plain PyTorch twin. With
TRITON_INTERPRET=1 set before Triton is imported, ``implementation="triton"`` runs the kernels themselves on a CPU; that
is for tests, and slow.
"""

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace

import torch

_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver
_ANY_CARVEOUT = -1  # as the driver likes; 0 would ask for as much L1 as there is
IMPLEMENTATIONS = ("auto", "triton", "torch")
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32)


try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = gdc_launch_dependents = gdc_wait = None
    tl = SimpleNamespace(constexpr=object)

    def jit(function=None, **_):
        """The function as it is: without Triton no kernel is called."""
        return function or jit


INTERPRETED = triton is not None and type(tl.sum).__name__ == "InterpretedFunction"


@dataclass
class _Settings:
    """Settings of the whole process."""

    implementation: str = "auto"
    compile_only: bool = False


_settings = _Settings()


def set_implementation(name: str) -> None:
    """Override the choice between kernels and twins for the whole process: "auto" (default), "triton" or "torch"."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; accepted: {', '.join(IMPLEMENTATIONS)}")
    _settings.implementation = name


def set_compile_only(on: bool) -> None:
    """While on, `launch` compiles the kernel into Triton's cache and runs nothing (used by the tuner)."""
    _settings.compile_only = on


def use_triton(implementation: str | None, tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its kernel.

    Raises
    ------
    ValueError
        If the implementation is unknown, or "triton" cannot run here.
    """
    name = implementation or _settings.implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; accepted: {', '.join(IMPLEMENTATIONS)}")
    if name == "torch":
        return False
    if triton is None:
        if name == "triton":
            raise ValueError(
                "implementation='triton' needs the triton package, which cannot be imported; accepted: torch"
            )
        return False
    runnable = tensor.is_cuda or INTERPRETED or _settings.compile_only
    if name == "triton" and not runnable:
        raise ValueError("implementation='triton' on a CPU tensor needs TRITON_INTERPRET=1; accepted here: torch")
    return runnable if name == "triton" else tensor.is_cuda and runnable


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on the device, without waiting for what the device has to do before the copy."""
    if device.type != "cuda" or not len(tensor):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def launch(kernel, grid: tuple[int, ...], *arguments, pdl: bool, carveout: int = 0, registers: int = 0, **meta) -> None:
    """Run one kernel; with `pdl` it may start before its predecessor has ended (programmatic dependent launch).

    `carveout`: what `prefer_shared` asks for, from the second launch on; 0: as the driver likes, also where an earlier
    launch of the same kernel asked for more. `registers`: the most of a thread; 0: as the compiler likes.
    """
    if INTERPRETED:
        kernel[grid](*arguments, PDL=False, **{k: v for k, v in meta.items() if k != "num_warps"}, num_warps=4)
        return
    if registers:
        meta["maxnreg"] = registers
    if _settings.compile_only:
        kernel.warmup(*arguments, PDL=pdl, grid=grid, launch_pdl=pdl, **meta)
        return
    compiled = kernel[grid](*arguments, PDL=pdl, launch_pdl=pdl, **meta)
    if getattr(compiled, "carveout", 0) != carveout:
        prefer_shared(compiled.function, carveout or _ANY_CARVEOUT)
        compiled.carveout = carveout


def prefer_shared(function: int, percent: int) -> None:
    """Ask the driver to leave `percent` of a multiprocessor's memory to shared memory under a kernel, the rest to L1.

    -1: as it likes. Loads to registers are in flight through L1. Beside kernels that need much shared memory the driver
    would leave little of it. Changes speed only.

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    error = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, percent)
    if error:
        raise RuntimeError(f"the driver refuses a carve-out of {percent} percent for shared memory: error {error}")


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the previous one has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 3 elsewhere, so that interpreted tests see several programs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if _settings.compile_only else 3


def even_programs(tiles: int, most: int) -> int:
    """The fewest programs, at most `most`, with which tiles take as many waves as with `most` (wave quantisation)."""
    return -(-tiles // -(-tiles // most))


def dot_kind(dtype: torch.dtype):
    """What matrix units multiply: `dtype` itself; float32 when interpreted, where products of bfloat16 go wrong."""
    if INTERPRETED:
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def shared_bytes(device: torch.device) -> int:
    """Shared memory of a multiprocessor: 1 KB more than one program may ask for. Elsewhere than on CUDA an H100's."""
    if device.type == "cuda":
        return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"] + 1024
    return 228 * 1024


@jit
def prefetch_l2(pointer, first_byte, end_byte, most_bytes):
    """Prefetch at most `most_bytes` of bytes [first_byte, end_byte) of a buffer to L2; all multiples of 16.

    One thread issues one asynchronous bulk request: it costs no register and no shared memory.
    """
    size = tl.minimum(end_byte - first_byte, most_bytes).to(tl.int32)
    address = pointer.to(tl.int64) + first_byte
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        mov.b32 $0, 0;
        mov.u32 t, %tid.x;
        setp.ne.u32 p, t, 0;
        @p bra DONE;
        setp.le.s32 p, $2, 0;
        @p bra DONE;
        cp.async.bulk.prefetch.L2.global [$1], $2;
        DONE:
        }""",
        "=&r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def prefetch_next(program, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share):
    """Prefetch a program's share of what the next kernel reads first: the arguments of `Prefetch`."""
    share = program.to(tl.int64)
    prefetch_l2(next_a, share * next_a_share, next_a_end, next_a_share)
    prefetch_l2(next_b, share * next_b_share, next_b_end, next_b_share)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Check one argument of an op; None in `shape` accepts any size, and the last axis is always contiguous.

    Raises
    ------
    ValueError
        Naming the argument, what it is and what is accepted.
    """
    wanted = tuple("any" if n is None else n for n in shape)
    if tensor.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, tensor.shape)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {', '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; accepted: {device}, where the first input is")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; accepted: a last axis of stride 1")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; accepted: contiguous")


class Prefetch(tuple):
    """Buffers that the *next* kernel reads first and the present one prefetches to L2: (tensor, bytes), two at most."""

    def __new__(cls, *parts: tuple[torch.Tensor, int]):
        if len(parts) > 2:
            raise ValueError(f"{len(parts)} buffers to prefetch; accepted: at most 2")
        return super().__new__(cls, parts)

    @classmethod
    def of_slots(cls, keys: torch.Tensor, values: torch.Tensor, size: int) -> "Prefetch":
        """`size` bytes of what attention reads, half keys, half values; 0 for none."""
        return cls((keys, size // 2), (values, size // 2)) if size else NO_PREFETCH

    @classmethod
    def of_rows(cls, weight: torch.Tensor, size: int, middle: int = 0) -> "Prefetch":
        """`size` bytes of the first rows of a weight; 0 for none.

        With `middle` they come from both row ranges that the next kernel reads at once, in proportion to their rows.
        """
        if not size:
            return NO_PREFETCH
        if not middle:
            return cls((weight, size))
        share = size * middle // len(weight)
        return cls((weight, share), (weight[middle:], size - share))

    def arguments(self, fallback: torch.Tensor, programs: int) -> tuple:
        """(pointer, end byte, bytes a program) of both buffers as kernel arguments; `programs` share each of them."""
        out: list = []
        for tensor, wanted in (*self, (fallback, 0), (fallback, 0))[:2]:
            end = min(int(wanted), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize)
            end -= end % 16
            out += [tensor, end, -(-end // (programs * 16)) * 16]
        return tuple(out)


NO_PREFETCH = Prefetch()
