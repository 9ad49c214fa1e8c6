"""When an adaptive policy prunes, decided on the device: the risk of the logits, its running quantiles, the next row.

The rule is that of the schedule of an adaptive policy, in the same float64 operations, so that the host comes to the
same decisions when it reads the risks later. The plan holds rows without a prune; each is put right before it is read.
"""

from collections.abc import Callable

import torch

from sinkstream.kernels.layout import FIELDS, FIRST, FRAME_POSITION, LENGTH
from sinkstream.kernels.runtime import (
    check_tensor,
    gdc_launch_dependents,
    gdc_wait,
    has_dependent_launch,
    jit,
    launch,
    tl,
    triton,
    use_triton,
)

TILE = 2048  # logits of one program

# Columns of the table, float64: one row a stream.
ACTIVE = 0  # whether the stream takes part in the steps of the plan
CACHED = 1  # entries that the next token sees, itself included
PRUNING = 2  # whether the next token's prune stays below its target
DROPPED = 3  # entries dropped since the plan was made, the next token's included
OBSERVED = 4  # risks so far
RISK = 5  # the smoothed risk
LOW, LOW_SCALE, HIGH, HIGH_SCALE = 6, 7, 8, 9  # running quantiles and their scales
# The rule: the same for all streams.
TARGET, LEAST, MIDDLE, MOST = 10, 11, 12, 13  # entries of a finished prune; tokens past it at the three risks
BOUND = 14  # tokens past the target that other triggers let gather
MAX_DROP = 15  # most entries of one step
WARMUP = 16  # risks before they count
KEEP, TAKE = 17, 18  # weights of the past and of the newest risk
RATE = 19  # of the quantiles
LOW_QUANTILE, HIGH_QUANTILE = 20, 21
COLUMNS = 22

SIGNALS = {"entropy": 1, "top1": 2}  # risks that the kernel computes, by the name of the signal


@jit
def _risk_tiles_kernel(logit_ptr, part_ptr, vocab, stride, TILE: tl.constexpr, PDL: tl.constexpr):
    """Program (tile, stream): largest logit, sum of exponentials below it, and their sum weighted by the exponent."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, stream = tl.program_id(0), tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    z = tl.load(logit_ptr + stream * stride + columns, mask=columns < vocab, other=-float("inf"))
    top = tl.max(z, 0)
    below = z - tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp(below)
    place = part_ptr + (stream * tl.num_programs(0) + tile) * 3
    tl.store(place, top)
    tl.store(place + 1, tl.sum(e, 0))
    tl.store(place + 2, tl.sum(tl.where(e > 0, e * below, 0.0), 0))


@jit
def _moved(estimate, scale, quantile, value, rate):
    """Estimate and scale of a running quantile after one value more."""
    scale += rate * (tl.abs(value - estimate) - scale)
    below = tl.where(value <= estimate, 1.0, 0.0).to(tl.float64)
    estimate += rate * scale * (quantile - below) * 4
    return estimate, scale


@jit
def _decide_kernel(
    part_ptr, risk_ptr, table_ptr, plan_ptr, cursor_ptr, tiles, rows, ring, SIGNAL: tl.constexpr, SIZE: tl.constexpr,
    ORIGINAL: tl.constexpr, FIELDS: tl.constexpr, FIRST: tl.constexpr, LENGTH: tl.constexpr, FRAME: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a stream. SIGNAL 0: the risk is given. ``row + n`` is column n of the table (`ACTIVE` is 0 …).

    No multiplication and addition may be fused: the host computes the same float64 operations one by one.
    """
    stream, streams = tl.program_id(0), tl.num_programs(0)
    row = table_ptr + stream * COLUMNS
    if PDL:
        gdc_wait()
    if tl.load(row) > 0:
        at = tl.load(cursor_ptr + stream)
        place = risk_ptr + at * streams + stream
        if SIGNAL > 0:
            column = tl.arange(0, SIZE)
            parts, mask = part_ptr + (stream * tiles + column) * 3, column < tiles
            top = tl.load(parts, mask=mask, other=-float("inf"))
            below = top - tl.max(top, 0)
            weight = tl.where(mask, tl.exp(below), 0.0)
            sums = tl.load(parts + 1, mask=mask, other=0.0)
            total = tl.sum(weight * sums, 0)
            if SIGNAL == 1:
                moments = tl.load(parts + 2, mask=mask, other=0.0) + tl.where(weight > 0, below * sums, 0.0)
                found = tl.log(total) - tl.sum(weight * moments, 0) / total
            else:
                found = 1.0 - 1.0 / total
            tl.store(place, found)
        else:
            found = tl.load(place)
        value = found.to(tl.float64)
        observed, risk = tl.load(row + 4), tl.load(row + 5)
        fresh = observed < 1
        risk = tl.where(fresh, value, tl.load(row + 17) * risk + tl.load(row + 18) * value)
        rate = tl.load(row + 19)
        low = tl.where(fresh, risk, tl.load(row + 6))
        low, low_scale = _moved(low, tl.load(row + 7), tl.load(row + 20), risk, rate)
        high = tl.where(fresh, risk, tl.load(row + 8))
        high, high_scale = _moved(high, tl.load(row + 9), tl.load(row + 21), risk, rate)
        observed += 1
        cached, pruning = tl.load(row + 1) + 1, tl.load(row + 2) > 0
        over, middle = cached - tl.load(row + 10), tl.load(row + 12)
        due = tl.where(risk > high, over >= tl.load(row + 11), (risk >= low) & (over >= middle))
        due = tl.where(observed < tl.load(row + 16), over >= middle, due)
        due = due | (over >= tl.load(row + 13)) | (over > tl.load(row + 14))
        drop = tl.where(pruning | (due & (over > 0)), tl.minimum(over, tl.load(row + 15)), 0.0)
        pruning = (pruning | (due & (over > 0))) & (drop < over)
        dropped = tl.load(row + 3) + drop
        following = plan_ptr + (tl.minimum(at + 1, rows - 1) * streams + stream) * FIELDS
        first, length, frame = (
            tl.load(following + FIRST), tl.load(following + LENGTH), tl.load(following + FRAME),
        )  # fmt: skip
        tl.debug_barrier()  # all threads have read what one of them writes
        tl.store(row + 1, cached - drop)
        tl.store(row + 2, tl.where(pruning, 1.0, 0.0).to(tl.float64))
        tl.store(row + 3, dropped)
        tl.store(row + 4, observed)
        tl.store(row + 5, risk)
        tl.store(row + 6, low)
        tl.store(row + 7, low_scale)
        tl.store(row + 8, high)
        tl.store(row + 9, high_scale)
        if at + 1 < rows:
            by = dropped.to(tl.int32)
            tl.store(following + FIRST, (first + by) % ring)
            tl.store(following + LENGTH, length - by)
            if not ORIGINAL:
                tl.store(following + FRAME, frame - by)


def decide(
    logits: torch.Tensor,
    risks: torch.Tensor,
    table: torch.Tensor,
    plan: torch.Tensor,
    cursor: torch.Tensor,
    *,
    signal: str,
    measure: Callable[[torch.Tensor], torch.Tensor],
    ring: int,
    original: bool,
    parts: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Take in the risk of a step's logits and decide how many entries the next token drops.

    Parameters
    ----------
    logits : Tensor, (streams, vocab), float32
    risks : Tensor, (rows, streams, 1), float32
        The risk is written to the row of the step.
    table : Tensor, (streams, 22), float64
        What the rule knows of each stream, and the rule; written in place. Streams that are not active are passed over.
    plan : Tensor, (rows, streams, 8), int32
        Scalars of the steps as if nothing were dropped; the row after the step's is put right. The first row of a plan
        is left to `put_right`.
    cursor : Tensor, (streams,), int64
        Row of the step.
    signal : str
        Name of the risk signal. One that is not in `SIGNALS` is computed by `measure`.
    measure : callable
        Gives the risk, ``(streams,)`` float32, of log-probabilities ``(streams, vocab)``.
    ring : int
        Slots of the ring.
    original : bool
        Whether frame positions do not depend on what is dropped.
    parts : Tensor, (streams, tiles, 3), float32, optional
        Room for what `risk_parts` says; a captured graph needs its own.
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    device = logits.device
    check_tensor("logits", logits, (None, None), dtypes=(torch.float32,), device=device, contiguous=False)
    streams, vocab = logits.shape
    check_tensor("risks", risks, (None, streams, 1), dtypes=(torch.float32,), device=device)
    check_tensor("table", table, (streams, COLUMNS), dtypes=(torch.float64,), device=device)
    check_tensor("plan", plan, (len(risks), streams, FIELDS), dtypes=(torch.int32,), device=device)
    check_tensor("cursor", cursor, (streams,), dtypes=(torch.int64,), device=device)
    on_device = use_triton(implementation, logits)
    if not on_device or signal not in SIGNALS:
        risks.index_copy_(0, cursor[:1].clamp(min=0), measure(logits.log_softmax(-1))[None, :, None])
    if not on_device:
        return decide_twin(risks, table, plan, cursor, ring, original)
    code, tiles, early = SIGNALS.get(signal, 0), -(-vocab // TILE), has_dependent_launch(device)
    if code:
        parts = risk_parts(logits) if parts is None else parts
        check_tensor("parts", parts, (streams, tiles, 3), dtypes=(torch.float32,), device=device)
        launch(
            _risk_tiles_kernel, (tiles, streams), logits, parts, vocab, logits.stride(0), TILE=TILE, num_warps=8,
            pdl=early,
        )  # fmt: skip
    launch(
        _decide_kernel, (streams,), risks if parts is None else parts, risks, table, plan, cursor, tiles, len(plan),
        ring, SIGNAL=code, SIZE=triton.next_power_of_2(tiles), ORIGINAL=original, FIELDS=FIELDS, FIRST=FIRST,
        LENGTH=LENGTH, FRAME=FRAME_POSITION, COLUMNS=COLUMNS, num_warps=1, enable_fp_fusion=False,
        pdl=early and code > 0,
    )  # fmt: skip


def risk_parts(logits: torch.Tensor) -> torch.Tensor:
    """Room for the parts of a risk: ``(streams, tiles, 3)`` float32, for logits of these axes."""
    return torch.zeros(len(logits), -(-logits.shape[1] // TILE), 3, device=logits.device)


def put_right(plan: torch.Tensor, row: torch.Tensor, table: torch.Tensor, ring: int, original: bool) -> None:
    """Take what has been dropped out of one row of the plan; nothing asks the host.

    Parameters
    ----------
    plan, table, ring, original
        As in `decide`.
    row : Tensor, (1,), int64
        Which row; nothing is done past the last one.
    """
    at = row.clamp(max=len(plan) - 1)
    scalars = plan.index_select(0, at)[0]
    by = (table[:, DROPPED] * table[:, ACTIVE] * (row < len(plan))).int()
    fixed = scalars.clone()
    fixed[:, FIRST] = torch.where(by != 0, (scalars[:, FIRST] + by) % ring, scalars[:, FIRST])
    fixed[:, LENGTH] -= by
    if not original:
        fixed[:, FRAME_POSITION] -= by
    plan.index_copy_(0, at, fixed[None])


def decide_twin(risks, table, plan, cursor, ring, original) -> None:
    """The twin of the kernel, once the risks are in their row: plain PyTorch, nothing asks the host."""
    value = risks.index_select(0, cursor[:1].clamp(min=0))[0, :, 0].double()
    t = dict(enumerate(table.clone().unbind(1)))
    fresh = t[OBSERVED] < 1
    risk = torch.where(fresh, value, t[KEEP] * t[RISK] + t[TAKE] * value)
    new = {RISK: risk, OBSERVED: t[OBSERVED] + 1}
    for estimate, scale, quantile in ((LOW, LOW_SCALE, LOW_QUANTILE), (HIGH, HIGH_SCALE, HIGH_QUANTILE)):
        middle = torch.where(fresh, risk, t[estimate])
        new[scale] = t[scale] + t[RATE] * ((risk - middle).abs() - t[scale])
        new[estimate] = middle + t[RATE] * new[scale] * (t[quantile] - (risk <= middle).double()) * 4
    cached, pruning = t[CACHED] + 1, t[PRUNING] > 0
    over = cached - t[TARGET]
    due = torch.where(risk > new[HIGH], over >= t[LEAST], (risk >= new[LOW]) & (over >= t[MIDDLE]))
    due = torch.where(new[OBSERVED] < t[WARMUP], over >= t[MIDDLE], due)
    due = pruning | ((due | (over >= t[MOST]) | (over > t[BOUND])) & (over > 0))
    drop = torch.where(due, torch.minimum(over, t[MAX_DROP]), 0.0)
    new |= {CACHED: cached - drop, PRUNING: (due & (drop < over)).double(), DROPPED: t[DROPPED] + drop}
    active = t[ACTIVE] > 0
    for column, found in new.items():
        table[:, column] = torch.where(active, found, t[column])
    put_right(plan, cursor[:1] + 1, table, ring, original)
