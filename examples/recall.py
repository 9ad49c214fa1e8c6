"""What left the window comes back: a fact, thousands of tokens of other text, and the question.

    python examples/recall.py
    python examples/recall.py --model DIRECTORY --text FILE.txt --tokens 4096 --cap 512 --chooser bag-of-vectors

A chooser gives every block of the archive a number; the best blocks, with their neighbours, take slots of the window.
"bag-of-vectors" is a chooser of your own: blocks whose mean vector is nearest to that of the question. Here a token's
vector is its row of the model's embedding matrix; put the output of a sentence encoder there.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from sinkstream import StreamingCache
from sinkstream.archive import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.data import load_text, tokenize
from sinkstream.models import load_model, resolve_device, resolve_dtype

FACT, QUESTION = " The code word of the grey garden is thunder.", " The code word of the grey garden is"


class Vectors(Index):
    """The sum of the vectors of every block."""

    def __init__(self, chooser: "BagOfVectors"):
        self.chooser = chooser
        self.sums: dict[int, np.ndarray] = {}

    def add(self, evicted: Evicted) -> None:
        for index, token in enumerate(evicted.ids, evicted.first):
            block = index // self.chooser.block
            self.sums[block] = self.sums.get(block, 0) + self.chooser.vectors[token]

    def scores(self, query: Query) -> np.ndarray:
        wanted = self.chooser.vectors[list(query.ids)].sum(0)
        found = np.stack([self.sums[block] for block in query.blocks(self.chooser.block)])
        cosine = found @ wanted / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted)
        return cosine / self.chooser.level  # 1 opens the gate

    def copy(self) -> "Vectors":
        other = Vectors(self.chooser)
        other.sums = dict(self.sums)
        return other


@CHOOSERS.register("bag-of-vectors")
@dataclass(frozen=True, eq=False)
class BagOfVectors(Chooser):
    """Blocks whose mean vector is nearest to that of the query."""

    vectors: np.ndarray | None = None
    level: float = 0.9

    @classmethod
    def for_model(cls, model, **options) -> "BagOfVectors":
        vectors = model.get_input_embeddings().weight.detach().float().cpu().numpy()
        return cls(vectors=vectors - vectors.mean(0), **options)

    def start(self) -> Vectors:
        return Vectors(self)


def main() -> None:
    parser = argparse.ArgumentParser(description="A fact that left the window, asked again.")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--text", default="builtin", help="builtin, pg19, wikitext, a .txt or a .json file")
    parser.add_argument("--tokens", type=int, default=900, help="tokens between the fact and the question")
    parser.add_argument("--cap", type=int, default=256, help="the most KV slots in use, with recall and without")
    parser.add_argument("--chooser", default="lexical", help="who chooses: lexical, bag-of-vectors …")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = tokenize(load_text(args.text), tokenizer, args.tokens).ids[None].to(device)
    fact, question = (
        torch.tensor([tokenizer.encode(words, add_special_tokens=False)], device=device) for words in (FACT, QUESTION)
    )
    for recall in (None, args.chooser):
        more = {} if recall is None else {"recall": recall, "tokenizer": tokenizer}
        cache = StreamingCache.for_model(model, cap=args.cap, **more)
        cache.prefill(model, torch.cat([text[:, :40], fact, text[:, 40:]], 1))
        logits = cache.prefill(model, question) if recall is None else cache.ask(model, question)
        answer = tokenizer.decode(logits.argmax(-1))
        print(f"recall={recall}: {cache.stats()['kept']} of {args.cap} slots, the answer begins with {answer!r}")
        for event in cache.recall_events[-1:]:
            for span in event.spans:
                print(f"  came back: tokens {span.first} to {span.end - 1}: {span.text!r}")
        cache.close()


if __name__ == "__main__":
    main()
