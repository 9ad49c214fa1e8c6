"""Log-probabilities of the tokens that are written, and of the likeliest ones beside them, kept on the device."""

from typing import Any, Protocol

import torch

from sinkstream.kernels.layout import TOKEN
from sinkstream.kernels.log_probs import MOST, top_log_probs

BLOCK = 256  # tokens that room is made for at a time

TopLogProbs = list[tuple[int, float]]


class Stepped(Protocol):
    """What is read of `StreamState`, which has the meaning of each."""

    logits: torch.Tensor
    scalars: torch.Tensor


class LogProbs:
    """Notes, between two steps, the log-probabilities of the token to come, under the model's own logits.

    Parameters
    ----------
    state : StreamState
    count : int
        Likeliest tokens to note; 0: the drawn token alone.
    """

    def __init__(self, state: Stepped, count: int):
        self._state, self.count = state, count
        self._kept = torch.empty_like(state.logits)
        self._blocks: list[tuple[torch.Tensor, ...]] = []
        self._noted = 0

    @staticmethod
    def check(count: Any, vocab: int) -> None:
        """Raise ValueError unless `count` can be noted."""
        most = min(MOST, vocab)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= most):
            raise ValueError(f"log_probs={count!r} is not accepted; accepted: a whole number from 0 to {most}, or None")

    def before_step(self) -> None:
        """Called before each step is launched: its token is drawn from the present logits."""
        self.after_step()
        row = self._noted % BLOCK
        if row == 0:
            self._blocks.append(self._room())
        normalisers, log_probs, tokens, _ = self._blocks[-1]
        self._kept.copy_(self._state.logits)
        top_log_probs(self._kept, self.count, out=(normalisers[row], log_probs[row], tokens[row]))
        self._noted += 1

    def after_step(self) -> None:
        """Called once the step is launched, and before the next one: its tokens are in the scalars."""
        if self._noted:
            drawn = self._state.scalars[:, TOKEN, None].long()
            self._blocks[-1][3][(self._noted - 1) % BLOCK].copy_(self._kept.gather(1, drawn)[:, 0])

    def forget(self) -> None:
        """Drop what was noted up to the latest step but one: only `latest` can be asked for it then."""
        self._blocks, self._noted = [], 0

    def _room(self) -> tuple[torch.Tensor, ...]:
        shape, device = (BLOCK, len(self._kept)), self._kept.device
        log_probs = torch.zeros(*shape, self.count, device=device)
        normalisers, logits = (torch.zeros(shape, device=device) for _ in range(2))
        return normalisers, log_probs, torch.zeros_like(log_probs, dtype=torch.int32), logits

    def latest(self, stream: int, token: int) -> tuple[float, TopLogProbs]:
        """Log-probability of a token at the place of the latest step, and of the likeliest ones; waits for the step."""
        normalisers, log_probs, ids, _ = (part[(self._noted - 1) % BLOCK, stream] for part in self._blocks[-1])
        top = list(zip(ids.tolist(), log_probs.tolist()))
        return (self._kept[stream, token] - normalisers).item(), top

    def of_stream(self, stream: int, tokens: int) -> tuple[list[float], list[TopLogProbs]]:
        """Log-probability of each token that the stream has written since, and of the likeliest ones beside it."""
        normalisers, log_probs, ids, logits = (torch.cat(parts)[:tokens, stream] for parts in zip(*self._blocks))
        top = [list(zip(*row)) for row in zip(ids.tolist(), log_probs.tolist())]
        return (logits - normalisers).tolist(), top
