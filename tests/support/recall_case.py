"""A small recall: options of a cache and of its choosers, a text that repeats itself, and what an event says."""

import torch
from oracle.models import token_ids
from oracle.network import Network
from oracle.recall import Attention, Words, chosen

from sinkstream.cache import StreamingCache
from sinkstream.engine import Engine

TOKENS = 320
STRICT = {"sink": 4, "window": 44}
POLICIES = {
    "strict": STRICT,
    "lazy": {"sink": 3, "window": 40, "compress_every": 12},
    "no-sink+overlap+max-drop": {"sink": 0, "window": 40, "compress_every": 11, "overlap": 4, "max_drop": 3},
    "slack": {"sink": 2, "window": 33, "slack": 9},
}
SMALL = {"recall_every": 8, "recall_block": 4, "recall_slots": 12, "recall_hold": 8, "recall_alarms": 0}
WORDS = {"recall_level": 3.0, "recall_row_level": 2.6, "recall_run_level": 2.4}
WORDS |= {"recall_rare": 0.1, "recall_row_rare": 0.2}
WORDS_AGAIN = Words(4, 12, query=32, rare=0.1, level=3.0, row_rare=0.2, row_level=2.6, run_level=2.4)


def frames_of(recalled: StreamingCache | Engine) -> list[tuple[int, list[int]]]:
    """What the events say: (token before which the frame was set, tokens)."""
    return [(e.token, [t for s in e.spans for t in range(s.first, s.end)]) for e in recalled.recall_events]


def token_bytes(model) -> int:
    """Of the keys and values of a token in float32."""
    network = Network(model)
    return 4 * 2 * model.config.num_hidden_layers * network.kv_heads * network.head_dim


def repetitive(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Random ids, in which passages of 24 come again 100 tokens later."""
    ids = token_ids(tokens, seed=seed)
    for start in range(150, tokens - 24, 60):
        ids[start : start + 24] = ids[start - 100 : start - 76]
    return ids


def union(words: Words, attention: Attention):
    """Both, each behind its own gate."""

    def recaller(past, t, archived, question):
        found = words.scores(past.ids[0].tolist(), archived, past.ids[0, max(0, t - words.query) : t].tolist(), False)
        for number, score in attention.scores(past, t, archived).items():
            found[number] = max(found[number], score if score >= 1 else 0.0)
        return chosen(found, archived, words.block, words.budget, 1.0)

    return recaller


READING = {  # choosers that read keys and queries: options, and the same for the oracle
    "heads": (
        {"recall_heads": "1.1,2.0", "recall_row_level": 0.185, "recall_query_tokens": 8},
        Attention(4, 12, [(1, 1), (2, 0)], level=0.185, query=8),
    ),
    "mean-key": ({}, Attention(4, 12, [(i, j) for i in (0, 1, 2) for j in (0, 1)], mean=True)),
    "union": (
        {"recall_heads": [(0, 1)], "recall_row_level": 0.22, "recall_query_tokens": 8},
        union(Words(4, 12, query=8), Attention(4, 12, [(0, 1)], level=0.22, query=8)),
    ),
}
