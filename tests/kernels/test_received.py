"""Attention that candidates receive from the latest queries, against float64 with every query and key one by one."""

import pytest
import torch
from ops_cases import DEVICE, HALF, IMPLEMENTATIONS, draw, error, on_implementations

from sinkstream.kernels.received import received

CASES = [  # kv_heads, group, dim, kept, seen, pinned_slots, sink, pinned, ring, first, window, leaving
    (2, 1, 80, 6, 300, 9, 3, 9, 150, 120, 140, 40),
    (2, 3, 64, 32, 299, 70, 2, 70, 90, 3, 80, 70),
    (1, 4, 16, 32, 20, 4, 4, 4, 40, 0, 16, 9),
    (1, 2, 48, 1, 77, 0, 0, 0, 30, 7, 30, 5),
]
TOLERANCE = 4e-3


def turned(x, cos, sin):
    half = len(cos)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def case(dtype, kv_heads, group, dim, kept, seen, pinned_slots, sink, pinned, ring, first, window, leaving):
    """Inputs, options, and what float64 says."""
    layers = 2
    buffer = draw(layers, 3, kv_heads, pinned_slots + ring, dim, dtype=dtype)
    keys, queries = buffer[:, 1], draw(layers, 2, kv_heads * group, kept, dim, dtype=dtype)[:, 0]
    angle = -7.3 * 100 ** (-torch.arange(dim // 4, device=DEVICE).double() / (dim // 4))
    shift = torch.stack([angle.cos(), angle.sin()])
    live = [*range(pinned), *(pinned_slots + (first + i) % ring for i in range(window))]
    expected = torch.zeros(layers, kv_heads, pinned - sink + leaving, dtype=torch.float64, device=DEVICE)
    for i in range(min(kept, window)):
        token = seen - 1 - i
        own = queries[:, :, token % kept].double()
        frame, sees = turned(own, *shift), live[: len(live) - i]
        scores = [
            ((frame if e < pinned else own) * keys[:, :, s].double().repeat_interleave(group, 1)).sum(-1)
            for e, s in enumerate(sees)
        ]
        weights = (torch.stack(scores, -1) * dim**-0.5).softmax(-1).unflatten(1, (kv_heads, group)).mean(2)
        part = weights[..., sink : pinned + leaving]
        expected[..., : part.shape[-1]] += part
    options = dict(
        seen=seen, pinned_slots=pinned_slots, sink=sink, pinned=pinned, first=first, window=window, leaving=leaving
    )
    return (queries, keys, shift.float()), options, expected


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES, quick=2))
def test_attention_is_that_of_float64(sizes, implementation):
    inputs, options, expected = case(torch.float16, *sizes)
    assert error(received(*inputs, **options, implementation=implementation), expected) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_frames_and_dtypes(dtype, implementation):
    inputs, options, expected = case(dtype, *CASES[0])
    tolerance = TOLERANCE * (1 if dtype == torch.float16 else 6)
    assert error(received(*inputs, **options, implementation=implementation), expected) < tolerance
    queries, keys, shift = inputs
    still = torch.stack([torch.ones_like(shift[0]), torch.zeros_like(shift[1])])
    wrong = received(queries, keys, still, **options, implementation=implementation)
    assert error(wrong, expected) > 5 * tolerance, "control: queries that are not turned to the pinned frame"


def test_mistakes_are_named():
    (queries, keys, shift), options, _ = case(torch.float16, *CASES[0])
    for change, says in [({"pinned": 10}, "pinned=10"), ({"leaving": 141}, "leaving=141"), ({"first": 150}, "first")]:
        with pytest.raises(ValueError, match=says):
            received(queries, keys, shift, **options | change)
    with pytest.raises(ValueError, match="queries has dtype"):
        received(queries.float(), keys, shift, **options)
