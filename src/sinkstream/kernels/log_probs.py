"""Log-probabilities of a row of logits: the normaliser, and the n likeliest tokens, without a sort, in two kernels.

Each tile finds its own likeliest tokens and its part of the normaliser; one program a stream puts the parts together.
The first kernel also keeps the logits for whoever reads them once the next step has written others over them.
"""

from dataclasses import dataclass

import torch

from sinkstream.kernels.runtime import check_tensor, jit, launch, tl, triton, use_triton

TILE = 1024  # logits of one program
MOST = 20  # likeliest tokens


@dataclass(frozen=True)
class Drawn:
    """The tokens that were drawn from the logits before these, and where their logits go.

    Attributes
    ----------
    logits : Tensor, (streams, vocab), float32
        What the tokens were drawn from.
    tokens : Tensor, (streams, 1), int32
        May be strided. A negative one stands for any token.
    out : Tensor, (streams,), float32
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    out: torch.Tensor

    def check(self, streams: int, vocab: int) -> None:
        """Check them for logits of these axes. Raises ValueError."""
        device = self.logits.device
        check_tensor("drawn.logits", self.logits, (streams, vocab), dtypes=(torch.float32,), device=device)
        check_tensor("drawn.tokens", self.tokens, (streams, 1), dtypes=(torch.int32,), device=device, contiguous=False)
        check_tensor("drawn.out", self.out, (streams,), dtypes=(torch.float32,), device=device)

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Arguments of the kernel."""
        return self.logits, self.tokens, self.out, self.tokens.stride(0)

    def write(self) -> None:
        """What the kernel does, in plain PyTorch."""
        self.out.copy_(self.logits.gather(1, self.tokens.clamp(min=0).long())[:, 0])


NOT_READ = (None, None, None, 0)  # in place of `Drawn.arguments`


@jit
def _next_largest(values, indices):
    """The largest value and the smallest index that has it; 2^31 - 1 where all indices are taken."""
    left = indices < 2147483647
    top = tl.max(tl.where(left, values, -float("inf")), 0)
    return top, tl.min(tl.where(left & (values == top), indices, 2147483647), 0)


@jit
def _parts_kernel(
    logit_ptr, part_ptr, value_ptr, index_ptr, vocab, stride, kept_ptr, drawn_ptr, token_ptr, out_ptr, token_stride,
    N: tl.constexpr, TILE: tl.constexpr, KEEPS: tl.constexpr, DRAWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, stream): largest logit, sum of exponentials relative to it, the N likeliest tokens."""
    tile, stream = tl.program_id(0), tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logit_ptr + stream * stride + columns, mask=columns < vocab, other=-float("inf"))
    if KEEPS:
        tl.store(kept_ptr + stream * vocab + columns, values, mask=columns < vocab)
    if DRAWN:
        first = tile == 0
        token = tl.maximum(tl.load(token_ptr + stream * token_stride), 0)
        tl.store(out_ptr + stream, tl.load(drawn_ptr + stream * vocab + token, mask=first), mask=first)
    place = stream * tl.num_programs(0) + tile
    top = tl.max(values, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(part_ptr + place * 2, top)
    tl.store(part_ptr + place * 2 + 1, tl.sum(tl.exp(values - base), 0))
    values = tl.where(values != values, float("inf"), values)
    indices = tl.where(columns < vocab, columns, 2147483647)
    for i in range(N):
        value, index = _next_largest(values, indices)
        tl.store(value_ptr + place * N + i, value)
        tl.store(index_ptr + place * N + i, index)
        indices = tl.where(indices == index, 2147483647, indices)


@jit
def _together_kernel(
    part_ptr, value_ptr, index_ptr, normaliser_ptr, top_ptr, token_ptr, tiles, N: tl.constexpr, PARTS: tl.constexpr,
    SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a stream: the normaliser of all tiles, and the N likeliest of their tokens."""
    stream = tl.program_id(0)
    part = tl.arange(0, PARTS)
    place = part_ptr + (stream * tiles + part) * 2
    tops = tl.load(place, mask=part < tiles, other=-float("inf"))
    sums = tl.load(place + 1, mask=part < tiles, other=0.0)
    top = tl.max(tops, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    normaliser = base + tl.log(tl.sum(sums * tl.exp(tops - base), 0))
    tl.store(normaliser_ptr + stream, normaliser)
    if N > 0:
        column = tl.arange(0, SIZE)
        inside = column < tiles * N
        values = tl.load(value_ptr + stream * tiles * N + column, mask=inside, other=-float("inf"))
        indices = tl.load(index_ptr + stream * tiles * N + column, mask=inside, other=2147483647)
        for i in range(N):
            value, index = _next_largest(values, indices)
            tl.store(top_ptr + stream * N + i, value - normaliser)
            tl.store(token_ptr + stream * N + i, index)
            indices = tl.where(indices == index, 2147483647, indices)


def top_log_probs(
    logits: torch.Tensor,
    n: int,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    kept: torch.Tensor | None = None,
    drawn: Drawn | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normaliser and likeliest tokens of every stream; a log-probability is a logit less the normaliser.

    Parameters
    ----------
    logits : Tensor, (streams, vocab), float32
    n : int
        Likeliest tokens, 0 to `MOST` and at most the vocabulary.
    out : tuple of Tensor, optional
        What is returned, written in place.
    kept : Tensor, (streams, vocab), float32, optional
        The logits are copied to it.
    drawn : Drawn, optional
        Of the logits before, which are in another tensor than `kept`.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    normalisers : Tensor, (streams,), float32
        Natural logarithm of the sum of exponentials.
    log_probs : Tensor, (streams, n), float32
        Natural logarithms, the largest first.
    tokens : Tensor, (streams, n), int32
        Of equally likely tokens the smaller id comes first.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    check_tensor("logits", logits, (None, None), dtypes=(torch.float32,), device=logits.device, contiguous=False)
    (streams, vocab), device = logits.shape, logits.device
    if not 0 <= n <= min(MOST, vocab):
        raise ValueError(f"n={n}; accepted: whole numbers from 0 to {min(MOST, vocab)}")
    if out is None:
        out = (
            torch.empty(streams, device=device),
            torch.empty(streams, n, device=device),
            torch.empty(streams, n, dtype=torch.int32, device=device),
        )
    normalisers, log_probs, tokens = out
    check_tensor("normalisers", normalisers, (streams,), dtypes=(torch.float32,), device=device)
    check_tensor("log_probs", log_probs, (streams, n), dtypes=(torch.float32,), device=device)
    check_tensor("tokens", tokens, (streams, n), dtypes=(torch.int32,), device=device)
    if kept is not None:
        check_tensor("kept", kept, (streams, vocab), dtypes=(torch.float32,), device=device)
    if drawn is not None:
        drawn.check(streams, vocab)
    if not use_triton(implementation, logits):
        if drawn is not None:
            drawn.write()
        if kept is not None:
            kept.copy_(logits)
        normalisers.copy_(logits.logsumexp(-1))
        found = logits.sort(dim=-1, descending=True, stable=True)
        log_probs.copy_(found.values[:, :n] - normalisers[:, None])
        tokens.copy_(found.indices[:, :n])
        return out
    tiles = -(-vocab // TILE)
    parts = torch.empty(streams, tiles, 2, device=device)
    values = torch.empty(streams, tiles, max(n, 1), device=device)
    indices = torch.empty(streams, tiles, max(n, 1), dtype=torch.int32, device=device)
    launch(
        _parts_kernel, (tiles, streams), logits, parts, values, indices, vocab, logits.stride(0),
        logits if kept is None else kept, *(NOT_READ if drawn is None else drawn.arguments),
        N=n, TILE=TILE, KEEPS=kept is not None, DRAWN=drawn is not None, num_warps=4, pdl=False,
    )  # fmt: skip
    launch(
        _together_kernel, (streams,), parts, values, indices, normalisers, log_probs, tokens, tiles, N=n,
        PARTS=triton.next_power_of_2(tiles), SIZE=triton.next_power_of_2(tiles * max(n, 1)), num_warps=8, pdl=False,
    )  # fmt: skip
    return out
