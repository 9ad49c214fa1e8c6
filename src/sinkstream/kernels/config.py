"""How the kernels are cut up: the configurations, what fits the device, and the defaults.

Measured plans of whole steps are in `plans`. A configuration that is passed to an op is used unchanged. What each field
accepts stands beside its default, and is checked when a configuration is made.
"""

from dataclasses import dataclass, replace

from sinkstream.kernels.config_fields import KernelConfig, number

MAX_STREAMS = 16  # streams of one product: the narrowest tile of the matrix units
MAX_HELD_STREAMS = 8  # streams whose inputs a program keeps in registers
MAX_HELD_WIDTH = 2048  # values of such an input
MAX_SPLITS = 64  # programs of one key-value head whose partial results one program can combine
MAX_WARPS = 32  # of a program: 1,024 threads
MAX_PROGRAMS = 32  # that a multiprocessor holds
MAX_REGISTERS = 255  # of a thread
LEAST_REGISTERS = 16
LEAST_TILE = 16  # rows or columns that matrix units take
LEAST_COLUMNS = 8  # that one load of a thread reads: 16 bytes of half precision
OWN_BYTES = 2048  # shared memory of a program outside its pipeline: 1 KB of the driver, and room for reductions


@dataclass(frozen=True)
class LinearConfig(KernelConfig):
    """How a streaming product is cut up. Changes speed only, never values beyond the order of additions.

    Attributes
    ----------
    rows : int
        Weight rows of one tile (a power of two).
    columns : int
        Columns loaded by one instruction of all threads along a row (a power of two; below 256 some threads load none).
    warps, stages : int
        Warps of a program; tiles of its shared-memory pipeline, in use and in flight (1: no pipeline, plain loads).
    per_sm : int
        Programs a multiprocessor.
    ahead : int
        Tiles that a program prefetches to L2 before it waits for the previous kernel (programmatic dependent launch
        only).
    evict : bool
        Evict-first policy for the weights in L2.
    late : bool
        Trigger the launch of the next kernel at this kernel's last tile instead of at once.
    hold : bool
        Read a program's first tile to registers before it waits for the previous kernel.
    fill : bool
        Have the pipeline's tiles in flight before the wait for the previous kernel; not together with `hold`.
    """

    rows: int = number(4, 1, power=True)
    columns: int = number(512, LEAST_COLUMNS, power=True)
    warps: int = number(4, 1, MAX_WARPS, power=True)
    stages: int = number(3, 1)
    per_sm: int = number(3, 1, MAX_PROGRAMS)
    ahead: int = number(2, 0)
    evict: bool = True
    late: bool = False
    hold: bool = False
    fill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold and self.fill:
            raise ValueError("hold and fill in one configuration; accepted: one of them at most")


@dataclass(frozen=True)
class AttentionConfig(KernelConfig):
    """How decode attention is cut up. Changes speed only, never values beyond the order of additions.

    Attributes
    ----------
    splits : int
        Programs that share the ring of one key-value head.
    tile : int
        Slots of one tile (a power of two, at least 16). Two tiles of keys and values are in flight in registers.
    warps : int
    stages : int
        0: tiles go through registers, loaded one ahead; 2 or more: through a pipeline of shared-memory stages.
    dot : bool
        Use the matrix units. Needed for grouped queries; without it, one query per key-value head.
    columns : int
        Widest column chunk of a tile (a power of two, at least 16); the widest that divides head_dim is used.
    late : bool
        Trigger the launch of the next kernel when the slots have been read instead of at once.
    carveout : int
        Percent of a multiprocessor's memory that the driver is asked to leave to shared memory, the rest to L1, through
        which the loads of slots are in flight; 0: as the driver likes.
    registers : int
        The most registers of a thread: fewer than the compiler would take, so that more programs fit a multiprocessor,
        or more, so that more loads are in flight; 0: as the compiler likes.
    """

    splits: int = number(16, 1, MAX_SPLITS)
    tile: int = number(64, LEAST_TILE, power=True)
    warps: int = number(2, 1, MAX_WARPS, power=True)
    stages: int = number(0, 2, off=True)
    dot: bool = False
    columns: int = number(16, LEAST_TILE, power=True)
    late: bool = False
    carveout: int = number(0, 0, 100)
    registers: int = number(0, LEAST_REGISTERS, MAX_REGISTERS, off=True)


@dataclass(frozen=True)
class AttentionLinearConfig(KernelConfig):
    """How attention and a linear layer in one kernel are cut up; both have the same number of warps.

    Attributes
    ----------
    attention : AttentionConfig
        With few splits: its programs must leave room for those of the linear layer on every multiprocessor.
    linear : LinearConfig
        ``per_sm`` counts the programs of both.
    """

    attention: AttentionConfig
    linear: LinearConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention.warps != self.linear.warps:
            raise ValueError(
                f"{self.attention.warps} warps for attention and {self.linear.warps} for the linear layer in the"
                " same kernel; accepted: as many"
            )
        if self.attention.carveout or self.attention.registers:
            raise ValueError("carveout or registers for attention in a kernel with a linear layer; accepted: 0")


@dataclass(frozen=True)
class MultiStreamConfig(KernelConfig):
    """How a product of several streams is cut up. Changes speed only, never values beyond the order of additions.

    Attributes
    ----------
    rows : int
        Weight rows of one tile (a power of two, at least 16).
    columns : int
        Columns of a chunk (a power of two, at least 16).
    warps, stages : int
        Warps of a program; its chunks, the one in use and those in flight.
    per_sm : int
        Programs a multiprocessor.
    ahead : int
        Bytes of each row of its first tile that a program prefetches to L2 before it waits for the previous kernel, a
        multiple of 16 (programmatic dependent launch only).
    late : bool
        Trigger the launch of the next kernel when this kernel's rows are done instead of at once.
    parts : int
        Parts of a chunk, a power of two, each added up by warps of its own; their sums are added at the end of a tile.
    held : bool
        Keep the inputs of all streams with a program, so that only weights go through the pipeline. Its stages hold
        whole rows, which are in flight before the wait for the previous kernel; `ahead` has no effect.
    """

    rows: int = number(16, LEAST_TILE, power=True)
    columns: int = number(128, LEAST_TILE, power=True)
    warps: int = number(2, 1, MAX_WARPS, power=True)
    stages: int = number(6, 1)
    per_sm: int = number(5, 1, MAX_PROGRAMS)
    ahead: int = number(1024, 0, multiple=16)
    late: bool = True
    parts: int = number(2, 1, power=True)
    held: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns < LEAST_TILE * self.parts:
            raise ValueError(
                f"{self.columns} columns in {self.parts} parts; accepted: at least {LEAST_TILE} in each, which matrix"
                " units take"
            )


@dataclass(frozen=True)
class PrefillConfig(KernelConfig):
    """How attention of a chunk is cut up. Changes speed only, never values beyond the order of additions.

    Attributes
    ----------
    rows, columns : int
        Queries and keys of one tile (powers of two, at least 16).
    warps, stages : int
        Warps of a program; tiles of its shared-memory pipeline.
    splits : int
        Programs that the keys of one tile of queries are split over (a power of two).
    """

    rows: int = number(128, LEAST_TILE, power=True)
    columns: int = number(64, LEAST_TILE, power=True)
    warps: int = number(4, 1, MAX_WARPS, power=True)
    stages: int = number(3, 1)
    splits: int = number(1, 1, power=True)


@dataclass(frozen=True)
class PersistentConfig(KernelConfig):
    """How the kernel of persistent Llama-like layers is cut up. Changes speed only, but for the order of additions.

    Attributes
    ----------
    warps : int
        Warps of a program; each has one row of a tile, or two of gate and up.
    per_sm : int
        Programs a multiprocessor.
    slots : int
        Most slots of one program of attention (a power of two).
    ahead : bool
        Prefetch the next layer to L2.
    """

    warps: int = number(8, 1, MAX_WARPS, power=True)
    per_sm: int = number(1, 1, MAX_PROGRAMS)
    slots: int = number(256, 8, power=True)
    ahead: bool = True


@dataclass(frozen=True)
class PersistentNeoxConfig(KernelConfig):
    """How the kernel of persistent GPT-NeoX layers is cut up. Changes speed only, but for the order of additions.

    Attributes
    ----------
    warps, per_sm : int
        Warps of a program, programs a multiprocessor.
    rows, out_rows : int
        Weight rows of one tile: of queries, keys, values and the up-projection; of the output (powers of two).
    slots : int
        Slots of one tile of attention (a power of two, at least 16); a program has as many tiles as it needs.
    lead : int
        How far ahead a program prefetches to L2 what it reads: 1 to 4 of the four items of a layer (rows of queries,
        keys and values; rows of the up-projection; slots; rows of the output), or 0 for nothing.
    early : int
        What a program holds in registers while it waits for the previous layer: rows of queries, keys and values (0),
        those of the up-projection too (1), slots too (2).
    """

    warps: int = number(8, 1, MAX_WARPS, power=True)
    per_sm: int = number(1, 1, MAX_PROGRAMS)
    rows: int = number(8, 1, power=True)
    out_rows: int = number(8, 1, power=True)
    slots: int = number(64, LEAST_TILE, power=True)
    lead: int = number(4, 0, 4)
    early: int = number(1, 0, 2)


# Defaults, chosen so that the compiler spills no registers at head sizes 64 to 256.
LINEAR = LinearConfig()
RESIDUAL = LinearConfig(rows=1, columns=1024, warps=4, stages=4, per_sm=2, ahead=2, late=True)
UNGROUPED = AttentionConfig()
WIDE = AttentionConfig(splits=8, warps=4)  # heads of 97 to 128
GROUPED = AttentionConfig(splits=16, warps=4, dot=True, columns=128)  # also for heads wider than 128
MULTI_STREAM = MultiStreamConfig()
FEW_TILES = MultiStreamConfig(columns=512, warps=4, stages=4, per_sm=2, parts=4)  # two a multiprocessor at most
FEW_HEADS = AttentionConfig(splits=MAX_SPLITS, warps=4, late=True)  # of several streams: splits for one wave
MANY_HEADS = AttentionConfig(splits=4, tile=32, warps=4)  # where one wave has no room for two splits
WAVE = 3  # occupancy of FEW_HEADS, programs a multiprocessor
ATTENTION_LINEAR = AttentionLinearConfig(AttentionConfig(splits=4, warps=4), LinearConfig(stages=1, ahead=0, late=True))


def tile_bytes(config: LinearConfig, *widths: int) -> int:
    """Shared memory of one tile of half-precision rows, bytes, parts padded to whole chunks; 0 without a pipeline."""
    chunks = sum(-(-width // config.columns) for width in widths)
    return config.rows * chunks * config.columns * 2 if config.stages > 1 else 0


def fit_shared_memory(config: LinearConfig, shared_bytes: int, *widths: int) -> LinearConfig:
    """The configuration with fewer rows, then stages, then programs, so that it fits a multiprocessor.

    Parameters
    ----------
    config : LinearConfig
    shared_bytes : int
        Shared memory of one multiprocessor.
    *widths : int
        Values of a weight row, part by part.

    Returns
    -------
    LinearConfig
    """
    room = shared_bytes - OWN_BYTES
    while config.stages * tile_bytes(config, *widths) > room and config.rows > 1:
        config = replace(config, rows=config.rows // 2)
    while config.stages * tile_bytes(config, *widths) > room:  # ends at one stage, which needs no shared memory
        config = replace(config, stages=config.stages - 1)
    return replace(config, per_sm=min(config.per_sm, shared_bytes // program_bytes(config, *widths)))


def program_bytes(config: LinearConfig, *widths: int) -> int:
    """Shared memory of one program, bytes: Triton keeps a tile less than there are stages."""
    return (config.stages - 1) * tile_bytes(config, *widths) + OWN_BYTES


def default_norm_linear(hidden: int, gated: bool, shared_bytes: int) -> LinearConfig:
    """What `norm_linear` uses; gated rows come in pairs."""
    return fit_shared_memory(LINEAR, shared_bytes, *([hidden] * (2 if gated else 1)))


def default_linear_residual(n: int, m: int, shared_bytes: int) -> LinearConfig:
    """What `linear_residual` uses for inputs of n and m values; long ones need more threads to hold them."""
    config = RESIDUAL if n + m <= 16384 else replace(RESIDUAL, columns=2048, warps=8)
    return fit_shared_memory(config, shared_bytes, n, m)


def stream_columns(streams: int, config: MultiStreamConfig) -> int:
    """Columns of a tile that hold the streams: one width of the matrix units, or two, which warps of one part share."""
    return 8 if streams <= 8 and config.parts > 1 else MAX_STREAMS


def multi_stream_bytes(config: MultiStreamConfig, gated: bool, streams: int) -> int:
    """Shared memory of one program, bytes: Triton keeps a chunk less than there are stages."""
    rows = config.rows * (2 if gated else 1) + stream_columns(streams, config)
    return (config.stages - 1) * rows * config.columns * 2 + OWN_BYTES


def fit_multi_stream(config: MultiStreamConfig, gated: bool, streams: int, shared_bytes: int) -> MultiStreamConfig:
    """The configuration with fewer stages, then programs, so that it fits a multiprocessor."""
    while config.stages > 2 and multi_stream_bytes(config, gated, streams) > shared_bytes:
        config = replace(config, stages=config.stages - 1)
    fitting = shared_bytes // multi_stream_bytes(config, gated, streams)
    return replace(config, per_sm=max(1, min(config.per_sm, fitting)))


def fit_held(config: MultiStreamConfig, streams: int, width: int, shared_bytes: int) -> MultiStreamConfig | None:
    """A configuration that keeps the inputs with fewer programs, then stages, so that it fits a multiprocessor.

    None where it does not, or where the inputs of more than 8 streams, or rows longer than those that were measured,
    would take too many registers: the op's own default then.
    """
    if streams > MAX_HELD_STREAMS or width > MAX_HELD_WIDTH:
        return None
    padded = -(-width // config.columns) * config.columns
    row, tile = stream_columns(streams, config) * padded * 2, config.rows * padded * 2
    for stages in range(config.stages, 1, -1):
        size = (stages - 1) * tile + row + OWN_BYTES
        if size <= shared_bytes:
            return replace(config, stages=stages, per_sm=min(config.per_sm, shared_bytes // size))
    return None


def default_multi_stream(
    rows: int, gated: bool, streams: int, shared_bytes: int, multiprocessors: int
) -> MultiStreamConfig:
    """What `multi_stream_linear` uses for so many outputs: long chunks where few tiles have to keep memory busy."""
    few = rows <= 2 * multiprocessors * FEW_TILES.rows
    return fit_multi_stream(FEW_TILES if few else MULTI_STREAM, gated, streams, shared_bytes)


def default_attention(group: int, head_dim: int, ring: int, pinned_slots: int) -> AttentionConfig:
    """What `attention_decode` uses for `group` queries a key-value head."""
    config = UNGROUPED if head_dim <= 96 else WIDE
    return fit_attention(config, group, head_dim, ring, pinned_slots)


def several_attention(heads: int, head_dim: int, ring: int, pinned_slots: int, multiprocessors: int) -> AttentionConfig:
    """What `attention_decode` uses for the key-value heads of several streams, one query each: few splits."""
    splits = WAVE * multiprocessors // heads - 1  # one program more serves the pinned slots
    config = MANY_HEADS if splits < 2 else replace(FEW_HEADS, splits=min(splits, MAX_SPLITS // 2))
    return fit_attention(config, 1, head_dim, ring, pinned_slots)


def fit_attention(config: AttentionConfig, group: int, head_dim: int, ring: int, pinned_slots: int) -> AttentionConfig:
    """The configuration with matrix units where they are needed, and fewer splits where many slots are pinned."""
    if (group > 1 or head_dim > 128) and not config.dot:
        config = GROUPED
    return _fit_splits(config, ring, pinned_slots)


def default_attention_linear(
    hidden: int, head_dim: int, ring: int, pinned_slots: int, shared_bytes: int
) -> AttentionLinearConfig:
    """What `attention_linear` uses."""
    return fit_attention_linear(ATTENTION_LINEAR, hidden, head_dim, ring, pinned_slots, shared_bytes)


def fit_attention_linear(
    config: AttentionLinearConfig, hidden: int, head_dim: int, ring: int, pinned_slots: int, shared_bytes: int
) -> AttentionLinearConfig:
    """The configuration with smaller tiles for wide heads (two of them are held in registers) and what else fits."""
    attention = _fit_splits(config.attention, ring, pinned_slots)
    while attention.tile > 16 and attention.tile * head_dim > 64 * 96:
        attention = replace(attention, tile=attention.tile // 2)
    return AttentionLinearConfig(attention, fit_shared_memory(config.linear, shared_bytes, hidden))


def _fit_splits(config: AttentionConfig, ring: int, pinned_slots: int) -> AttentionConfig:
    while config.splits > 1 and sum(count_programs(config.splits, ring, pinned_slots)[1:]) > MAX_SPLITS:
        config = replace(config, splits=config.splits // 2)
    return config


def count_programs(splits: int, ring: int, pinned_slots: int) -> tuple[int, int, int]:
    """Slots a program of attention, programs of the ring, programs of the pinned slots (at least one)."""
    per = -(-ring // splits)
    per = -(-per // 8) * 8
    return per, -(-ring // per), max(1, -(-pinned_slots // per))


def live_programs(per: int, most_visible: int) -> int:
    """Programs of `per` slots for any `most_visible` slots: the last one of ring, and of pinned slots, is not full."""
    return -(-most_visible // per) + 1


def default_prefill(tokens: int, heads: int, head_dim: int, processors: int) -> PrefillConfig:
    """What `attention_prefill` uses: tall tiles where they fill the device; a short chunk splits the keys instead.

    Parameters
    ----------
    heads : int
        Query heads of all rows of the batch.
    processors : int
        Multiprocessors of the device.
    """
    rows = 128
    while rows > 16 and (tokens <= rows // 2 or (rows > 64 and -(-tokens // rows) * heads < processors)):
        rows //= 2
    programs, splits = -(-tokens // rows) * heads, 1
    while programs < processors and splits < 16 and 2 * splits * programs <= 2 * processors:
        splits *= 2
    return PrefillConfig(rows=rows, columns=64, warps=8 if rows == 128 else 4, stages=2, splits=splits)
