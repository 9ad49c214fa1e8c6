"""A scorer of your own in one class: what it keeps, and what it costs against a built-in scorer.

    python examples/new_scorer.py
    python examples/new_scorer.py --model DIRECTORY --text FILE.txt --tokens 4096 --cap 512

A scorer gives every candidate for the pinned slots a number; the highest numbers stay. The scorer sees numbers only:
no model, no cache, no device. Moved to src/sinkstream/policies/scorers/, the same class is a choice of the command line
and is tested like every other (CONTRIBUTING.md).
"""

import argparse
from dataclasses import dataclass

import torch

from sinkstream import StreamingCache
from sinkstream.data import load_text, tokenize
from sinkstream.models import load_model, resolve_device, resolve_dtype
from sinkstream.policies import SCORERS, Candidates
from sinkstream.policies.options import option
from sinkstream.policies.scorers.base import Scorer


@SCORERS.register("fading-surprise")
@dataclass(frozen=True)
class FadingSurprise(Scorer):
    """Keep the tokens that surprised the model, and forget them slowly."""

    needs = frozenset({"nll"})  # a field of Candidates besides the position
    half_life: float = option(1000.0, "tokens after which a surprise counts for half", minimum=1)

    def score(self, candidates: Candidates) -> torch.Tensor:
        age = candidates.position[..., -1:] - candidates.position
        return candidates.nll * 0.5 ** (age / self.half_life)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, **options) -> float:
    """Perplexity of a text, (tokens,) int64, under a policy; the tokens of the first `cap` are not scored."""
    cache = StreamingCache.for_model(model, **options)
    logits = cache.prefill(model, ids[None, : options["cap"]])
    losses = []
    for token in ids[options["cap"] :]:
        losses.append(torch.nn.functional.cross_entropy(logits.float(), token[None]))
        logits = cache.prefill(model, token[None, None])
    cache.close()
    return torch.stack(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scorer of your own beside a built-in one.")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--text", default="builtin", help="builtin, pg19, wikitext, a .txt or a .json file")
    parser.add_argument("--tokens", type=int, default=640, help="tokens of the text")
    parser.add_argument("--cap", type=int, default=256, help="the most KV slots in use, the same for every scorer")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    ids = tokenize(load_text(args.text), loaded.tokenizer, args.tokens).ids.to(device)
    for scorer in ("uniform", "uncertainty", "fading-surprise"):
        refresh = args.cap // 8
        ppl = perplexity(loaded.model, ids, cap=args.cap, compress_every=16, refresh=refresh, scorer=scorer)
        print(f"{scorer:16} {refresh} pinned tokens, cap {args.cap}: PPL {ppl:.2f}")


if __name__ == "__main__":
    main()
