"""How each stream draws its next token: rows of numbers on the device, which one captured step reads for any options.

The draw is a race: token i finishes at E_i / w_i, with w_i its probability and E_i an exponential random number, and
the first token that may be drawn wins. So the winner among any set of tokens has the distribution renormalised to that
set. E_i comes from Philox4x32-10 (Salmon et al., SC 2011), keyed by the stream's seed, at the count (token id, position
in the stream): whatever else is drawn beside a stream changes nothing.
"""

from dataclasses import dataclass

import torch

from sinkstream.kernels.fixed_point import LIMIT

# Columns of `numbers`, float64.
SCALE = 0  # 2^24 / (temperature ln 2): from a difference of logits to a key
TOP_P = 1  # 1: every token
REPETITION = 2
PRESENCE = 3
FREQUENCY = 4
NUMBERS = 8
# Columns of `settings`, int64.
KIND = 0
TOP_K = 1  # 0: every token
MIN_P = 2  # the largest key that may be drawn
SEED = 3
SETTINGS = 8

# Kinds
PLAIN = 0  # the likeliest token
RACE = 1  # any token
THRESHOLD = 2  # tokens above the thresholds of top-k, top-p and min-p

PROMPT = 1 << 14  # in `counts`: the token is in the prompt; below this bit, how often it was drawn
MOST = PROMPT - 1


@dataclass
class SampleTable:
    """Sampling options of every stream.

    Attributes
    ----------
    numbers : Tensor, (streams, 8), float64
    settings : Tensor, (streams, 8), int64
    counts : Tensor or None, (streams, vocab), int16
        What the penalties count, see `PROMPT`; None: no stream has penalties or biases.
    bias : Tensor or None, (streams, vocab), float32
        Added to the logits; None exactly if `counts` is.
    """

    numbers: torch.Tensor
    settings: torch.Tensor
    counts: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def empty(cls, streams: int, device: torch.device) -> "SampleTable":
        """A table whose streams take the likeliest token."""
        table = cls(
            torch.zeros(streams, NUMBERS, dtype=torch.float64, device=device),
            torch.zeros(streams, SETTINGS, dtype=torch.int64, device=device),
        )
        for s in range(streams):
            table.clear(s)
        return table

    def span(self, first: int, count: int) -> "SampleTable":
        """The rows of `count` streams from `first` on, as views."""
        which = slice(first, first + count)
        counts, bias = (None if part is None else part[which] for part in (self.counts, self.bias))
        return SampleTable(self.numbers[which], self.settings[which], counts, bias)

    def clear(self, stream: int) -> None:
        """Make a stream take the likeliest token."""
        self.fill(stream, [0.0, 1.0, 1.0, 0.0, 0.0], [PLAIN, 0, LIMIT, 0])
        if self.counts is not None and self.bias is not None:
            self.counts[stream] = 0
            self.bias[stream] = 0

    def fill(self, stream: int, numbers: list[float], settings: list[int]) -> None:
        """Write the first columns of a stream's rows."""
        self.numbers[stream, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        self.settings[stream, : len(settings)] = torch.tensor(settings)

    def remember(self, vocab: int) -> None:
        """Allocate `counts` and `bias`, once."""
        if self.counts is None:
            streams, device = len(self.numbers), self.numbers.device
            self.counts = torch.zeros(streams, vocab, dtype=torch.int16, device=device)
            self.bias = torch.zeros(streams, vocab, dtype=torch.float32, device=device)

    def note(self, tokens: torch.Tensor, drawn: torch.Tensor) -> None:
        """Count a drawn token of each stream, ``(streams,)`` int64, where `drawn`, bool, says that it was drawn."""
        if self.counts is not None:
            place = (torch.arange(len(tokens), device=tokens.device), tokens)
            counts = self.counts[place]
            self.counts[place] = torch.where(drawn & ((counts & MOST) < MOST), counts + 1, counts)
