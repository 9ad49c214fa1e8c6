"""What a policy reads of every token of a chunk: risks of the predictions, and what is kept beside key and value."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sinkstream.cache.channels import UNCERTAINTY, token_channels
from sinkstream.engine.packing import Norm, PackedWeights
from sinkstream.engine.state import StreamState
from sinkstream.kernels.band import PAST, Band
from sinkstream.policies import SIGNALS

TILE = 128  # tokens whose logits are held at a time


@dataclass(frozen=True)
class TokensRead:
    """What has been read of the tokens of a chunk.

    Attributes
    ----------
    risks : dict of Tensor, (tokens,), float32
        Risk signal -> after every token.
    channels : dict of Tensor, (tokens,), float32
        By name; see `token_channels`.
    """

    risks: dict[str, torch.Tensor]
    channels: dict[str, torch.Tensor]


class TokenReader:
    """Reads the tokens of chunks for one policy; nothing that it launches depends on the host.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState

    Attributes
    ----------
    names : set of str
        Channels that it fills.
    """

    def __init__(self, weights: PackedWeights, state: StreamState):
        self.weights, self.state = weights, state
        self.names = state.channels.keys() - {"accumulated"}

    @property
    def draws(self) -> bool:
        """Whether the distribution that a token was drawn from is read."""
        return bool(UNCERTAINTY & self.names)

    def read(self, ids: torch.Tensor, x: torch.Tensor, band: Band) -> TokensRead:
        """Read the tokens of a chunk.

        Parameters
        ----------
        ids : Tensor, (tokens,), int64
            With padding.
        x : Tensor, (tokens, hidden)
            Outputs of the last layer.
        band : Band
            Of these tokens; ``state.logits`` are those before them.
        """
        state = self.state
        risks: dict[str, list[torch.Tensor]] = {signal: [] for signal in state.signals}
        found = token_channels(self.names - UNCERTAINTY, ids[None], None, state.structure)
        if not (risks or self.draws):
            return TokensRead({}, {name: known[0] for name, known in found.items()})
        drawn = [self._first(ids, band)] if self.draws else []
        following = torch.cat([ids[1:], ids[:1]])
        for part, tokens in zip(x.split(TILE), following.split(TILE)):
            logits = F.linear(norm_of(part, self.weights.final_norm), self.weights.head)
            log_probs = logits.float().log_softmax(-1)
            for signal, values in risks.items():
                values.append(SIGNALS[signal](log_probs))
            if self.draws:
                drawn.append(token_channels(UNCERTAINTY & self.names, tokens[None], log_probs[None], None))
        for name in drawn[0] if drawn else ():
            found[name] = torch.cat([known[name] for known in drawn], 1)[:, : len(ids)]
        return TokensRead(
            {s: torch.cat(v) for s, v in risks.items()}, {name: known[0] for name, known in found.items()}
        )

    def _first(self, ids: torch.Tensor, band: Band) -> dict[str, torch.Tensor]:
        """Of the first token, which was drawn from the logits before the chunk: 0 for the first of a stream."""
        log_probs = self.state.logits.index_select(0, band.device_row).log_softmax(-1)
        log_probs = log_probs.masked_fill(band.table[PAST] == 0, 0.0)
        return token_channels(UNCERTAINTY & self.names, ids[None, :1], log_probs[None], None)

    def note(self, read: TokensRead, band: Band) -> None:
        """Write the channels of the tokens of a band, which are the first that were read, to their slots."""
        g = self.state.geometry
        slots = band.slots(g.pinned_slots, g.ring)
        token = torch.arange(band.rows, device=slots.device).minimum(band.table[0] - 1)
        for name, known in read.channels.items():
            self.state.channels[name][:, band.device_row, :, slots] = known.index_select(0, token)[:, None, None]


def norm_of(x: torch.Tensor, weights: Norm) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last axis, in one kernel."""
    if weights.bias is not None:
        return F.layer_norm(x, weights.weight.shape, weights.weight, weights.bias, weights.eps)
    return F.rms_norm(x, weights.weight.shape, weights.weight, weights.eps)
