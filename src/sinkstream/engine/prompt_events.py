"""Prompts under policies that observe: the next prune, or its pinned tokens, are not known beforehand.

A scorer chooses the pinned tokens at every prune. A scorer that reads attention alone chooses in each layer, so a chunk
crosses the prunes (`prompt_choices`). Under other scorers a chunk ends before the next prune, and the choice is made
between two chunks.

The prunes of an adaptive trigger depend on the logits of earlier tokens. So a chunk is computed under foreseen prunes,
without writing to the ring. The risks of the chunk then say where the prunes are. Tokens up to the first wrongly
foreseen prune have seen the right window, and are kept. The others saw almost the right window: their risks foresee
the prunes of the next chunk, as a rule all of them.
"""

import torch

from sinkstream.cache.choices import tokens_of
from sinkstream.engine.foreseen_chunks import ForeseenChunks
from sinkstream.engine.prompt import Coming, PromptForward
from sinkstream.engine.prompt_choices import ChoosingForward, chooses_in_chunk
from sinkstream.engine.refresh import refresh_if_due

FORESEEN_TOKENS = 1024  # most of one forward under foreseen prunes, whose keys and values are held twice
# fewest tokens of one, by kind of device; elsewhere the launches of its kernels take as long for any number
FEWEST = {"cpu": 256}


class EventPrompts:
    """Feeds prompts to the streams of one state, under a policy whose prunes or pinned tokens depend on the prompt.

    Parameters
    ----------
    forward : PromptForward
    """

    def __init__(self, forward: PromptForward):
        self.forward, self.state = forward, forward.state
        self.foreseen_tokens = min(FORESEEN_TOKENS, forward.chunk_tokens)
        self.fewest = FEWEST.get(self.state.device.type, self.foreseen_tokens)
        self._size = self.foreseen_tokens  # of the next forward
        self.foreseen = ForeseenChunks(
            forward, self.foreseen_tokens, capture=forward.short.capture and bool(forward.short.sizes)
        )
        self.choosing: ChoosingForward | None = None
        if chooses_in_chunk(self.state):
            self.choosing = ChoosingForward(forward)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, stream: int) -> None:
        """Append token ids ``(tokens,)`` to a stream; the logits after the last are in ``state.logits`` afterwards."""
        fed, risks = 0, {signal: list[float]() for signal in self.state.signals}
        self._size = self.foreseen_tokens
        with torch.cuda.device_of(ids):  # Triton launches on the current device
            while fed < len(ids):
                refresh_if_due(self.state, stream)
                if risks:
                    fed += self._foresee(ids[fed:], stream, risks)
                else:
                    fed += self._across_prunes(ids[fed:], stream) or self._until_prune(ids[fed:], stream)

    def _across_prunes(self, ids: torch.Tensor, stream: int) -> int:
        """Append one chunk in which pinned tokens are chosen; returns how many tokens, 0 where no such chunk comes."""
        state, choosing = self.state, self.choosing
        if choosing is None:
            return 0
        ahead = state.schedules[stream].copy()
        steps = ahead.advance(min(len(ids), choosing.tokens))
        tokens, prunes = tokens_of(state.policy, steps)
        if not (state.counters[stream].pruned or steps.drop[0]):
            return 0  # the first prune also fills the pinned slots
        if prunes < choosing.fewest_prunes(tokens):
            return 0
        if tokens < len(steps):
            ahead = state.schedules[stream].copy()
            steps = ahead.advance(tokens)
        choosing(ids[:tokens], stream, ahead, steps)
        return tokens

    def _until_prune(self, ids: torch.Tensor, stream: int) -> int:
        """Append the tokens up to the next prune, whose place is known; returns how many."""
        ahead = self.state.schedules[stream].copy()
        ahead.step()
        size = min(len(ids), self.forward.chunk_tokens, 1 + ahead.sure_steps())
        self.forward.append(ids[:size], stream, size == len(ids))
        return size

    def _foresee(self, ids: torch.Tensor, stream: int, risks: dict[str, list[float]]) -> int:
        """Append the tokens up to the first prune that was foreseen wrongly; returns how many.

        Parameters
        ----------
        risks : dict of list of float
            Risk signal -> as foreseen, after the next token, the one behind it …; taken on.
        """
        state, forward = self.state, self.forward
        forward.rebase(stream)
        schedule = state.schedules[stream]
        steps = schedule.foresee(risks, min(len(ids), self._size))
        if state.policy.scorer is not None and steps.drop[1:].any():
            steps = steps[: 1 + int((steps.drop[1:] > 0).argmax())]
        ids, all_of_them = ids[: len(steps)], len(steps) == len(ids)
        chunk = self.foreseen.of(len(ids))
        coming = Coming(state, stream, steps, chunk.bands[0])
        computed = chunk.compute(ids, coming)
        found = dict(zip(computed.read.risks, computed.risks[:, : len(ids)].tolist()))
        after = schedule.fork()
        kept = after.follow(steps, found)
        coming = Coming(state, stream, steps[:kept], chunk.bands[1])
        chunk.store(coming)
        if computed.read.channels:
            forward.reader.note(computed.read, coming.band)
        if forward.reader.draws or (all_of_them and kept == len(steps)):
            forward.predict(computed.x, coming.band)
        coming.count(after)
        for signal, values in found.items():
            risks[signal] = values[kept:] + risks[signal][len(steps) :]
        self._size = min(max(self.fewest, 2 * kept), self.foreseen_tokens)
        return kept
