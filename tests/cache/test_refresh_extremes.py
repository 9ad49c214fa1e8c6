"""Refresh at extreme sizes against the brute-force oracle: every scorer, the cache and the engine's CPU backends.

The observation reaches past the window, the window holds a token or two, more is pinned than the window holds, there
are no sinks, prunes come in stages: whatever the cache and the engine both work out about pinned tokens must be right.
"""

import pytest
import torch
from oracle.models import build, token_ids
from streams import (
    TOLERANCE,
    FakeTokenizer,
    chunk_sizes,
    feed,
    generate_text,
    make_cache,
    nll_of,
    oracle_run,
)

from sinkstream.cache import POSITIONS
from sinkstream.engine import Engine
from sinkstream.policies import SCORERS

TOKENS = 110
CPU_BACKENDS = ("ring", "kernels")  # the latter through the kernels' twins
PARTS = (1, 30, 27, 20)  # fed in turn: a step or a prefill
GEOMETRIES = {
    "window-1": {"sink": 2, "window": 1, "refresh": 6, "compress_every": 1},
    "window-1+lazy": {"sink": 4, "window": 1, "refresh": 5, "compress_every": 7},
    "window-2+no-sink": {"sink": 0, "window": 2, "refresh": 9, "compress_every": 1},
    "no-sink+lazy": {"sink": 0, "window": 3, "refresh": 20, "compress_every": 6},
    "cap-64": {"sink": 4, "window": 28, "refresh": 32, "compress_every": 1},
    "staged": {"sink": 3, "window": 2, "refresh": 8, "overlap": 3, "compress_every": 9, "max_drop": 2, "slack": 7},
    "slack-0": {"sink": 1, "window": 5, "refresh": 7, "slack": 0},
}
OBSERVATION = 32  # the default, longer than every window above


def policy(scorer: str, geometry: str) -> dict:
    """Options of one policy; an observation longer than the window where the scorer has one."""
    longer = {"observation": OBSERVATION} if "observation" in SCORERS[scorer].__dataclass_fields__ else {}
    return GEOMETRIES[geometry] | {"scorer": scorer} | longer


def jobs() -> list[tuple[str, str, str, str]]:
    """(scorer, geometry, family, positions): every scorer in every other geometry, families and frames in turn."""
    families = ("llama", "gpt_neox", "qwen3")
    return [
        (scorer, geometry, families[(i + j) % 3], POSITIONS[j % 2])
        for i, scorer in enumerate(SCORERS)
        for j, geometry in enumerate(GEOMETRIES)
        if (i + j) % 2 == 0
    ]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("scorer", "geometry", "family", "positions"), jobs())
def test_cache_and_engine_agree_with_the_oracle(scorer, geometry, family, positions):
    model, ids, options = build(family, layers=2), token_ids(TOKENS), policy(scorer, geometry)
    expected = oracle_run(model, ids, options, positions)
    assert sum(step.event for step in expected.steps) >= 6
    for way, nll in {**by_cache(model, ids, options, positions), **by_engine(model, ids, options, positions)}.items():
        known = ~nll.isnan()
        assert known.any() and worst(nll[known], expected.nll[known]) < TOLERANCE, way


def test_the_observation_reaches_past_every_window():
    """Otherwise the comparison above could not tell which queries are asked; asked alone, the latest keeps others."""
    assert all(o["window"] + o.get("overlap", 0) < OBSERVATION for o in GEOMETRIES.values())
    network, ids, options = build("llama", layers=2), token_ids(TOKENS), policy("window-attention", "cap-64")
    all_asked, one_asked = (oracle_run(network, ids, options | {"observation": n}).nll for n in (OBSERVATION, 1))
    assert worst(all_asked, one_asked) > 1e-2


def by_cache(model, ids: torch.Tensor, options: dict, positions: str) -> dict[str, torch.Tensor]:
    """NLL of all but the first token by every way of feeding a cache."""

    def caches():
        return make_cache(model, options, positions=positions, rebase_at=20)

    found = {"steps": feed(model, caches(), ids[None])}
    cache = caches()
    found["chunks"] = feed(model, cache, ids[None], chunk_sizes(cache, TOKENS))
    found["generate"] = generate_text(model, caches(), ids[None])
    padded = torch.cat([found["generate"], found["generate"][:, -1:]], 1)
    return {way: nll_of(logits, ids[None])[0] for way, logits in (found | {"generate": padded}).items()}


def by_engine(model, ids: torch.Tensor, options: dict, positions: str) -> dict[str, torch.Tensor]:
    """The same by every backend, stepped, and in parts that are stepped and prefilled in turn (NaN in a prefill)."""
    found = {}
    for backend in CPU_BACKENDS:
        e = Engine(model, tokenizer=FakeTokenizer(), backend=backend, positions=positions, rebase_at=20, **options)
        found[f"{backend}, stepped"] = e.score(ids)[1:].double()
        assert e.stats()["rebases"] >= 1 or e.state.rebase_at >= TOKENS
        e.reset()
        nll, fed = torch.full((len(ids),), float("nan")), 0
        for i, size in enumerate((*PARTS, len(ids) - sum(PARTS))):
            piece = ids[fed : fed + size]
            if i % 2:
                e.prefill(piece)
            else:
                nll[fed : fed + size] = e.score(piece)
            fed += size
        found[f"{backend}, in parts"] = nll[1:].double()
    return found
