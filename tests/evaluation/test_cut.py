"""Cut and re-rotate says what the soft ring says, and refuses by name what it does not serve."""

from dataclasses import replace

import pytest
import tiny_model
import torch
from oracle.models import token_ids

from sinkstream.evaluation.backends import CutBackend
from sinkstream.evaluation.cut import CutDecoder
from sinkstream.evaluation.decoders import StreamingDecoder
from sinkstream.evaluation.settings import RunSettings

CAP, TOKENS = 24, 90
POLICIES = {
    "strict": {},
    "lazy": {"compress_every": 5},
    "max-drop": {"compress_every": 6, "max_drop": 2},
    "slack": {"slack": 4},
    "overlap": {"compress_every": 4, "overlap": 3},
}


def logits_of(decoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    with torch.inference_mode():
        rows = [decoder.prefill(ids[:prompt])]
        rows += [decoder.step(ids[i : i + 1]).clone() for i in range(prompt, len(ids))]
    decoder.close()
    return torch.cat(rows)


@pytest.mark.parametrize("prompt", [10, CAP, 50])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_it_says_what_the_soft_ring_says(family, policy, prompt):
    loaded, settings = tiny_model.loaded(family), RunSettings(policy, cap=CAP, options=POLICIES[policy])
    cut, ids = CutDecoder(loaded.model, settings), token_ids(TOKENS)
    found = logits_of(cut, ids, prompt)
    expected = logits_of(StreamingDecoder(loaded.model, settings, None), ids, prompt)
    assert (found - expected).abs().max() < 2e-4
    assert cut.last_step().visible <= CAP and cut.cache.get_seq_length() == cut.last_step().visible


def test_keys_that_are_not_rotated_would_show(monkeypatch):
    loaded, settings = tiny_model.loaded(), RunSettings("strict", cap=CAP)
    expected = logits_of(StreamingDecoder(loaded.model, settings, None), token_ids(TOKENS), CAP)
    cut = CutDecoder(loaded.model, settings)
    cut.rope = cut.rope.layer(0)
    monkeypatch.setattr(type(cut.rope), "rotate", lambda self, x, cos, sin: x.float())
    assert (logits_of(cut, token_ids(TOKENS), CAP) - expected).abs().max() > 0.01


def test_a_cap_above_the_trained_positions_is_refused_unless_it_is_asked_for():
    loaded = tiny_model.loaded()
    settings = RunSettings("strict", cap=loaded.trained_positions + 1)
    with pytest.raises(ValueError, match=r"up to 1025 entries .* trained on 1024 positions"):
        CutBackend(loaded, settings).open()
    CutBackend(loaded, replace(settings, allow_untrained_positions=True)).open().close()


@pytest.mark.parametrize("policy", ["full", "refresh-uniform", "adaptive-entropy"])
def test_what_it_does_not_serve_is_refused(policy):
    options = {"refresh": 4, "compress_every": 4} if policy == "refresh-uniform" else {}
    with pytest.raises(ValueError, match=r"does not run policy .* accepted: strict, lazy, slack"):
        CutDecoder(tiny_model.loaded().model, RunSettings(policy, cap=200, options=options))
