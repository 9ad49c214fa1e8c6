"""Measure and tune the ops of the decode step: every kernel against its own byte floor, then whole steps.

    python tools/tune_kernels.py --seconds 230 --out ops.json

The ceiling comes first: the bandwidth of a large device-to-device copy. Every op is checked against its twin (with
poisoned outputs) and timed over all layers of a model shape, so that nothing stays in L2, under a CUDA graph, median of
event times. Then whole steps under one graph, with and without programmatic dependent launch, from the best
configurations on: each knob is tried in turn and kept if the step gets faster. With --climb this begins at the measured
plan (`sinkstream.kernels.plans`) instead, or at a plan in which every ring is filled before the wait, and every
neighbour of every configuration is tried until none is faster. With --streams N the ops of N streams are measured, each
alone and in a step, as they are launched by themselves.
Several processes compile the kernels.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import product
from multiprocessing import get_context

import torch

from sinkstream.kernels import (
    NO_PREFETCH,
    AttentionConfig,
    BesideConfig,
    LinearConfig,
    Prefetch,
    Workspace,
    attention_beside,
    attention_decode,
    begin_step,
    linear_residual,
    norm_linear,
)
from sinkstream.kernels.config import MAX_SHARED
from sinkstream.kernels.likeliest import Tiles
from sinkstream.kernels.plans import LLAMA_OPS, MB, NEOX_OPS, Sizes, fitted, measured_plan
from sinkstream.kernels.runtime import set_compile_only
from sinkstream.measure.bandwidth import memory_bandwidth
from sinkstream.models.shapes import SHAPES as PUBLISHED
from sinkstream.models.shapes import shape_config

SINK = 4
H100 = (228 * 1024, 132)  # shared memory of a multiprocessor, multiprocessors
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its streams; `rotary` is the number of rotated dimensions of a head."""

    name: str
    neox: bool
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rotary: int
    dtype: torch.dtype
    cap: int = 2052
    streams: int = 1

    @classmethod
    def published(cls, name: str) -> "Shape":
        """The shape that `random:NAME` loads; GPT-NeoX in float16, Llama-like ones in bfloat16."""
        config = shape_config(name)
        neox, heads = config.model_type == "gpt_neox", config.num_attention_heads
        head_dim = config.hidden_size // heads
        rotary = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        dtype = torch.float16 if neox else torch.bfloat16
        return cls(
            name, neox, config.num_hidden_layers, config.hidden_size, heads,
            getattr(config, "num_key_value_heads", heads), head_dim, config.intermediate_size, config.vocab_size,
            rotary, dtype,
        )  # fmt: skip

    @property
    def ops(self) -> list[str]:
        """Kernels of a layer, in order."""
        return list(NEOX_OPS if self.neox else LLAMA_OPS)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every weight."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.neox:
            sizes = {"qkv": (q + 2 * kv, h), "beside": (self.intermediate, h), "out": (h, q + self.intermediate)}
        else:
            sizes = {"qkv": (q + 2 * kv, h), "o": (h, q), "gate_up": (2 * self.intermediate, h)}
            sizes["down"] = (h, self.intermediate)
        return sizes | {"head": (self.vocab, h)}

    def bytes_of(self, op: str) -> int:
        """Bytes that one call must read: weights, or keys and values."""
        cached = 2 * self.streams * self.kv_heads * self.cap * self.head_dim * 2
        cached = cached if op in ("attention", "beside") else 0
        return cached + (0 if op == "attention" else self.widths[op][0] * self.widths[op][1] * 2)

    @property
    def sizes(self) -> Sizes:
        """What a plan is fitted to, on an H100."""
        ring = self.cap - SINK
        return Sizes(
            self.hidden, self.intermediate, self.heads, self.kv_heads, self.head_dim, ring, SINK, *H100
        )  # fmt: skip

    @property
    def step_bytes(self) -> int:
        return self.layers * sum(map(self.bytes_of, self.ops)) + self.bytes_of("head")


SHAPES = {
    s.name: s
    for s in (
        *map(Shape.published, PUBLISHED),
        Shape("smoke-neox", True, 2, 160, 2, 2, 80, 320, 200, 20, torch.float16, 45),
        Shape("smoke-llama", False, 2, 128, 4, 2, 64, 256, 200, 64, torch.bfloat16, 45),
    )
}
SHARES = {"pythia-2.8b": 0.55, "llama-3.2-1b": 0.5, "llama-3.1-8b": 1.0}  # of the time left when its turn comes


class Model:
    """Random weights, keys and values in a model's shape, and its ops as calls on one layer.

    On the CPU (where workers compile) there is one layer of uninitialised memory.
    """

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, torch.device(device)
        self.compiling = device == "cpu" and not shape.name.startswith("smoke")
        s, layers = shape, 1 if self.compiling else shape.layers
        widths = {name: size for name, size in s.widths.items() if name != "head"}
        self.weights = [
            {n: self._make(*size, scale=size[1] ** -0.5) for n, size in widths.items()} for _ in range(layers)
        ]
        self.head = self._make(*s.widths["head"], scale=s.hidden**-0.5)
        self.embedding = self._make(1000, s.hidden)
        self.gamma = 1 + self._make(2, s.hidden, scale=0.1)
        self.beta = self._make(2, s.hidden, scale=0.1)
        self.biases = {name: self._make(size[0], scale=0.02) for name, size in widths.items()}
        kv = (s.streams, s.kv_heads, s.cap, s.head_dim)
        self.keys, self.values = ([self._make(*kv) for _ in range(layers)] for _ in "kv")
        at, ring = s.cap - 1, s.cap - SINK
        row = [SINK + 7, at - SINK, at, SINK, 8 % ring, ring, 3, 0]
        self.scalars = torch.tensor([row] * s.streams, dtype=torch.int32, device=self.device)
        self.plan, self.cursor = self.scalars[None].clone(), torch.tensor([-1] * s.streams, device=self.device)
        self.tokens = torch.tensor([3] * s.streams, device=self.device)
        self.inv_freq = (1e4 ** (-torch.arange(s.rotary // 2).double() / (s.rotary // 2))).to(self.device)
        self.qkv_rows = (s.heads + 2 * s.kv_heads) * s.head_dim
        self.first = self._make(s.streams, s.widths[s.ops[0]][0])
        self.hidden = [self._make(s.streams, s.hidden) for _ in range(2)]
        self.context = self._make(s.streams, s.heads * s.head_dim)
        self.middle = self._make(s.streams, s.intermediate)
        self.logits = self._make(s.streams, s.vocab).float()
        self.rope = torch.zeros(s.streams, 2, 2, s.rotary // 2, device=self.device)
        self.rope[:, :, 0] = 1.0
        self.workspace = Workspace(s.streams, s.heads, s.kv_heads, s.head_dim, self.device)
        self.tiles = Tiles(s.streams, s.vocab, self.device)

    def _make(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        empty = torch.empty(*size, dtype=self.shape.dtype, device=self.device)
        return empty if self.compiling else empty.normal_().mul_(scale)

    def outputs(self, op: str) -> list[torch.Tensor]:
        """Where a call of `op` leaves its results when it is measured alone."""
        return {"qkv": [self.first], "attention": [self.context], "gate_up": [self.middle],
                "beside": [self.context, self.middle], "head": [self.logits]}.get(op, [self.hidden[1]])  # fmt: skip

    def call(
        self,
        op: str,
        layer: int,
        config,
        *,
        flip: bool = False,
        wait: bool = True,
        prefetch=NO_PREFETCH,
        pdl=False,
        backend="triton",
    ):
        """One op of one layer. The residual goes from one hidden buffer to the other, back again with `flip`."""
        s = self.shape
        x, y = self.hidden[::-1] if flip else self.hidden
        how = {"config": config, "prefetch": prefetch, "pdl": pdl, "backend": backend}
        second = int(op in ("beside", "gate_up"))
        norm = {"norm_weight": self.gamma[second], "norm": "layer" if s.neox else "rms"}
        norm["norm_bias"] = self.beta[second] if s.neox else None
        if op in ("attention", "beside"):
            order = "per-head" if s.neox else "blocks"
            arguments = self.first, self.keys[layer], self.values[layer], self.scalars, self.rope
            how |= {"query_heads": s.heads, "pinned_slots": SINK, "order": order, "workspace": self.workspace}
            if op == "attention":
                return attention_decode(*arguments, out=self.context, **how)
            return attention_beside(
                *arguments, x, self.weights[layer][op], **norm, bias=self.biases[op], out=self.context,
                linear_out=self.middle, wait=wait, **how,
            )  # fmt: skip
        if op == "head":
            return norm_linear(x, self.head, **norm, out=self.logits, **how)
        weight, bias = self.weights[layer][op], self.biases[op] if s.neox else None
        if op in ("qkv", "gate_up"):
            gated = op == "gate_up"
            how |= {"activation": "swiglu" if gated else "none", "out": self.middle if gated else self.first}
            return norm_linear(x, weight, **norm, bias=bias, **how)
        a, f = (self.middle if op == "down" else self.context), None
        if op == "out":
            f = self.middle
        return linear_residual(a, weight, f=f, bias=bias, residual=x, out=y, **how)

    def next_buffers(self, op: str, layer: int, size: int) -> Prefetch:
        """What the kernel after `op` reads first, `size` bytes in all."""
        s = self.shape
        order = [*s.ops, s.ops[0]]
        after = order[order.index(op) + (2 if op == "attention" else 1)]  # o asks for its own rows while it waits
        if after in ("attention", "beside"):
            return Prefetch.of_slots(self.keys[layer], self.values[layer], size)
        layer += after == s.ops[0]
        if layer >= len(self.weights):
            return Prefetch.of_rows(self.head, size)
        middle = s.intermediate if after == "gate_up" else 0
        return Prefetch.of_rows(self.weights[layer][after], size, middle)

    def step(self, plan: dict, *, leave_out: str = "", backend: str = "triton") -> None:
        """A whole step. `plan`: configurations by op, "pdl", and "next": bytes fetched for the next kernel, by op."""
        begin_step(
            self.tokens, self.logits, self.plan, self.cursor, self.embedding, self.inv_freq, tiles=self.tiles,
            scalars=self.scalars, hidden=self.hidden[0], rope=self.rope, backend=backend,
        )  # fmt: skip
        flip, started = False, False
        for layer in range(len(self.weights)):
            for op in self.shape.ops:
                if op == leave_out:
                    continue
                prefetch = self.next_buffers(op, layer, plan["next"].get(op, 0))
                pdl = plan["pdl"] and started
                wait = op != "beside" or leave_out == "qkv" or not getattr(plan["qkv"], "late", False)
                self.call(op, layer, plan[op], flip=flip, wait=wait, prefetch=prefetch, pdl=pdl, backend=backend)
                flip ^= op in ("out", "o", "down")
                started = True
        if leave_out != "head":
            self.call("head", 0, plan["head"], flip=flip, pdl=plan["pdl"], backend=backend)


def linear_grid(rows, columns, warps, stages, per_sm, width: int, widest: int) -> list[LinearConfig]:
    """Combinations that fit; `width`: columns of the weight, `widest`: registers a thread may use for them."""
    found = []
    for r, c, w, s, p in product(rows, columns, warps, stages, per_sm):
        chunks = -(-width // c)
        along = min(w, max(1, c // 256))  # warps side by side along a row; each thread keeps c / (32 * along) inputs
        registers = chunks * c // (32 * along) + 2 * r * c // (32 * w)
        shared = s * r * chunks * c * 2 if s > 1 else 0
        if c < 256 * along or r * along < w or r * along > 8 * w or registers > widest:
            continue
        if shared * p > 220_000 or w * p > 32 or (s == 1 and w * p < 8) or (s > 1 and shared * p < 40_000):
            continue
        found.append(LinearConfig(r, c, w, s, p))
    return found


def candidates(shape: Shape, op: str) -> list:
    """Configurations to try, the most promising first."""
    if op == "attention":
        return attention_grid(shape)
    if op == "beside":
        return beside_grid()
    width = shape.widths[op][1] * (2 if op == "gate_up" else 1)
    if shape.widths[op][1] > 5000 or op == "out":
        grid = linear_grid((1, 2, 4), (1024, 2048, 4096), (4, 8, 16), (4, 3, 6, 2, 1), (1, 2), width, 130)
    else:
        grid = linear_grid((4, 2, 8, 1), (256, 512, 1024), (4, 8), (4, 3, 6, 1), (1, 2, 3), width, 130)
    pipelined = [c for c in grid if c.stages > 1]
    plain = [c for c in grid if c.stages == 1]
    most = 30 if op == "out" else 16
    return spread(pipelined, most) + spread(plain, most // 4)


def spread(items: list, most: int) -> list:
    """At most `most` items, evenly spread over the list."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def beside_grid() -> list[BesideConfig]:
    """Configurations of attention and the rows beside it: (splits, tile, warps), (rows, columns, stages, per_sm)."""
    found = []
    rows = [(4, 512, 3, 3), (4, 512, 1, 3), (4, 256, 4, 3), (8, 512, 1, 3), (2, 512, 4, 3), (4, 512, 2, 4)]
    attention = [(4, 64, 4), (4, 32, 4), (8, 32, 4), (3, 64, 4), (6, 32, 4), (2, 64, 4)]
    for splits, tile, warps in attention:
        for r, c, stages, per_sm in rows:
            if tile == 64 and per_sm > 3:
                continue
            parts = AttentionConfig(splits, tile, warps), LinearConfig(r, c, warps, stages, per_sm, late=True)
            found.append(BesideConfig(*parts))
    wide = [(4, 64, 8, 4, 512, 1, 2), (4, 64, 8, 8, 512, 1, 2), (4, 64, 8, 4, 512, 3, 2), (2, 64, 8, 4, 1024, 1, 2)]
    return found + [
        BesideConfig(AttentionConfig(s, t, w), LinearConfig(r, c, w, stages, per_sm, late=True))
        for s, t, w, r, c, stages, per_sm in wide
    ]


def read_config(op: str, fields: dict):
    """A configuration from its dictionary; None as it is."""
    if fields is None:
        return None
    if op == "beside":
        return BesideConfig(AttentionConfig(**fields["attention"]), LinearConfig(**fields["linear"]))
    return (AttentionConfig if op == "attention" else LinearConfig)(**fields)


def changed(config, **changes):
    """A configuration with other values; beside attention those of the rows."""
    if isinstance(config, BesideConfig):
        return replace(config, linear=replace(config.linear, **changes))
    return replace(config, **changes)


def neighbours_of(config) -> list:
    """Configurations that differ in one field."""
    if isinstance(config, BesideConfig):
        parts = (neighbours_of(config.attention), neighbours_of(config.linear))
        attention, linear = ([c for c in part if c.warps == config.linear.warps] for part in parts)
        return [replace(config, attention=c) for c in attention] + [replace(config, linear=c) for c in linear]
    if isinstance(config, LinearConfig):
        scaled, counted = ["rows", "columns", "warps"], ["stages", "per_sm", "ahead"]
    else:
        scaled, counted = ["splits", "tile", "warps", *(["columns"] if config.dot else [])], []
    found = [replace(config, **{f: max(1, int(getattr(config, f) * by))}) for f in scaled for by in (2, 0.5)]
    found += [
        replace(config, **{f: max(int(f != "ahead"), getattr(config, f) + by)}) for f in counted for by in (-1, 1)
    ]
    found += [replace(config, **{f: not getattr(config, f)}) for f in ("late", "evict") if hasattr(config, f)]
    if isinstance(config, LinearConfig):
        rows, warps = max(1, config.rows // 2), max(1, config.warps // 2)
        found.append(replace(config, rows=rows, warps=warps, per_sm=2 * config.per_sm))  # half as large, twice as many
        found += [replace(config, hold=early == "hold", fill=early == "fill") for early in ("", "hold", "fill")]
    return [c for c in dict.fromkeys(found) if c != config and _is_sensible(c)]


def _is_sensible(config) -> bool:
    if isinstance(config, LinearConfig):
        return config.columns >= 256 and config.warps <= 16
    return config.tile >= 16 and config.splits <= 60 and config.columns >= 16


def attention_grid(shape: Shape) -> list[AttentionConfig]:
    """Configurations of the attention kernel: (splits, tile, warps, stages)."""
    if shape.heads == shape.kv_heads:
        plain = [
            (8, 64, 4, 0), (4, 64, 4, 0), (8, 128, 8, 0), (4, 128, 8, 0), (8, 256, 8, 0), (16, 64, 4, 0),
            (16, 128, 8, 0), (16, 128, 4, 0), (12, 64, 4, 0), (6, 64, 4, 0), (8, 32, 2, 0), (16, 32, 2, 0),
            (16, 64, 2, 0), (8, 64, 4, 3), (8, 64, 4, 4), (4, 64, 4, 4), (4, 128, 8, 3), (16, 64, 4, 2),
            (8, 128, 8, 2), (4, 256, 8, 0), (12, 32, 2, 0), (4, 64, 4, 6), (12, 128, 8, 0), (32, 64, 4, 0),
        ]  # fmt: skip
        dots = [(8, 64, 4, 3), (8, 128, 8, 3), (4, 64, 4, 4), (8, 64, 4, 0), (16, 64, 4, 2), (16, 128, 8, 0)]
        return [AttentionConfig(*c) for c in plain] + [AttentionConfig(*c, dot=True) for c in dots]
    dots = [
        (16, 64, 4, 0), (16, 128, 4, 0), (32, 64, 4, 0), (16, 64, 4, 3), (16, 128, 4, 2), (32, 64, 2, 0),
        (8, 128, 8, 0), (8, 64, 4, 4), (16, 128, 8, 0), (24, 64, 4, 0), (16, 64, 2, 0), (32, 32, 2, 0),
        (16, 64, 8, 0), (8, 64, 4, 0), (32, 64, 4, 2), (16, 32, 4, 4),
    ]  # fmt: skip
    widths = (64, 32) if shape.head_dim == 64 else (128, 64)
    return [AttentionConfig(*c, dot=True, columns=w) for w in widths for c in (dots if w == widths[0] else dots[:4])]


def compile_one(name: str, op: str, config, pdl: bool, ahead_next: bool) -> None:
    """Compile one kernel into Triton's cache on disk; runs in a worker process."""
    set_compile_only(True)
    model = _models.setdefault(name, None) or Model(SHAPES[name], "cpu")
    _models[name] = model
    prefetch = model.next_buffers(op, 0, 1 << 20) if ahead_next and op != "head" else NO_PREFETCH
    model.call(op, 0, config, wait=not pdl, prefetch=prefetch, pdl=pdl)


_models: dict = {}


class Bench:
    """One shape: checks, timings, tuning. `pool` is None on a CPU, where everything runs once, in the interpreter."""

    def __init__(self, shape: Shape, device: str, pool, deadline: float, copy_gbs: float):
        self.shape, self.pool, self.deadline, self.copy = shape, pool, deadline, copy_gbs
        self.model = Model(shape, device)
        self.cuda = self.model.device.type == "cuda"
        self.inputs, self.expected = self.references()
        self.rows: list[dict] = []
        self.steps: list[dict] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def time_us(self, fn, repeats: int = 9) -> float:
        """Median microseconds of `fn` under a CUDA graph."""
        if not self.cuda:
            start = time.perf_counter()
            fn()
            return 1e6 * (time.perf_counter() - start)
        fn()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        for _ in range(2):
            graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in "ab"]
        for a, b in zip(*events):
            a.record()
            graph.replay()
            b.record()
        torch.cuda.synchronize()
        times = sorted(1e3 * a.elapsed_time(b) for a, b in zip(*events))
        del graph
        return times[repeats // 2]

    def references(self) -> tuple[list[tuple], dict]:
        """What checks start from: every buffer with its content, and what the twin of every op makes of that.

        The ops feed each other through these buffers, and a timing leaves another layer's results in them.
        """
        model, expected = self.model, {}
        for op in self.shape.ops:
            model.call(op, 0, None, backend="torch")  # once round, so that all inputs are of a layer's kind
        buffers = [model.first, model.context, model.middle, *model.hidden]
        inputs = [(buffer, buffer.clone()) for buffer in buffers]
        for op in [*self.shape.ops, "head"]:
            for buffer, content in inputs:
                buffer.copy_(content)
            model.call(op, 0, None, backend="torch")
            expected[op] = torch.cat(model.outputs(op), 1).double()
        return inputs, expected

    def check(self, op: str, config, **how) -> float:
        """Relative error of one call against the twin, inputs restored, output poisoned. Raises if it is too large."""
        outputs, reference = self.model.outputs(op), self.expected[op]
        for buffer, content in self.inputs:
            buffer.copy_(content)
        for _ in range(2):  # twice: counters must be left as they were found
            for output in outputs:
                output.fill_(float("nan"))
            self.model.call(op, 0, config, **how)
        error = float((torch.cat(outputs, 1).double() - reference).norm() / reference.norm())
        if not error < TOLERANCE[self.shape.dtype]:
            raise ArithmeticError(f"relative error {error:.2g}")
        return error

    def measure(self, op: str, config, pdl: bool = False) -> dict:
        """Check and time one configuration over all layers; an error is kept and reported, not raised."""
        row = {"shape": self.shape.name, "streams": self.shape.streams, "op": op, "pdl": pdl}
        row["config"] = None if config is None else asdict(config)
        try:
            how = {"pdl": pdl, "wait": not pdl}
            row["error"] = self.check(op, config, **how)
            calls = 1 if op == "head" else self.shape.layers
            us = self.time_us(lambda: [self.model.call(op, i, config, **how) for i in range(calls)]) / calls
            row |= {"us": us, "gbs": self.shape.bytes_of(op) / us / 1e3}
            row["share"] = row["gbs"] / self.copy
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem).strip()[:160]}"
            if "CUDA error" in str(problem) or "illegal" in str(problem):
                raise
        self.rows.append(row)
        return row

    def compiled(self, jobs: list[tuple], limit_s: float):
        """Yield (op, config, pdl, next) as their kernels become available."""
        if self.pool is None:
            yield from jobs
            return
        futures = {self.pool.submit(compile_one, self.shape.name, *job): job for job in jobs}
        try:
            for future in as_completed(futures, timeout=max(1.0, limit_s)):
                job = futures[future]
                if future.exception() is None:
                    yield job
                else:
                    self.rows.append({"op": job[0], "config": asdict(job[1]), "failed": str(future.exception())[-160:]})
        except TimeoutError:
            print(f"  time is up with {sum(not f.done() for f in futures)} kernels not compiled")
        finally:
            for future in futures:
                future.cancel()

    def best(self, op: str, pdl: bool, count: int = 1) -> list:
        """The fastest configurations so far."""
        rows = [r for r in self.rows if r["op"] == op and r.get("pdl") == pdl and "us" in r]
        return [read_config(op, r["config"]) for r in sorted(rows, key=lambda r: r["us"])[:count]]

    def sweep(self, limit_s: float) -> None:
        """Every op alone, without PDL; the best again with it."""
        ops, stop = [*self.shape.ops, "head"], time.monotonic() + limit_s
        grids = {op: candidates(self.shape, op)[: 2 if self.pool is None else None] for op in ops if op != "head"}
        longest = max(map(len, grids.values()))
        jobs = [(op, g[i], False, False) for i in range(longest) for op, g in grids.items() if i < len(g)]
        for op, config, *_ in self.compiled(jobs, limit_s):
            self.measure(op, config)
            if time.monotonic() > stop:
                break
        source = self.shape.ops[0]
        jobs = [("head", c, False, False) for c in self.best(source, False, 4)]
        jobs += [(op, c, True, False) for op in ops if op != "head" for c in self.best(op, False, 5)]
        jobs += [("head", c, True, False) for c in self.best(source, False, 4)]
        for op, config, pdl, _ in self.compiled(jobs, 40):
            self.measure(op, config, pdl)

    def time_step(self, plan: dict, label: str, **how) -> float:
        """Milliseconds of a whole step, recorded."""
        row = {"shape": self.shape.name, "streams": self.shape.streams, "label": label} | how
        row["plan"] = self.describe(plan)
        try:
            row["ms"] = self.time_us(lambda: self.model.step(plan, **how), repeats=15) / 1e3
            row["over_floor"] = row["ms"] / (self.shape.step_bytes / self.copy / 1e6)
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem).strip()[:160]}"
            if "CUDA error" in str(problem) or "illegal" in str(problem):
                raise
        self.steps.append(row)
        return row.get("ms", float("inf"))

    @staticmethod
    def describe(plan: dict) -> dict:
        return {k: asdict(v) if is_dataclass(v) else v for k, v in plan.items()}

    def check_step(self, plan: dict) -> float:
        """Relative error of the logits of a whole step against the same step through the twins."""
        self.model.logits.fill_(float("nan"))
        self.model.step(plan)
        found = self.model.logits.double().clone()
        self.model.step(plan, backend="torch")
        return float((found - self.model.logits.double()).norm() / self.model.logits.double().norm())

    def measure_streams(self) -> None:
        """Every op and whole steps of several streams, as launched without a configuration."""
        ops = [*self.shape.ops, "head"]
        for op, pdl in product(ops, (False, True)):
            self.measure(op, None, pdl)
        self.table()
        for pdl in (False, True):
            plan = dict.fromkeys(ops) | {"pdl": pdl, "next": {}}
            ms = self.time_step(plan, f"{self.shape.streams} streams{', PDL' if pdl else ''}")
            print(
                f"  {self.steps[-1]['label']} {ms:.3f} ms, error of the logits {self.check_step(plan):.2g}", flush=True
            )

    def tune_step(self) -> dict:
        """Whole steps: first the best of each op, then one knob after the other."""
        ops = [*self.shape.ops, "head"]
        plan = {op: (self.best(op, True) or self.best(op, False))[0] for op in ops} | {"pdl": False, "next": {}}
        plain = {op: (self.best(op, False) or self.best(op, True))[0] for op in ops} | {"pdl": False, "next": {}}
        best = self.time_step(plain, "best of each op")
        print(f"  no PDL {best:.3f} ms, error of the logits {self.check_step(plain):.2g}", flush=True)
        plan["pdl"] = True
        if self.shape.neox:  # so that the rows beside attention need not wait
            plan["qkv"] = replace(plan["qkv"], late=True)
        best = self.time_step(plan, "PDL")
        best = self.keep_what_helps(plan, best, self.trials(plan, ops))
        return self.finish(plan, best)

    def climb(self) -> dict:
        """Whole steps from the best whole plan on: every neighbour in turn, until a whole round brings nothing."""
        plan = self.measured_plan()
        best, before = self.time_step(plan, "measured plan"), float("inf")
        print(f"  measured plan {best:.3f} ms", flush=True)
        for label, trial in self.filled_plans(plan):
            ms = self.time_step(trial, label)
            print(f"  {label} {ms:.3f} ms", flush=True)
            if ms < best * 1.01:  # slower by so little, it still has more to gain from its neighbours
                plan, best = trial, ms
        while best < before and self.left() > 10:
            before = best
            best = self.keep_what_helps(plan, best, self.neighbours(plan))
        return self.finish(plan, best)

    def measured_plan(self) -> dict:
        """The measured plan of the nearest width, as `Model.step` takes it."""
        measured = measured_plan(self.shape.neox, self.shape.sizes)
        plan = {op: p.config for op, p in measured.items()}
        return plan | {"pdl": True, "next": {op: p.prefetch for op, p in measured.items() if p.prefetch}}

    def filled_plans(self, plan: dict) -> list[tuple[str, dict]]:
        """Whole plans whose rings are filled before the wait, shallow and deep: one op at a time may show no gain."""
        linear = [op for op in (*self.shape.ops, "head") if op not in ("attention", "beside") and not plan[op].hold]
        plans = []
        for stages, late in product((3, 4, 6, 8), (False, True)):
            trial = dict(plan)
            for op in linear:
                filled = replace(plan[op], stages=stages, ahead=0, late=late, fill=True)
                trial[op] = fitted(op, filled, self.shape.sizes)
            if self.shape.neox:  # so that the rows beside attention need not wait
                trial["qkv"] = replace(trial["qkv"], late=True)
            plans.append((f"rings of {stages}, {'late' if late else 'early'}", trial))
        jobs = [(op, trial[op], True, bool(plan["next"].get(op))) for _, trial in plans for op in linear]
        list(self.compiled(list(dict.fromkeys(jobs)), self.left() / 4))
        return plans

    def neighbours(self, plan: dict):
        """Small changes of one configuration, as their kernels become available; then prefetches."""
        ops = [*self.shape.ops, "head"]
        jobs = [(op, config, True, bool(plan["next"].get(op))) for op in ops for config in neighbours_of(plan[op])]
        begun = dict(plan)
        for op, config, _, _ in self.compiled(jobs, self.left() / 2):
            moved = {f: v for f, v in vars(config).items() if v != getattr(begun[op], f)}
            if moved.keys() & {"hold", "fill"}:  # one takes the other's place, whatever the plan has by now
                moved |= {"hold": config.hold, "fill": config.fill}
            yield f"{op} {short(config)}", plan | {op: replace(plan[op], **moved)}
        for op, size in product(self.shape.ops, (0, MB, 2 * MB, 4 * MB, 6 * MB, 10 * MB, 16 * MB)):
            if size != plan["next"].get(op, 0):
                yield f"{op} prefetches {size >> 20} MB", plan | {"next": plan["next"] | {op: size}}

    def keep_what_helps(self, plan: dict, best: float, trials) -> float:
        """Time every trial and make it the plan, in place, if it is faster."""
        for label, trial in trials:
            if self.left() < 8:
                break
            ms = self.time_step(trial, label)
            if ms < best * 0.998:
                best = ms
                plan.clear()
                plan.update(trial)
                print(f"  {label}: {ms:.3f} ms", flush=True)
        return best

    def finish(self, plan: dict, best: float) -> dict:
        """Check the plan, record it, and tell what each op costs in it."""
        ops = [*self.shape.ops, "head"]
        error = self.check_step(plan)
        print(f"  PDL, tuned {best:.3f} ms, error of the logits {error:.2g}", flush=True)
        self.steps.append(
            {"shape": self.shape.name, "label": "tuned", "ms": best, "error": error, "plan": self.describe(plan)}
        )
        for op in ops:
            ms = self.time_step(plan, f"without {op}", leave_out=op)
            calls = 1 if op == "head" else self.shape.layers
            print(
                f"    {op} costs {1e3 * (best - ms) / calls:.2f} us in the step, floor {self.floor_us(op):.2f}",
                flush=True,
            )
        return plan

    def floor_us(self, op: str) -> float:
        return self.shape.bytes_of(op) / self.copy / 1e3

    def trials(self, plan: dict, ops: list[str]):
        """Changes to try, made from `plan` as it stands when each is asked for."""
        linear = [op for op in ops if op != "attention"]
        for ahead in (0, 1, 4, 8):
            yield f"ahead {ahead}", plan | {op: changed(plan[op], ahead=ahead) for op in linear}
        late = [(op, changed(plan[op], late=True), True, False) for op in ops if op != "beside"]
        if "beside" in plan:
            for rows, attention in ((False, False), (True, True), (False, True)):
                config = changed(plan["beside"], late=rows)
                late.append(
                    ("beside", replace(config, attention=replace(config.attention, late=attention)), True, False)
                )
        more = [(op, plan[op], True, True) for op in self.shape.ops]
        others = [(op, c, True, False) for op in ops for c in self.best(op, True, 5)[1:]]
        others += [(op, c, True, False) for op in ops for c in self.best(op, False, 12)[5:]]
        ready = list(self.compiled([*late, *more, *others], self.left() / 3))
        for op, config, _, _ in [j for j in ready if j in late]:
            yield f"{op} late {short(config)}", plan | {op: config if op == "beside" else replace(plan[op], late=True)}
        for size, (op, *_) in product((2 << 20, 6 << 20, 16 << 20), [j for j in ready if j in more]):
            yield f"{op} prefetches {size >> 20} MB", plan | {"next": plan["next"] | {op: size}}
        for op, config, _, _ in [j for j in ready if j in others]:
            if op == "beside":
                yield f"{op} {short(config)}", plan | {op: changed(config, ahead=plan[op].linear.ahead)}
            elif not plan[op].late or op == "qkv":
                change = {"late": plan[op].late} | ({} if op == "attention" else {"ahead": plan[op].ahead})
                yield f"{op} {short(config)}", plan | {op: replace(config, **change)}
        for ahead, op in product((0, 1, 2, 3, 6), linear):
            yield f"{op} ahead {ahead}", plan | {op: changed(plan[op], ahead=ahead)}
        for op in linear:
            yield f"{op} keeps L2", plan | {op: changed(plan[op], evict=False)}

    def table(self, count: int = 3) -> None:
        """The best configurations of every op, and what failed."""
        print(f"  {'op':10} {'us':>8} {'floor':>7} {'GB/s':>6} {'share':>6}  config")
        for op, pdl in product([*self.shape.ops, "head"], (False, True)):
            rows = sorted(
                (r for r in self.rows if r["op"] == op and r.get("pdl") == pdl and "us" in r), key=lambda r: r["us"]
            )
            for r in rows[:count]:
                config = short(read_config(op, r["config"]))
                figures = f"{r['us']:8.2f} {self.floor_us(op):7.2f} {r['gbs']:6.0f} {r['share']:6.3f}"
                print(f"  {op:10} {figures}  {config}{' pdl' if pdl else ''}")
        failed = [r for r in self.rows if "failed" in r]
        print(f"  {len(self.rows)} configurations, {len(failed)} failed")
        for r in failed[:6]:
            print(f"    {r['op']} {r['config']}: {r['failed']}", flush=True)


def short(config) -> str:
    """A configuration in a few characters: what differs from false or zero."""
    if config is None:
        return "as launched by itself"
    if isinstance(config, BesideConfig):
        return f"{short(config.attention)} | {short(config.linear)}"
    return " ".join(f"{k}{'' if v is True else f'={v}'}" for k, v in asdict(config).items() if v not in (False, 0))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=230, help="time limit in seconds (default 230)")
    parser.add_argument("--out", required=True, help="JSON file for all numbers")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHARES), help="model shapes")
    parser.add_argument("--streams", type=int, default=1, help="measure this many streams, up to 16 (default 1: tune)")
    parser.add_argument("--climb", action="store_true", help="begin at the measured plan, without a sweep")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compiling processes")
    options = parser.parse_args(arguments)
    if not 1 <= options.streams <= MAX_SHARED:
        parser.error(f"--streams {options.streams}; accepted: 1 to {MAX_SHARED}, which the kernels serve")
    if options.climb and options.streams > 1:
        parser.error(f"--climb with --streams {options.streams}; accepted: one stream, whose plans are tuned")
    start = time.monotonic()
    cuda = torch.cuda.is_available()
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) if cuda else None
    report = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "ops": [],
        "steps": [],
    }
    bandwidth = memory_bandwidth("cuda" if cuda else "cpu")
    report["bandwidth_gbs"] = {"copy": bandwidth.copy_gbs, "read": bandwidth.read_gbs}
    print(f"{report['device']}: {bandwidth}", flush=True)
    for name in options.shapes:
        left = options.seconds - (time.monotonic() - start)
        if left < 15:
            print(f"{name}: no time left")
            break
        budget = left * (SHARES.get(name, 1.0) if name != options.shapes[-1] else 1.0)
        shape = replace(SHAPES[name], streams=options.streams)
        bench = Bench(shape, "cuda" if cuda else "cpu", pool, time.monotonic() + budget, bandwidth.copy_gbs)
        floor_ms = shape.step_bytes / bandwidth.copy_gbs / 1e6
        print(f"{name}: {shape.step_bytes / 1e9:.3f} GB a step, floor {floor_ms:.3f} ms, {budget:.0f} s", flush=True)
        try:
            if options.streams > 1:
                bench.measure_streams()
            elif options.climb:
                bench.climb()
            else:
                bench.sweep(budget * 0.5)
                bench.table()
                bench.tune_step()
            for row in bench.steps:
                if row["label"] in ("best of each op", "PDL", "measured plan", "tuned") and "ms" in row:
                    print(
                        f"  STEP {name} {row['label']}: {row['ms']:.3f} ms = {row['ms'] / floor_ms:.3f} x floor",
                        flush=True,
                    )
        except Exception as problem:
            print(f"  {name} stopped: {type(problem).__name__}: {str(problem)[:500]}", flush=True)
            report.setdefault("stopped", {})[name] = repr(problem)[:2000]
        report["ops"] += bench.rows
        report["steps"] += bench.steps
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        del bench
        if cuda:
            torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"done in {time.monotonic() - start:.0f} s, numbers in {options.out}", flush=True)


if __name__ == "__main__":
    main()
