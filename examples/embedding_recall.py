"""Recall by meaning: a sentence encoder of your own chooses what comes back, in every command of sinkstream.

    python examples/embedding_recall.py ENCODER recall --facts 20 --forms cue,paraphrase --distances 4 --cap 256 \
        --policy strict:recall=lexical,strict:recall=encoder

ENCODER is the folder of a sentence encoder that transformers loads with AutoModel, and whose sentence vector is the
mean of its token vectors (the MiniLM and E5 families). A command and its options follow; "encoder" is one more chooser.
"""

import argparse
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from sinkstream.archive import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.cli import main as sinkstream
from sinkstream.policies.options import option


class Encoder:
    """Sentences to unit vectors."""

    def __init__(self, folder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> np.ndarray:
        """Unit vectors (sentences, dimensions), float32."""
        batch = self.tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        mean = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()


class Meanings(Index):
    """The text of every block with both neighbours, and its vector, which is computed when it is first asked for."""

    def __init__(self, chooser: "BySentences"):
        self.chooser = chooser
        self.ids: dict[int, list[int]] = {}  # of every block
        self.vectors: dict[int, np.ndarray] = {}  # of blocks whose neighbours are whole

    def add(self, evicted: Evicted) -> None:
        for index, token in enumerate(evicted.ids, evicted.first):
            self.ids.setdefault(index // self.chooser.block, []).append(int(token))

    def scores(self, query: Query) -> np.ndarray:
        blocks = query.blocks(self.chooser.block)
        unknown = [block for block in blocks if block not in self.vectors]
        around = [[t for i in (-1, 0, 1) for t in self.ids.get(block + i, ())] for block in unknown]
        texts = self.chooser.tokenizer.batch_decode([*around, list(query.ids)])
        *found, wanted = self.chooser.encoder(texts)
        latest = dict(zip(unknown, found))
        whole = self.chooser.block
        self.vectors |= {b: v for b, v in latest.items() if len(self.ids.get(b + 1, ())) == whole}
        if not len(blocks):
            return np.zeros(0)
        cosine = np.stack([self.vectors.get(b, latest.get(b)) for b in blocks]) @ wanted
        return (np.maximum(cosine, 0) / self.chooser.level) ** 4  # so that 0.6 of the best score is 0.88 of its cosine

    def copy(self) -> "Meanings":
        other = Meanings(self.chooser)
        other.ids = {block: list(ids) for block, ids in self.ids.items()}
        other.vectors = dict(self.vectors)
        return other


@CHOOSERS.register("encoder")
@dataclass(frozen=True, eq=False)
class BySentences(Chooser):
    """Blocks whose sentences mean what the query says."""

    encoder: ClassVar[Encoder]

    tokenizer: object = None  # of the language model
    level: float = option(0.8, "cosine that opens the gate")

    def with_tokenizer(self, tokenizer) -> "BySentences":
        if tokenizer is None:
            raise ValueError("recall='encoder' reads text; give tokenizer=TOKENIZER")
        return replace(self, tokenizer=tokenizer)

    def start(self) -> Meanings:
        return Meanings(self)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", help="folder of a sentence encoder")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of sinkstream, with its options")
    args = parser.parse_args()
    BySentences.encoder = Encoder(args.encoder)
    return sinkstream(args.command)


if __name__ == "__main__":
    raise SystemExit(main())
