"""What several streams share, against float64: any number of them, awkward shapes, one input or two, gates."""

from dataclasses import replace

import pytest
import torch
from ops_cases import DEVICE, HALF, NEEDS_TRITON, TOLERANCE, draw, error
from torch.nn import functional as F

from sinkstream.kernels import linear_residual, norm_linear
from sinkstream.kernels.config import (
    FEW_TILES,
    MAX_SPLITS,
    MULTI_STREAM,
    OWN_BYTES,
    MultiStreamConfig,
    count_programs,
    default_multi_stream,
    fit_held,
    fit_multi_stream,
    multi_stream_bytes,
    several_attention,
    stream_columns,
)
from sinkstream.kernels.multi_stream_linear import multi_stream_linear, norm_rows

SMALL = MultiStreamConfig(columns=32, stages=3, per_sm=1, parts=1)
WIDE = MultiStreamConfig(rows=32, columns=64, warps=4, per_sm=2, late=False, ahead=64)
HELD = MultiStreamConfig(columns=64, stages=3, per_sm=1, parts=2, held=True)
PARTS = MultiStreamConfig(columns=64, warps=4, stages=3, per_sm=1, parts=4)


@NEEDS_TRITON
@pytest.mark.parametrize("config", [SMALL, WIDE, PARTS])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("streams", "n", "m", "rows"), [(2, 64, 0, 48), (3, 200, 0, 37), (5, 80, 136, 70), (16, 40, 24, 130)]
)
def test_products_against_float64(streams, n, m, rows, dtype, config):
    a, wide = draw(streams, n, dtype=dtype), draw(streams, 8 + m, dtype=dtype)
    f = wide[:, 8:] if m else None  # rows of a wider buffer
    weight, bias = draw(rows, n + m, scale=(n + m) ** -0.5, dtype=dtype), draw(rows, scale=0.2, dtype=dtype)
    residual, out = draw(streams, rows, dtype=dtype), torch.full((streams + 1, rows), 7.0, dtype=dtype, device=DEVICE)
    multi_stream_linear(a, weight, out[:streams], f=f, bias=bias, residual=residual, config=config)
    joined = torch.cat([a, f], 1) if m else a
    expected = joined.double() @ weight.double().T + bias.double()
    assert error(out[:streams], expected + residual.double()) < TOLERANCE[dtype]
    assert error(out[:streams], expected) > 5 * TOLERANCE[dtype], "the control, no residual, is not told apart"
    assert (out[streams] == 7.0).all(), "a stream that is not there was written"


@NEEDS_TRITON
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rows", [48, 38])
def test_activations(rows, activation):
    a, weight = draw(4, 72, dtype=torch.float16), draw(rows, 72, scale=0.2, dtype=torch.float16)
    bias = draw(rows, scale=0.2, dtype=torch.float16)
    y = a.double() @ weight.double().T + bias.double()
    gate, up = y.chunk(2, 1)
    expected = F.gelu(y) if activation == "gelu" else F.silu(gate) * up
    out = torch.full(expected.shape, float("nan"), device=DEVICE)
    multi_stream_linear(a, weight, out, bias=bias, activation=activation, config=SMALL)
    assert error(out, expected) < TOLERANCE[torch.float16]
    assert error(out, y[:, : out.shape[1]]) > 0.1, "the control, no activation, is not told apart"


@NEEDS_TRITON
@pytest.mark.parametrize("hidden", [64, 1100])
@pytest.mark.parametrize(("norm", "with_beta"), [("layer", True), ("rms", False), ("rms", True)])
def test_norms_of_rows(norm, with_beta, hidden):
    wide = draw(3, hidden + 8) + 0.5
    x, gamma = wide[:, :hidden], 1 + draw(hidden, scale=0.1)
    beta = draw(hidden, scale=0.1) if with_beta else None
    out = norm_rows(x, gamma, beta, 1e-5, norm, torch.float16, pdl=False)
    x, gamma = x.double(), gamma.double()
    expected = F.layer_norm(x, (hidden,), gamma) if norm == "layer" else F.rms_norm(x, (hidden,), gamma, 1e-5)
    expected = expected + (0 if beta is None else beta.double())
    assert out.dtype == torch.float16 and error(out, expected) < TOLERANCE[torch.float16]


@NEEDS_TRITON
@pytest.mark.parametrize("config", [HELD, replace(HELD, rows=32, columns=128, warps=4, parts=4, late=False)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("streams", "n", "rows"), [(2, 256, 48), (8, 200, 90), (16, 72, 130)])
def test_inputs_that_stay_with_a_program(streams, n, rows, dtype, config):
    """Several tiles a program, rows and values that fill no tile and no chunk."""
    wide, weight = draw(streams, n + 8, dtype=dtype), draw(rows, n, scale=n**-0.5, dtype=dtype)
    a, bias, residual = wide[:, 8:], draw(rows, scale=0.2, dtype=dtype), draw(streams, rows, dtype=dtype)
    out = torch.full((streams + 1, rows), 7.0, dtype=dtype, device=DEVICE)
    expected = a.double() @ weight.double().T
    for terms in ({}, {"bias": bias, "residual": residual}):
        multi_stream_linear(a, weight, out[:streams], config=config, **terms)
        more = sum(term.double() for term in terms.values())
        assert error(out[:streams], expected + more) < TOLERANCE[dtype]
    assert error(out[:streams], expected) > 5 * TOLERANCE[dtype], "the control, no bias, is not told apart"
    assert (out[streams] == 7.0).all(), "a stream that is not there was written"


def test_what_is_refused():
    x, weight = draw(17, 64, dtype=torch.float16), draw(32, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="17 streams; accepted by the kernel: at most 16"):
        multi_stream_linear(x, weight, draw(17, 32))
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float32; accepted"):
        multi_stream_linear(x[:2], weight.float(), draw(2, 32))
    for more in ({"activation": "gelu"}, {"f": x[:2]}, {"second": (x[:2], draw(2, 16))}):
        with pytest.raises(ValueError, match="held=True in the configuration; accepted: for one input, one layer"):
            multi_stream_linear(x[:2], draw(32, 64, dtype=torch.float16), draw(2, 32), config=HELD, **more)


@NEEDS_TRITON
def test_what_goes_to_the_library_does_not_start_early():
    x, weight = draw(17, 64, dtype=torch.float16), draw(64, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="pdl=True with 17 streams; accepted: at most 16"):
        norm_linear(x, weight, norm_weight=weight[0], pdl=True, implementation="triton")
    with pytest.raises(ValueError, match="pdl=True with 17 streams; accepted: at most 16"):
        linear_residual(x, weight, pdl=True, implementation="triton")


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 228 * 1024])
@pytest.mark.parametrize("streams", [2, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_defaults_fit(gated, streams, shared_bytes):
    """Few tiles get long chunks; what does not fit gets fewer stages, then fewer programs."""
    few, many = (default_multi_stream(rows, gated, streams, shared_bytes, 132) for rows in (2048, 50000))
    assert few.columns > many.columns and min(few.per_sm, many.per_sm) >= 1 and min(few.stages, many.stages) >= 2
    assert all(c.per_sm * multi_stream_bytes(c, gated, streams) <= shared_bytes for c in (few, many))
    deep = replace(FEW_TILES, stages=20)
    assert fit_multi_stream(deep, gated, streams, shared_bytes).stages < 20, "control: so many stages fit nowhere"
    roomy = [default_multi_stream(rows, gated, streams, 1 << 20, 132) for rows in (2048, 50000)]
    assert roomy == [FEW_TILES, MULTI_STREAM]


@pytest.mark.parametrize(("streams", "width", "shared_bytes"), [(2, 2048, 99 * 1024), (8, 2000, 228 * 1024)])
def test_inputs_stay_where_there_is_room(streams, width, shared_bytes):
    roomy = MultiStreamConfig(16, 512, 4, 9, 4, parts=4, held=True)
    fitted = fit_held(roomy, streams, width, shared_bytes)
    bytes_each = ((fitted.stages - 1) * 16 + stream_columns(streams, fitted)) * 2048 * 2 + OWN_BYTES
    assert 2 <= fitted.stages < 9 and fitted.per_sm * bytes_each <= shared_bytes < bytes_each + 16 * 2048 * 2
    assert fit_held(fitted, streams, width, shared_bytes) == fitted, "what fits is left as it is"
    assert fit_held(roomy, 9, width, shared_bytes) is None, "control: too many streams"
    assert fit_held(roomy, streams, 2049, shared_bytes) is None, "control: too long rows"
    assert fit_held(roomy, streams, width, 64 * 1024) is None, "control: no room for one tile"


@pytest.mark.parametrize(("streams", "heads", "waves"), [(2, 32, 1), (4, 32, 1), (8, 32, 4), (2, 3, 1), (64, 64, 99)])
def test_attention_of_several_streams_is_one_wave_where_it_can_be(streams, heads, waves):
    config = several_attention(streams * heads, 80, 2048, 4, multiprocessors=132)
    programs = sum(count_programs(config.splits, 2048, 4)[1:])
    assert programs <= MAX_SPLITS and config.splits > 1 and programs * streams * heads <= waves * 3 * 132
