"""Facts and questions: what is said, how it is asked again, and which answers there are to choose from.

    The code word of the quiet harbour in Lisbon is lemon.                                       the statement
    Question: What is the code word of the quiet harbour in Lisbon?
    Answer: The code word of the quiet harbour in Lisbon is lemon.                               cue
    Answer: lemon.                                                                               open
    The doctor hides the coins in the cellar.
    Question: Where does the physician keep the money? Answer: The physician keeps the money in the cellar.   paraphrase

A question is judged where its alternatives begin to differ: the answer is right if its token is the likeliest of those
of all alternatives, and exact if no token at all is likelier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sinkstream.studies.facts.words import ADJECTIVES, HIDING_PLACES, PEOPLE, PLACES, RELATIONS, THINGS, TOWNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = {
    "cue": "the answer begins with the words of the statement",
    "open": "the answer is the word alone",
    "paraphrase": "no content word of the question stands in the statement",
}


@dataclass(frozen=True)
class Fact:
    """One fact in words."""

    statement: str  # a sentence
    # form -> (question, the words of the reply before the answer, which may be none)
    asked: dict[str, tuple[str, str]]
    answer: str
    alternatives: tuple[str, ...]  # words that could be the answer, itself among them


def named_facts(seed: int) -> Iterator[Fact]:
    """Facts about named places, for as long as there are names; no name comes twice."""
    rng = np.random.default_rng(seed)
    sizes = (len(ADJECTIVES), len(PLACES), len(TOWNS))
    relations = list(RELATIONS)
    for number in _shuffled(int(np.prod(sizes)), rng):
        adjective, place, town = np.unravel_index(number, sizes)
        name = f"the {ADJECTIVES[adjective]} {PLACES[place]} in {TOWNS[town]}"
        relation = relations[int(rng.integers(len(relations)))]
        subject, (asks, alternatives) = relation.format(name), RELATIONS[relation]
        answer = alternatives[int(rng.integers(len(alternatives)))]
        question = f"{asks} is {subject[0].lower()}{subject[1:]}?"
        asked = {"cue": (question, f"{subject} is"), "open": (question, "")}
        yield Fact(f"{subject} is {answer}.", asked, answer, alternatives)


def paraphrased_facts(seed: int) -> Iterator[Fact]:
    """Facts that are asked in other words; every pair of person and thing once."""
    rng = np.random.default_rng(seed)
    people, things = list(PEOPLE), list(THINGS)
    for number in rng.permutation(len(people) * len(things)):
        person, thing = people[number // len(things)], things[number % len(things)]
        place = HIDING_PLACES[int(rng.integers(len(HIDING_PLACES)))]
        who, what = PEOPLE[person], THINGS[thing]
        asked = {"paraphrase": (f"Where does the {who} keep the {what}?", f"The {who} keeps the {what} in the")}
        yield Fact(f"The {person} hides the {thing} in the {place}.", asked, place, HIDING_PLACES)


#: Form -> the facts that can be asked in it, given a seed.
SOURCES: dict[str, Callable[[int], Iterator[Fact]]] = {
    "cue": named_facts,
    "open": named_facts,
    "paraphrase": paraphrased_facts,
}


def _shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """All numbers below `count` in a random order, without a list of them: a walk with a step prime to `count`."""
    start, step = (int(rng.integers(count)) for _ in range(2))
    while np.gcd(step, count) != 1:
        step += 1
    return ((start + step * i) % count for i in range(count))


@dataclass(frozen=True)
class TokenizedFact:
    """A fact in one of its forms, in tokens."""

    fact: Fact
    form: str
    statement: tuple[int, ...]  # ids, with the end of the line
    question: tuple[int, ...]  # ids up to the judged token, which is not among them
    rest: tuple[int, ...]  # ids from the judged token to the end of the line
    choices: tuple[int, ...]  # the judged token of every alternative, in their order
    answer: int  # the place of the answer among the choices

    @property
    def asked(self) -> tuple[int, ...]:
        """The whole line of question and answer."""
        return self.question + self.rest


@dataclass(frozen=True)
class FactTokenizer:
    """Facts in the tokens of a model; every line is tokenized by itself, without special tokens."""

    tokenizer: PreTrainedTokenizerBase
    # a line that asks: given question and the beginning of the reply, what stands before the answer
    line: Callable[[str, str], str] = lambda question, reply: f"Question: {question} Answer: {reply}".rstrip()

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenize(self, fact: Fact, form: str) -> TokenizedFact:
        """One fact in one form. Raises ValueError if two alternatives begin with the same token."""
        stem = self.line(*fact.asked[form])
        whole = [self.ids(f"{stem} {word}.\n") for word in fact.alternatives]
        shared = _shared_length(whole)
        choices = tuple(ids[shared] for ids in whole)
        if len(set(choices)) < len(choices):
            raise ValueError(
                f"this tokenizer gives two of the answers {', '.join(fact.alternatives)} the same first token, so that"
                " they cannot be told apart; accepted: a model with a tokenizer of words or of characters"
            )
        answer = fact.alternatives.index(fact.answer)
        asked = whole[answer]
        return TokenizedFact(
            fact, form, self.ids(fact.statement + "\n"), asked[:shared], asked[shared:], choices, answer
        )


def _shared_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all sequences share."""
    shared = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared
