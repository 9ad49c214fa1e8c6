"""Which configurations are tried: a grid for every op, and the neighbours of a configuration."""

from dataclasses import asdict, replace
from itertools import product

from sinkstream.kernels import AttentionConfig, AttentionLinearConfig, LinearConfig
from sinkstream.kernels.config import (
    MAX_SPLITS,
    MultiStreamConfig,
    PersistentConfig,
    PersistentNeoxConfig,
    filled_bytes,
    fit_held,
    multi_stream_bytes,
)
from tune_kernels.shapes import Shape

Config = LinearConfig | AttentionConfig | AttentionLinearConfig


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
    if op == "attention_up":
        return attention_linear_grid()
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


def attention_linear_grid() -> list[AttentionLinearConfig]:
    """Attention and linear layer in one kernel: (splits, tile, warps), (rows, columns, stages, per_sm)."""
    found = []
    rows = [(4, 512, 3, 3), (4, 512, 1, 3), (4, 256, 4, 3), (8, 512, 1, 3), (2, 512, 4, 3), (4, 512, 2, 4)]
    attention = [(4, 64, 4), (4, 32, 4), (8, 32, 4), (3, 64, 4), (6, 32, 4), (2, 64, 4)]
    for splits, tile, warps in attention:
        for r, c, stages, per_sm in rows:
            if tile == 64 and per_sm > 3:
                continue
            parts = AttentionConfig(splits, tile, warps), LinearConfig(r, c, warps, stages, per_sm, late=True)
            found.append(AttentionLinearConfig(*parts))
    wide = [(4, 64, 8, 4, 512, 1, 2), (4, 64, 8, 8, 512, 1, 2), (4, 64, 8, 4, 512, 3, 2), (2, 64, 8, 4, 1024, 1, 2)]
    return found + [
        AttentionLinearConfig(AttentionConfig(s, t, w), LinearConfig(r, c, w, stages, per_sm, late=True))
        for s, t, w, r, c, stages, per_sm in wide
    ]


def several_candidates(shape: Shape, op: str) -> list:
    """Configurations to try for several streams; every warp multiplies a part of a chunk of its own."""
    if op in ("attention", "attention_up"):
        return attention_grid(shape)
    gated, found = op == "gate_up", []
    for columns, warps, stages, per_sm, ahead in product(
        (512, 128, 256, 1024), (4, 2, 8), (4, 5, 3, 6), (2, 4, 1, 3, 5), (0, 4096)
    ):
        config = MultiStreamConfig(16, columns, warps, stages, per_sm, ahead, parts=warps)
        flying = per_sm * (stages - 1) * (1 + gated) * config.rows * columns * 2
        fits = per_sm * multi_stream_bytes(config, gated, shape.streams) < 227_000 and per_sm * warps <= 32
        if fits and 60_000 < flying < 170_000 and shape.widths[op][1] >= columns and ahead <= 2 * shape.widths[op][1]:
            found.append(config)
    width, staying = shape.widths[op][1], []
    if op in ("o", "head"):  # inputs that stay with a program, whole rows in flight
        widths = [columns for columns in (512, width) if not columns & (columns - 1)]
        for columns, warps, stages, late in product(widths, (4, 8), (2, 3), (False, True)):
            config = MultiStreamConfig(16, columns, warps, stages, 1, late=late, parts=warps, held=True)
            if fit_held(config, shape.streams, width, 228 * 1024) == config:
                staying.append(config)
    return staying + spread(found, 44)


def persistent_grid(shape: Shape) -> list:
    """Configurations of the persistent kernel: the default and what differs from it in one or two fields."""
    if not shape.neox:
        return [PersistentConfig(warps, 8 // warps, ahead=a) for warps, a in product((8, 4), (True, False))]
    default = PersistentNeoxConfig()
    tiles = ({}, {"rows": 16}, {"rows": 32}, {"slots": 32}, {"slots": 128}, {"out_rows": 4})
    programs = ({"warps": 4, "per_sm": 2, "rows": 4, "out_rows": 4}, {"warps": 16}, {"warps": 16, "rows": 16})
    found = [replace(default, lead=lead, early=early) for early, lead in product((1, 0, 2), (4, 3, 2, 1))]
    found += [replace(default, lead=lead, **tile) for tile, lead in product((*tiles, *programs), (4, 2))]
    return list(dict.fromkeys([*found, replace(default, lead=0)]))


def filled_grid(shape: Shape) -> list[AttentionConfig]:
    """Attention of several streams as one wave of 132 multiprocessors, its pipelines filled before the wait.

    Programs a multiprocessor, slots of a tile, warps, KB of all pipelines of a multiprocessor (120 leave room for
    programs of the next kernel), registers of a thread, late.
    """
    found = []
    for per_sm, tile, warps, room, registers, late in (
        (2, 64, 4, 120, 128, False), (2, 64, 4, 160, 0, False), (2, 64, 4, 120, 168, False), (1, 64, 4, 120, 0, False),
        (2, 64, 4, 120, 168, True), (2, 32, 4, 120, 128, False), (2, 128, 4, 150, 168, False),
        (4, 32, 4, 220, 128, False), (1, 128, 8, 150, 0, False), (2, 64, 4, 220, 168, False),
        (4, 64, 4, 220, 128, False), (3, 64, 4, 180, 128, False), (2, 128, 8, 150, 128, False),
    ):  # fmt: skip
        splits = min(132 * per_sm // (shape.streams * shape.kv_heads), MAX_SPLITS)
        config = AttentionConfig(
            max(1, splits), tile, warps, 2, dot=True, columns=64, late=late, registers=registers, fill=True
        )
        while filled_bytes(replace(config, stages=config.stages + 1), shape.head_dim) * per_sm <= room * 1024:
            config = replace(config, stages=config.stages + 1)
        if splits and config.stages > 2:  # with two, nothing is in flight while a tile is multiplied
            found.append(config)
    return list(dict.fromkeys(found))


def changed(config, **changes):
    """A configuration with other values; in a kernel with attention those of the linear layer."""
    if isinstance(config, AttentionLinearConfig):
        return replace(config, linear=replace(config.linear, **changes))
    return replace(config, **changes)


def accepted(config, **changes) -> list:
    """The configuration with other values, if these are accepted."""
    try:
        return [replace(config, **changes)]
    except ValueError:
        return []


def neighbours_of(config) -> list:
    """Configurations that differ in one field."""
    if isinstance(config, AttentionLinearConfig):
        parts = (neighbours_of(config.attention), neighbours_of(config.linear))
        attention, linear = ([c for c in part if c.warps == config.linear.warps] for part in parts)
        return [replace(config, attention=c) for c in attention] + [replace(config, linear=c) for c in linear]
    if isinstance(config, LinearConfig):
        scaled, counted = ["rows", "columns", "warps"], ["stages", "per_sm", "ahead"]
    else:
        scaled, counted = ["splits", "tile", "warps", *(["columns"] if config.dot else [])], []
    changes = [{f: int(getattr(config, f) * by)} for f in scaled for by in (2, 0.5)]
    changes += [{f: getattr(config, f) + by} for f in counted for by in (-1, 1)]
    found = [neighbour for change in changes for neighbour in accepted(config, **change)]
    found += [replace(config, **{f: not getattr(config, f)}) for f in ("late", "evict") if hasattr(config, f)]
    if isinstance(config, LinearConfig):
        rows, warps = max(1, config.rows // 2), max(1, config.warps // 2)
        found += accepted(config, rows=rows, warps=warps, per_sm=2 * config.per_sm)  # half as large, twice as many
        found += [replace(config, hold=early == "hold", fill=early == "fill") for early in ("", "hold", "fill")]
    return [c for c in dict.fromkeys(found) if c != config and _is_sensible(c)]


def _is_sensible(config) -> bool:
    if isinstance(config, LinearConfig):
        return config.columns >= 256 and config.warps <= 16
    return config.splits <= 60


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


def short(config) -> str:
    """A configuration in a few characters: what differs from false or zero."""
    if config is None:
        return "as launched by itself"
    if isinstance(config, AttentionLinearConfig):
        return f"{short(config.attention)} | {short(config.linear)}"
    return " ".join(f"{k}{'' if v is True else f'={v}'}" for k, v in asdict(config).items() if v not in (False, 0))
