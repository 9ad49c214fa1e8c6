"""A figure of time is of one card, and keeps it."""

from types import SimpleNamespace

import pytest

from sinkstream.records.cards import arithmetic, by_card, cards_text, each_card, of_one_card, on_one_card, one_card

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def run(ms, day, gpu, cpu="AMD EPYC"):
    environment = {"gpu": {"name": gpu}, "cpu": {"model": cpu}}
    return SimpleNamespace(ms=ms, created=f"2026-01-{day:02}T00:00:00+00:00", environment=environment)


def newest(records):
    return records[-1].ms if len(records) > 1 else None


OLD, LATER, LATEST = run(2.0, 1, H100), run(1.0, 2, H200), run(1.1, 3, H200)


def test_the_reference_card_comes_first_then_the_one_of_the_latest_record():
    cpu = run(90.0, 4, None)
    assert list(by_card([OLD, LATER, LATEST])) == [H100, H200]
    assert list(by_card([LATER, LATEST, cpu])) == ["AMD EPYC", H200], "without the reference card"
    assert of_one_card([OLD, LATER, LATEST]) == [OLD] and of_one_card([]) == []


def test_a_figure_has_no_two_cards_and_is_not_lost_where_the_reference_card_does_not_give_it():
    assert newest([OLD, LATER]) == 1.0, "control: both cards in one figure"
    assert on_one_card(newest, [OLD, LATER]) is None
    assert on_one_card(newest, [OLD, LATER, LATEST]) == 1.1, "the H100 has one record, and two are needed"
    assert on_one_card(newest, [OLD, run(2.1, 2, H100), LATER, LATEST]) == 2.1, "older, and of the reference card"
    assert one_card(newest)([OLD, LATER, LATEST]) == 1.1 and one_card(newest).__name__ == "newest"


def test_what_is_shown_is_shown_card_by_card():
    assert each_card([LATER, OLD, LATEST], lambda some: "/".join(str(r.ms) for r in some)) == "2.0\n\n1.0/1.1"
    assert each_card([LATER, OLD], lambda some: "" if some == [OLD] else "said") == "said"
    assert cards_text([LATER, OLD, LATEST]) == "H100 80GB HBM3 and H200"


@pytest.mark.parametrize(("gpu", "same"), [(H200, True), ("NVIDIA A100-SXM4-80GB", False), (None, False)])
def test_losses_are_compared_between_cards_of_one_arithmetic(gpu, same):
    assert (arithmetic(run(1.0, 1, gpu)) == arithmetic(OLD)) is same
