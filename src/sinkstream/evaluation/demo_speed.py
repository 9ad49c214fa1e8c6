"""The speed of the machine at what a demo consists of, measured on the model itself."""

from contextlib import closing
from dataclasses import dataclass

import torch

from sinkstream.evaluation.backends import open_decoder
from sinkstream.evaluation.decoders import ModuleDecoder, RecomputeDecoder
from sinkstream.evaluation.settings import BLOCK_TOKENS, RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel

BLOCK = BLOCK_TOKENS["cpu"]
SHORT = 32  # tokens of one forward of refresh, whose blocks end at its prunes
STEPS, SHORTS, BLOCKS, WINDOWS = 8, 4, 2, 2  # pieces of each kind that are measured, after one step that is not


@dataclass(frozen=True)
class Speed:
    """Mean seconds of the pieces that a demo consists of."""

    step: float  # one token by itself
    # short, block: one forward of `SHORT` and of `BLOCK` tokens, scored
    short: float
    block: float
    window: float  # one window of recompute


def tokens_measured(cap: int) -> int:
    """Tokens of the text that `measure_speed` takes."""
    return cap + 1 + STEPS + SHORTS * SHORT + BLOCKS * BLOCK + 1


@torch.inference_mode()
def measure_speed(loaded: LoadedModel, ids: torch.Tensor, cap: int) -> Speed:
    """Measure the pieces of a demo on the model itself, which takes a few seconds.

    `ids` are at least `tokens_measured(cap)` token ids (tokens,) int64; `cap` is also the window of recompute.
    """
    device = loaded.model.device
    ids = ids.to(device)
    with closing(open_decoder(loaded, RunSettings("strict", cap, timed_tokens=STEPS))) as strict:
        assert isinstance(strict, ModuleDecoder), "the backend hf runs the module of transformers"
        strict.prefill(ids[:cap])
        strict.step(ids[cap : cap + 1])
        means, at = [], cap + 1
        for size, times in ((1, STEPS), (SHORT, SHORTS), (BLOCK, BLOCKS)):
            places = range(at, at + times * size, size)
            pieces = [(ids[i : i + size], ids[i + 1 : i + size + 1]) for i in places]
            means.append(sum(timed(strict.score, *piece, device=device)[1] for piece in pieces) / times)
            at += times * size
    with closing(open_decoder(loaded, RunSettings("recompute", cap))) as recompute:
        assert isinstance(recompute, RecomputeDecoder), "the method recompute has a decoder of its own"
        recompute.skip(ids[:cap])
        targets = slice(cap + 1, cap + WINDOWS + 1)
        _, seconds = timed(recompute.score, ids[cap : cap + WINDOWS], ids[targets], device=device)
    step, short, block = means
    return Speed(step, short, block, seconds / WINDOWS)
