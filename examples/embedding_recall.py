"""Recall by meaning: a sentence encoder of your own chooses what comes back, in every command of sinkstream.

    python examples/embedding_recall.py ENCODER recall --facts 20 --forms cue,paraphrase --distances 4 --cap 256 \
        --policy strict:recall=lexical,strict:recall=encoder

ENCODER is the folder of a sentence encoder that transformers loads with AutoModel, and whose sentence vector is the
mean of its token vectors (the MiniLM and E5 families). A command and its options follow; "encoder" is one more chooser.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from sinkstream.archive import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.cli import main as sinkstream
from sinkstream.policies.options import option

ENDS, LONGEST = (".", "!", "?", "\n"), 64  # what ends a sentence, and after how many tokens one is cut


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
    """Every sentence and its vector, which is computed when it is first asked for."""

    def __init__(self, chooser: "BySentences"):
        self.chooser = chooser
        self.sentences: list[tuple[int, list[int]]] = []  # index of the first token, ids; the last one may go on
        self.vectors = np.zeros((0, 0))  # of the sentences that have ended

    def add(self, evicted: Evicted) -> None:
        for index, token in enumerate(evicted.ids, evicted.first):
            if not self.sentences or self._has_ended(self.sentences[-1][1]):
                self.sentences.append((index, []))
            self.sentences[-1][1].append(int(token))

    def _has_ended(self, ids: list[int]) -> bool:
        return len(ids) == LONGEST or self.chooser.tokenizer.decode(ids[-1:]).rstrip("\"'” ").endswith(ENDS)

    def scores(self, query: Query) -> np.ndarray:
        blocks, block = query.blocks(self.chooser.block), self.chooser.block
        new = [ids for _, ids in self.sentences[len(self.vectors) :]]
        *found, wanted = self.chooser.encoder(self.chooser.tokenizer.batch_decode([*new, list(query.ids)]))
        known, found = (np.reshape(some, (-1, len(wanted))) for some in (self.vectors, found))
        vectors = np.concatenate([known, found])
        self.vectors = vectors[: max(0, len(vectors) - 1)]
        score = np.zeros(len(blocks))
        for (first, ids), cosine in zip(self.sentences, vectors @ wanted):
            held = slice(
                max(0, first // block - blocks.start), max(0, (first + len(ids) - 1) // block + 1 - blocks.start)
            )
            score[held] = np.maximum(score[held], cosine / self.chooser.level)
        return score

    def copy(self) -> "Meanings":
        other = Meanings(self.chooser)
        other.sentences = [(first, list(ids)) for first, ids in self.sentences]
        other.vectors = self.vectors
        return other


@CHOOSERS.register("encoder")
@dataclass(frozen=True, eq=False)
class BySentences(Chooser):
    """Blocks with a sentence that means what the query says."""

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
    if not (Path(args.encoder) / "config.json").is_file():
        parser.error(f"encoder {args.encoder!r} is not accepted; accepted: a folder with the config.json of a model")
    BySentences.encoder = Encoder(args.encoder)
    return sinkstream(args.command)


if __name__ == "__main__":
    raise SystemExit(main())
