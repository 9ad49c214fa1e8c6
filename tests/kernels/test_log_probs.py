"""`top_log_probs` against float64: any width and count, ties, and minus infinity."""

import math

import pytest
import torch
from ops_cases import IMPLEMENTATIONS, draw

from sinkstream.kernels.log_probs import MOST, TILE, Drawn, top_log_probs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [3, TILE, TILE + 1, 5000])
@pytest.mark.parametrize("n", [0, 1, 3, MOST])
def test_any_width_and_count(vocab, n, implementation):
    if n > vocab:
        pytest.skip("more tokens than there are")
    torch.manual_seed(vocab)
    logits = 5 * draw(3, vocab)
    expected = logits.double().log_softmax(-1)
    normalisers, found, tokens = top_log_probs(logits, n, implementation=implementation)
    assert torch.allclose(normalisers.double(), logits.double().logsumexp(-1), rtol=1e-6)
    best = expected.topk(n, -1)
    assert torch.equal(tokens.long(), best.indices) and torch.allclose(found.double(), best.values, atol=1e-5)
    if n:
        assert not torch.allclose(found.double(), logits.double().topk(n, -1).values, atol=1e-5), "control"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits_and_minus_infinity(implementation):
    logits = draw(3, 2500)
    logits[0] = 1.0
    logits[1] = -math.inf
    logits[1, [7, 2400]] = torch.tensor([-501.0, -500.0], device=logits.device)  # a tile between them has none
    logits[2, [2000, 30, 1100]] = 60.0
    normalisers, found, tokens = top_log_probs(logits, 3, implementation=implementation)
    assert tokens.tolist() == [[0, 1, 2], [2400, 7, 0], [30, 1100, 2000]]
    expected = torch.tensor([-math.log(2500), -math.log1p(math.exp(-1)), -math.log(3)])
    assert torch.allclose(found[:, 0].cpu(), expected, atol=1e-4)
    assert found[1, 2] == -math.inf and torch.allclose(normalisers.cpu(), logits.cpu().logsumexp(-1))
    assert top_log_probs(torch.full_like(logits, -math.inf), 0, implementation=implementation)[0][0] == -math.inf


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_a_number_stays_so(implementation):
    logits = draw(2, 1500)
    logits[0, 1400] = math.nan
    normalisers, found, _ = top_log_probs(logits, 2, implementation=implementation)
    assert normalisers[0].isnan() and found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_kept_and_those_of_the_tokens_before_are_read(implementation):
    """The tokens lie in a column of a table; a negative one stands for any, and is read nowhere else."""
    before, logits = draw(3, TILE + 7), draw(3, TILE + 7)
    table = torch.tensor([[5, 3], [5, TILE + 6], [5, -1]], dtype=torch.int32, device=logits.device)
    kept, found = torch.zeros_like(logits), torch.zeros(3, device=logits.device)
    drawn = Drawn(before, table[:, 1:], found)
    plain = top_log_probs(logits, 2, implementation=implementation)
    both = top_log_probs(logits, 2, kept=kept, drawn=drawn, implementation=implementation)
    assert all(map(torch.equal, plain, both)) and torch.equal(kept, logits)
    assert found.tolist()[:2] == [before[0, 3].item(), before[1, TILE + 6].item()]
    assert found[2] in before[2] and not torch.equal(found[:2], logits[[0, 1], [3, TILE + 6]])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="logits has dtype"):
        top_log_probs(torch.zeros(1, 8, dtype=torch.float16), 1)
    for n in (-1, 9, MOST + 1):
        with pytest.raises(ValueError, match=f"n={n}"):
            top_log_probs(torch.zeros(1, 8), n)
    with pytest.raises(ValueError, match="tokens has dtype"):
        top_log_probs(torch.zeros(1, 8), 1, out=(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1)))
