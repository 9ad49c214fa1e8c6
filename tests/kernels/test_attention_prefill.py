"""`attention_prefill` against float64, query by query from unrotated keys: bands, two frames, wrapped rings, groups."""

import importlib

import pytest
import torch
from chunk_case import ChunkCase
from ops_cases import HALF, IMPLEMENTATIONS, NEEDS_TRITON, TOLERANCE, error, on_implementations

from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.config import PrefillConfig, default_prefill

op = importlib.import_module("sinkstream.kernels.attention_prefill")
NEOX = dict(query_heads=2, kv_heads=2, head_dim=80, rotary=20)
LLAMA = dict(query_heads=6, kv_heads=2, head_dim=64, rotary=64)
SMALL = PrefillConfig(rows=16, columns=16, warps=4, stages=1)


def strict(tokens: int, window: int, past: int) -> list[int]:
    """The oldest token of each query under strict eviction with 4 sinks."""
    return [max(t + 1 - window, 4 - past) for t in range(tokens)]


def lazy(tokens: int, every: int) -> list[int]:
    """The same where `every` tokens leave at a time, from a full ring of 20 on."""
    return [-20 + (t // every) * every for t in range(tokens)]


BANDS = [  # a chunk over an evicting ring that is wrapped; a whole stream; a start; the sinks themselves; lazy; a ring
    # with room; two with tiles that all queries see, in the ring and in the chunk; no sinks
    dict(first=strict(40, 21, 500), past=500, length=20, ring=23, start=11),
    dict(first=strict(70, 30, 0), past=0, window_at=0),
    dict(first=[4] * 3, past=0, window_at=0),
    dict(first=[2] * 9, past=2, window_at=2),
    dict(first=lazy(50, 7), past=90, length=20, ring=20, start=19),
    dict(first=strict(33, 5, 50), past=50, length=5, ring=64, start=62, window_at=40),
    dict(first=strict(50, 90, 500), past=500, length=89, ring=97, start=60),
    dict(first=strict(90, 70, 2), past=2, window_at=2),
    dict(first=[max(t - 9, -3) for t in range(20)], past=3, sink=0, length=3, ring=5, start=4),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of the twin, the last one shorter."""
    monkeypatch.setattr(op, "TILE", {"cpu": 24})


@pytest.mark.parametrize(("band", "implementation"), on_implementations(BANDS, quick=3))
@pytest.mark.parametrize("heads", [NEOX, LLAMA], ids=["neox", "llama"])
def test_bands(band, heads, implementation):
    case = ChunkCase(torch.float16, **heads, **band)
    assert error(case.run(implementation, config=SMALL), case.expected()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("band", "implementation"), on_implementations(BANDS[::2], quick=3))
@pytest.mark.parametrize("splits", [2, 8])
def test_splits_and_padding_change_nothing(band, splits, implementation):
    """The keys of a short chunk are split; its padding is NaN and stays as it was; the rows of other streams too."""
    case, config = ChunkCase(torch.float16, **LLAMA, **band), PrefillConfig(rows=32, columns=16, splits=splits)
    found = case.run_padded(implementation, padding=19, row=2, config=config)
    tokens = len(case.first)
    assert error(found[:, :tokens], case.expected()) < TOLERANCE[torch.float16]
    assert (found[:, tokens:] == 7).all()


@pytest.mark.parametrize(("band", "implementation"), on_implementations(BANDS[:4:2], quick=2))
@pytest.mark.parametrize("splits", [1, 4])
def test_the_sums_of_the_softmax_are_those_of_float64(band, splits, implementation):
    """Of padded queries they are infinite, so that these give nothing."""
    case, config = ChunkCase(torch.float16, **LLAMA, **band), PrefillConfig(rows=32, columns=16, splits=splits)
    tokens, padding, kv_heads, group = len(case.first), 19, 2, 3
    sums = torch.zeros(kv_heads, (tokens + padding) * group, device=case.query.device)
    found = case.run_padded(implementation, padding=padding, row=2, config=config, sums=sums)
    assert error(found[:, :tokens], case.expected()) < TOLERANCE[torch.float16]
    by_head = sums.view(kv_heads, tokens + padding, group).transpose(1, 2).flatten(0, 1)
    assert by_head[:, tokens:].isinf().all() and (by_head[:, tokens:] > 0).all()
    expected = case.expected_sums()
    assert (by_head[:, :tokens] - expected).abs().max() < 5e-3
    assert (by_head[:, :tokens] - expected.roll(1, 1)).abs().max() > 0.1, "control: those of another query"


@pytest.mark.parametrize(
    ("sizes", "implementation"), on_implementations([(24, 24), (96, 48), (128, 128), (64, 16), (16, 16)], quick=2)
)
@pytest.mark.parametrize("dtype", HALF)
def test_head_sizes_and_rows_of_a_batch(sizes, dtype, implementation):
    heads = dict(query_heads=4, kv_heads=1, head_dim=sizes[0], rotary=sizes[1])
    case = ChunkCase(dtype, **heads, **BANDS[0], batch=2)
    config = PrefillConfig(rows=32, columns=16, warps=4, stages=2)
    assert error(case.run(implementation, config=config), case.expected()) < TOLERANCE[dtype]


def test_the_twin_is_exact_in_float32():
    case = ChunkCase(torch.float32, **LLAMA, **BANDS[0])
    assert error(case.run("torch"), case.expected()) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_frames_and_the_band_matter(implementation):
    """The control: one frame for all, a query that is turned one too far, a band that begins one too late."""
    case = ChunkCase(torch.float16, **LLAMA, **BANDS[0])
    expected, bound = case.expected(), 2 * TOLERANCE[torch.float16]
    one_frame = case.band()
    one_frame.rotation = None
    for wrong in (one_frame, case.band(turn=1), case.band(first=1)):
        assert error(case.run(implementation, wrong, SMALL), expected) > bound


def test_mistakes_are_named():
    case = ChunkCase(torch.float16, **LLAMA, **BANDS[0])
    query, columns = case.query.half(), case.columns()
    for change, says in [
        ((query[:, :5], columns, case.band()), "query has 5 heads"),
        ((query[:, :, :3], columns, case.band()), "keys has shape"),
        ((query.float(), columns, case.band()), "keys has dtype"),
    ]:
        with pytest.raises(ValueError, match=says):
            attention_prefill(*change, scaling=1.0)


@NEEDS_TRITON
def test_the_kernel_takes_half_precision_only():
    case = ChunkCase(torch.float32, **LLAMA, **BANDS[0])
    with pytest.raises(ValueError, match=r"query has dtype torch\.float32"):
        case.run("triton")


def test_short_chunks_split_their_keys_and_long_ones_do_not():
    chosen = [default_prefill(tokens, 32, 64, 132) for tokens in (50, 130, 300, 2048)]
    assert [(c.rows, c.splits) for c in chosen] == [(64, 8), (64, 2), (64, 1), (128, 1)]
    assert default_prefill(9, 32, 64, 132).rows == 16
