"""A decoder that copies: it predicts what followed the latest visible place where the last tokens stood before."""

import torch

from sinkstream.evaluation.decoders import ModuleDecoder
from sinkstream.policies import PruneSchedule, Step

MATCH = 16  # tokens that must stand before both places; with one token a character: a name of a fact, not its relation


class InductionDecoder(ModuleDecoder):
    """Of a token that follows nothing visible it says that all tokens are alike."""

    def __init__(self, model, settings):
        super().__init__(model, settings)
        policy = settings.policy()
        self.schedule, self.sink = (PruneSchedule(policy), policy.sink) if policy else (None, 0)
        self.vocabulary = model.config.vocab_size
        self.seen: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}

    def feed(self, ids, *, last_only):
        self._steps, rows = [], []
        for token in ids.tolist():
            step = self._append(token)
            self._steps.append(step)
            rows.append(self._predict(step))
        return torch.stack(rows[-1:] if last_only else rows)

    def steps(self):
        return self._steps

    def _append(self, token: int) -> Step:
        self.seen.append(token)
        return self.schedule.step() if self.schedule else Step(0, False, len(self.seen))

    def _predict(self, step: Step) -> torch.Tensor:
        logits, now = torch.zeros(self.vocabulary), len(self.seen)
        last = tuple(self.seen[-MATCH:])
        found = [end for end in self.places.get(last, []) if self._sees(end, step)]
        if found:
            logits[self.seen[found[-1]]] = 9.0
        self.places.setdefault(last, []).append(now)
        return logits

    def _sees(self, index: int, step: Step) -> bool:
        return index < self.sink or index >= len(self.seen) - (step.visible - self.sink)
