"""Masks: numbers other than 0 and 1 are refused; a mask that hides by -inf would be read the wrong way round."""

import pytest
import torch
from oracle.models import build
from streams import PAD, make_cache, prompt_of, small_policy

from sinkstream.compat import with_cache

PADS = 5
ids = torch.cat([torch.full((1, PADS), PAD), prompt_of(30)], 1)
mask = torch.cat([torch.zeros(1, PADS), torch.ones(1, 30)], 1)
CALLS = {
    "generate": lambda m, c, given: m.generate(ids, attention_mask=given, max_new_tokens=2, **with_cache(m, c)),
    "call": lambda m, c, given: m(ids, attention_mask=given, **with_cache(m, c)),
    "prefill": lambda m, c, given: c.prefill(m, ids, attention_mask=given),
    "continuation": lambda m, c, given: c.continuation(ids, given),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("given", "shown"),
    [((1 - mask) * -1e9, "-1000000000.0"), (mask.log(), "-inf"), (mask * 2, "2.0"), (mask - 0.5, "-0.5")],
)
def test_a_mask_of_other_numbers_is_refused(call, given, shown):
    model = build("llama")
    cache = make_cache(model, small_policy("lazy"))
    with pytest.raises(ValueError, match=rf"attention_mask holds {shown}; accepted: 0 for a pad and 1 for a token"):
        CALLS[call](model, cache, given)
    assert cache.seen_tokens == 0


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_zeros_and_ones_is_taken_in_any_dtype(call, kind):
    model = build("llama")
    cache = make_cache(model, small_policy("lazy"))
    CALLS[call](model, cache, mask.to(kind))
    assert cache.seen_tokens == (0 if call == "continuation" else 31 if call == "generate" else 30)


def test_a_mask_of_too_few_columns_is_named():
    model = build("llama")
    for columns in (20, 40):
        cache = make_cache(model, small_policy("lazy"))
        with pytest.raises(ValueError, match="attention_mask, which needs as many columns as the conversation has"):
            CALLS["generate"](model, cache, torch.ones(1, columns))
        assert cache.seen_tokens == 0
