"""Measured plans: how each op of a decode step is launched, for the shapes that were tuned on an H100.

Every plan is the fastest that was found with the tuner of the kernels (`tools/tune_kernels`) on one NVIDIA H100 80GB
HBM3, 2,052 slots, with programmatic dependent launch. For one stream a shape between them gets the plan of the nearest
hidden size, cut down to what fits; nothing else depends on it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sinkstream.kernels.config import (
    MAX_SPLITS,
    AttentionConfig,
    AttentionLinearConfig,
    LinearConfig,
    MultiStreamConfig,
    PersistentConfig,
    PersistentNeoxConfig,
    count_programs,
    fit_attention,
    fit_attention_linear,
    fit_held,
    fit_multi_stream,
    fit_shared_memory,
)

MB = 1 << 20
PersistentKind = PersistentConfig | PersistentNeoxConfig
Config = LinearConfig | AttentionConfig | AttentionLinearConfig | MultiStreamConfig | PersistentKind


@dataclass(frozen=True)
class OpLaunch:
    """How one op is launched. Changes speed only.

    Attributes
    ----------
    config : configuration or None
        None: the op's own default.
    prefetch : int
        Bytes, read first by the next op, that this op prefetches to L2.
    pdl : bool
        Whether it may start before the previous kernel has ended (programmatic dependent launch).
    """

    config: Config | None = None
    prefetch: int = 0
    pdl: bool = False


LaunchPlan = Mapping[str, OpLaunch]

NEOX_OPS = ("qkv", "attention_up", "out")
LLAMA_OPS = ("qkv", "attention", "o", "gate_up", "down")
LAYERS = "layers"  # in place of the ops of all layers: one persistent kernel


def _attention_up(per_sm: int, late: bool = False) -> AttentionLinearConfig:
    """Attention in tiles of 32 slots, splits to be fitted; rows with their first tile in registers before the wait."""
    rows = LinearConfig(4, 512, 4, 1, per_sm, ahead=0, late=late, hold=True)
    return AttentionLinearConfig(AttentionConfig(tile=32, warps=4, late=True), rows)


_LARGE = {  # measured with wider heads than Pythia-2.8B has
    "qkv": OpLaunch(LinearConfig(2, 1024, 4, 3, 3, ahead=0, late=True), 6 * MB),
    "attention_up": OpLaunch(_attention_up(per_sm=3, late=True), 2 * MB),
    "out": OpLaunch(LinearConfig(1, 4096, 8, 3, 2, ahead=0, late=True), 4 * MB),
    "head": OpLaunch(LinearConfig(2, 512, 4, 3, 3, ahead=0)),
}
NEOX_PLANS = {  # by hidden size
    768: {  # Pythia-160M, float16: 0.212 ms, 1.978 times the byte floor
        "qkv": OpLaunch(LinearConfig(2, 1024, 4, 6, 3, ahead=1), 6 * MB),
        "attention_up": OpLaunch(_attention_up(per_sm=3, late=True), 2 * MB),
        "out": OpLaunch(LinearConfig(1, 4096, 4, 5, 4, ahead=0, late=True, fill=True)),
        "head": OpLaunch(LinearConfig(2, 512, 4, 6, 3, ahead=0, late=True, fill=True)),
    },
    1024: {  # Pythia-410M, float16: 0.474 ms, 1.574 times the byte floor
        "qkv": OpLaunch(LinearConfig(1, 1024, 2, 4, 6, ahead=1), 6 * MB),
        "attention_up": OpLaunch(_attention_up(per_sm=3, late=True), 2 * MB),
        "out": OpLaunch(LinearConfig(1, 2048, 4, 3, 3, ahead=0, late=True), 4 * MB),
        "head": OpLaunch(LinearConfig(4, 1024, 4, 3, 3, ahead=0)),
    },
    2048: _LARGE,  # Pythia-1.4B, float16: 1.136 ms, 1.133 times the byte floor
    2560: {  # Pythia-2.8B, float16: 2.097 ms, 1.062 times the byte floor
        "qkv": OpLaunch(LinearConfig(2, 1024, 4, 3, 3, ahead=0, late=True), 6 * MB),
        "attention_up": OpLaunch(_attention_up(per_sm=4), 2 * MB),
        "out": OpLaunch(LinearConfig(1, 4096, 8, 3, 2, ahead=0, late=True, hold=True), 4 * MB),
        "head": OpLaunch(LinearConfig(2, 512, 4, 3, 3, ahead=0)),
    },
    4096: _LARGE,  # Pythia-6.9B, float16: 1.038 times the byte floor in an engine
}
LLAMA_PLANS = {
    2048: {  # Llama-3.2-1B, bfloat16: 0.953 ms, 1.133 times the byte floor
        "qkv": OpLaunch(LinearConfig(4, 1024, 4, 4, 3, ahead=0, fill=True), 4 * MB),
        "attention": OpLaunch(AttentionConfig(16, 128, 4, dot=True, columns=32)),
        "o": OpLaunch(LinearConfig(2, 1024, 2, 1, 8, ahead=0, hold=True)),
        "gate_up": OpLaunch(LinearConfig(2, 1024, 4, 8, 2, ahead=0, fill=True), 6 * MB),
        "down": OpLaunch(LinearConfig(2, 1024, 8, 3, 2, ahead=0, late=True, fill=True), 4 * MB),
        "head": OpLaunch(LinearConfig(4, 1024, 8, 3, 2, ahead=0, late=True, fill=True)),
    },
    4096: {  # Llama-3.1-8B, bfloat16: 5.340 ms, 1.055 times the byte floor
        "qkv": OpLaunch(LinearConfig(4, 1024, 4, 3, 1, ahead=0)),
        "attention": OpLaunch(AttentionConfig(16, 128, 4, dot=True, columns=64)),
        "o": OpLaunch(LinearConfig(8, 1024, 8, 1, 2, ahead=0, late=True, hold=True), 2 * MB),
        "gate_up": OpLaunch(LinearConfig(1, 1024, 4, 3, 2, ahead=1, late=True), 6 * MB),
        "down": OpLaunch(LinearConfig(1, 2048, 8, 3, 2, ahead=0)),
        "head": OpLaunch(LinearConfig(8, 512, 8, 1, 2, ahead=0)),
    },
}


_Several = dict[int, dict[int, dict[str, OpLaunch]]]  # by hidden size, this one only, then by streams
_IN = OpLaunch(MultiStreamConfig(16, 128, 2, 6, 5, parts=2), pdl=True)
_FIRST = OpLaunch(MultiStreamConfig(16, 256, 2, 5, 4, late=False, parts=2), pdl=True)
_DOWN = OpLaunch(MultiStreamConfig(16, 512, 4, 5, 2, parts=4), pdl=True)
_TALL = OpLaunch(MultiStreamConfig(32, 256, 4, 4, 3, parts=4), pdl=True)
_GROUPED = AttentionConfig(16, 128, 4, dot=True, columns=64)
_LLAMA = {  # the products of several streams of Llama-3.2-1B
    "qkv": _FIRST,
    "o": OpLaunch(MultiStreamConfig(16, 512, 4, 2, 1, late=False, parts=4, held=True), 8 * MB, pdl=True),
    "gate_up": OpLaunch(MultiStreamConfig(16, 512, 4, 3, 2, ahead=0, parts=4), 4 * MB, pdl=True),
    "down": _DOWN,
    "head": OpLaunch(MultiStreamConfig(16, 2048, 8, 3, 1, late=False, parts=8, held=True), pdl=True),
}
SEVERAL_NEOX_PLANS: _Several = {
    2560: {  # Pythia-2.8B, float16; `qkv` has the rows of the up-projection too
        2: {  # 0.982 of the time with 5 splits and the compiler's 96 registers (H200)
            "qkv": _IN,
            "attention_up": OpLaunch(AttentionConfig(6, 32, 4, late=True, registers=128), pdl=True),
            "out": OpLaunch(MultiStreamConfig(16, 512, 4, 4, 2, ahead=2048, parts=4), pdl=True),
            "head": _IN,
        },
        8: {  # 0.959 of the time with the compiler's 96 registers (H200)
            "qkv": _IN,
            "attention_up": OpLaunch(AttentionConfig(3, 32, 4, registers=112), pdl=True),
            "out": OpLaunch(MultiStreamConfig(16, 512, 4, 4, 2, parts=4), pdl=True),
            "head": _TALL,
        },
    },
}
SEVERAL_LLAMA_PLANS: _Several = {
    2048: {  # Llama-3.2-1B, bfloat16
        # In an engine 1.104 ms, 1.287 times the byte floor; the plan before took 1.150 ms beside it
        2: _LLAMA | {"attention": OpLaunch(_GROUPED, pdl=True)},
        # In an engine 1.278 ms, 1.292 times the byte floor; without the carve-out 1.304 ms, the plan before 1.368 ms
        # Also for more than 16, whose attention starts without dependent launch: the compiler takes 106 registers there
        # by itself, with which four programs fit a multiprocessor instead of five: 32 streams take 4 % longer (H200)
        8: _LLAMA | {"attention": OpLaunch(replace(_GROUPED, carveout=45, registers=96), pdl=True)},
    },
}


PERSISTENT_LLAMA_PLANS: dict[int, OpLaunch] = {  # by hidden size, this one only; one stream
    576: OpLaunch(PersistentConfig()),  # SmolLM2-135M, bfloat16: 0.408 ms, 3.89 times the byte floor; the ops 0.473 ms
}
PERSISTENT_NEOX_PLANS: dict[int, OpLaunch] = {  # likewise, with bytes of the head to prefetch; float16, H100
    768: OpLaunch(  # Pythia-160M: 0.192 ms, 1.79 times the byte floor; the ops 0.232 ms
        PersistentNeoxConfig(warps=4, per_sm=2, rows=4, out_rows=4), 2 * MB
    ),
    1024: OpLaunch(PersistentNeoxConfig(lead=2, early=0), 16 * MB),  # Pythia-410M: 0.460 ms, 1.52 times; 0.514 ms
}


@dataclass(frozen=True)
class Sizes:
    """What a plan is fitted to: sizes of a model, of its cache, and of the GPU (bytes of shared memory each)."""

    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    ring: int
    pinned_slots: int
    shared_bytes: int
    multiprocessors: int


def measured_plan(neox: bool, sizes: Sizes) -> dict[str, OpLaunch]:
    """A plan for every op of a layer and for "head", for a GPU with programmatic dependent launch."""
    plans = NEOX_PLANS if neox else LLAMA_PLANS
    nearest = min(plans, key=lambda hidden: abs(math.log(hidden / sizes.hidden)))
    return {op: replace(plan, config=fitted(op, plan.config, sizes), pdl=True) for op, plan in plans[nearest].items()}


def several_plan(neox: bool, sizes: Sizes, streams: int) -> dict[str, OpLaunch]:
    """A plan for several streams: what was measured for this hidden size and the nearest number of streams.

    Elsewhere the ops choose their configurations themselves; attention of grouped queries is cut up as for one stream.
    """
    plan = {op: OpLaunch(pdl=True) for op in (*(NEOX_OPS if neox else LLAMA_OPS), "head")}
    if not neox:
        plan["attention"] = measured_plan(neox, sizes)["attention"]
    measured = (SEVERAL_NEOX_PLANS if neox else SEVERAL_LLAMA_PLANS).get(sizes.hidden)
    if measured:
        nearest = min(measured, key=lambda n: (abs(math.log(n / streams)), -n))
        plan |= {
            op: replace(launch, config=fitted(op, launch.config, sizes, streams))
            for op, launch in measured[nearest].items()
        }
    return plan


def fitted(op: str, config, sizes: Sizes, streams: int = 1):
    """The configuration of an op, cut down to what fits these sizes."""
    slots = (sizes.head_dim, sizes.ring, sizes.pinned_slots)
    if isinstance(config, MultiStreamConfig) and config.held:
        width = sizes.query_heads * sizes.head_dim if op == "o" else sizes.hidden
        return fit_held(config, streams, width, sizes.shared_bytes)
    if isinstance(config, MultiStreamConfig):
        return fit_multi_stream(config, op == "gate_up", streams, sizes.shared_bytes)
    if isinstance(config, AttentionConfig):
        return fit_attention(config, sizes.query_heads // sizes.kv_heads, *slots)
    if op == "attention_up":
        attention = replace(config.attention, splits=_balanced_splits(config, sizes))
        return fit_attention_linear(replace(config, attention=attention), sizes.hidden, *slots, sizes.shared_bytes)
    context = sizes.query_heads * sizes.head_dim
    widths = {"gate_up": [sizes.hidden] * 2, "o": [context], "down": [sizes.intermediate]}
    widths["out"] = [context, sizes.intermediate]
    return fit_shared_memory(config, sizes.shared_bytes, *widths.get(op, [sizes.hidden]))


def _balanced_splits(config: AttentionLinearConfig, sizes: Sizes) -> int:
    """Splits with which attention and the linear layer in its kernel end together, all programs in one wave.

    The model of a program's time is the number of bytes that it reads. Those of attention have a larger weight, because
    attention waits for the previous kernel, rotates and combines; the weight is fitted to Pythia-2.8B at twelve caps
    from 512 to 32,768.
    """
    head, rows = 2 * sizes.ring * sizes.head_dim, sizes.hidden * sizes.intermediate
    programs, weight = sizes.multiprocessors * config.linear.per_sm, 1.8 if config.linear.per_sm > 3 else 1.3

    def time(splits: int) -> float:
        _, of_ring, of_pinned = count_programs(splits, sizes.ring, sizes.pinned_slots)
        left = programs - sizes.kv_heads * (of_ring + of_pinned)
        return max(weight * head / of_ring, rows / left) if left > 0 else math.inf

    return min(range(1, MAX_SPLITS + 1), key=time)
