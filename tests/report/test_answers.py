"""The questions and their answers: planted differences come out with the figures that they were planted with."""

from point_factory import point, small_matrix, write
from record_factory import make_record

from sinkstream.matrix.record import load_points
from sinkstream.report.answers import answers
from sinkstream.studies.recall.record import RecallRecord


def said(points, recalls=()) -> list[str]:
    return [one.answer for one in answers(points, recalls, [])]


def test_without_records_nothing_is_answered():
    assert said([]) == []


def test_planted_differences_are_counted_and_named(tmp_path):
    """PG19: nothing beats strict. WikiText: a refresh of 5 % does, with a label that two points have."""
    better = [
        point(name, "refresh-key-norm", shift=-0.05, label="refresh-key-norm R=64", text="wikitext") for name in "ab"
    ]
    failed = point("failed", "slack", status="failed", text="wikitext")
    points = load_points(write(tmp_path, *small_matrix(), *wikitext(), *better, failed))
    choice, beaten, lazy, snapkv = said(points)
    assert choice.startswith("PG19: strict. At 1 of 1 pairs of model and slots no policy is better by its interval. ")
    assert "WikiText: not strict. At 0 of 1 pairs" in choice
    assert "elsewhere the clearest are refresh-key-norm R=64 (SmolLM2-135M, 512 slots, -" in choice
    assert "PG19: perplexity is lower by its 95 % interval in 0 of 2 trials. WikiText:" in beaten
    assert "in 1 of 3 trials, most clearly with refresh-key-norm R=64 (SmolLM2-135M, 512 slots): -" in beaten
    assert "2 pairs of model, text and slots: perplexity +" in lazy and "time per token 1.000 to 1.000 ×" in lazy
    assert "strict has the lower perplexity by its interval in 1, the higher in 0; at worst -1." in snapkv


def wikitext() -> list[dict]:
    """The small matrix on the other text."""
    return [content | {"id": f"{content['id']}-w"} for content in small_matrix(text="wikitext")]


def test_what_is_left_of_a_passage_behind_the_window(tmp_path):
    """The best policy keeps 0.3 of 3 nats; recall keeps the least of its distances; the full cache does not count."""

    def record(label, policy, gains, **options):
        ratios = [0.5, 2.0, 4.0]
        content = make_record(label, policy, cap=512, ratios=ratios, passages=1, passage_tokens=64)
        content["policy"]["label"], content["policy"]["options"] = label, {"recall": None, **options}
        content["passages"] = {
            **{"ratio": ratios, "distance": [256, 1024, 2048], "first": [0] * 3, "second": [9] * 3},
            **{"nll_unseen": [4.0] * 3, "nll_again": [4.0 - gain for gain in gains]},
        }
        RecallRecord.write({name: part for name, part in content.items() if name != "tokens_file"}, tmp_path)

    record("strict", "strict", (3.0, 0.0, 0.03))
    record("slack", "slack", (3.0, 0.3, 0.0))
    record("full", "full", (3.0, 3.0, 3.0))
    record("strict recall=lexical", "strict", (3.0, 2.9, 2.7), recall="lexical")
    (answer,) = said([], RecallRecord.below(tmp_path))
    assert "at most 10 % of that is left with any policy (slack; " in answer
    assert "keeps 90 % up to 4 windows back" in answer
