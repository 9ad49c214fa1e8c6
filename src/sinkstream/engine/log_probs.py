"""Log-probabilities of the tokens that are written, and of the likeliest ones beside them, kept on the device."""

from typing import Any, Protocol

import torch

from sinkstream.kernels.layout import TOKEN
from sinkstream.kernels.log_probs import MOST, Drawn, top_log_probs

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
        self._both = [torch.empty_like(state.logits) for _ in range(2)]  # logits of two steps, in turns
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
        drawn, row = self._drawn(), self._noted % BLOCK
        if row == 0:
            self._blocks.append(self._room())
        normalisers, log_probs, tokens, _ = self._blocks[-1]
        self._noted += 1
        out = normalisers[row], log_probs[row], tokens[row]
        top_log_probs(self._state.logits, self.count, out=out, kept=self._kept, drawn=drawn)

    def after_step(self) -> None:
        """Called once the last step is launched: its tokens are in the scalars."""
        drawn = self._drawn()
        if drawn is not None:
            drawn.write()

    def _drawn(self) -> Drawn | None:
        """Tokens of the latest step, once it is launched and before the next one."""
        if not self._noted:
            return None
        return Drawn(self._kept, self._state.scalars[:, TOKEN, None], self._blocks[-1][3][(self._noted - 1) % BLOCK])

    @property
    def _kept(self) -> torch.Tensor:
        """Logits that the token of the latest step was drawn from, ``(streams, vocab)``."""
        return self._both[self._noted % 2]

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
