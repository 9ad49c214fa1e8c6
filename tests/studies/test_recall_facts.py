"""Facts in a text and one endless reply: layout, known answers, real recall on a tiny model, records, tables, keys."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from induction import InductionDecoder
from rich.console import Console

from sinkstream.cli import main
from sinkstream.data import ShortTextError, TokenStream
from sinkstream.evaluation.backends import HfBackend
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.report.documents import NONE_YET, render_tables
from sinkstream.report.summary import write_summary
from sinkstream.show.table import EMPTY
from sinkstream.statistics import mean_interval
from sinkstream.studies.facts.asking import Asking, answer_all
from sinkstream.studies.facts.record import accuracy, pooled
from sinkstream.studies.facts.run import ExamBatch
from sinkstream.studies.recall.facts import FactsDesign, FactsRecord
from sinkstream.studies.recall.facts_tables import draw_facts, facts_table, select_facts
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.run import RecallBatch, RecallDesign
from sinkstream.studies.recall.tables import (
    by_layout,
    chooser_table,
    curve_of,
    curve_table,
    has_recall,
    select_recalls,
    share_of,
)
from sinkstream.studies.recall.tables import pooled as pooled_passages
from sinkstream.studies.streameval import reply_tables
from sinkstream.studies.streameval.reply import FIRST_WINDOW, WINDOW, ReplyBatch, ReplyDesign, ReplyRecord
from sinkstream.studies.streameval.reply_tables import draw_reply, reply_table, tpot_ratio

CAP = 400  # a question and its statement, one token a character, fit inside at 0.5 ×
DESIGN = FactsDesign(CAP, (0.5, 4.0), 2)
COMMAND = ["sinkstream", "recall"]


def text_of(tokens: int, name: str = "sentences", seed: int = 3) -> TokenStream:
    """Random characters, so that nothing is said twice by chance."""
    ids = torch.randint(1, 90, (tokens,), generator=torch.Generator().manual_seed(seed))
    return TokenStream.of(ids, name=name, source="test", text_sha256=None)


@pytest.fixture(scope="module")
def stream():
    return DESIGN.streams(text_of, tiny_model.tokenizer())


def blocks(name: str, cap: int = CAP, **more) -> RunSettings:
    return RunSettings(name, None if name == "full" else cap, evaluate="blocks", block_tokens=64, **more)


# ---- facts in a text ----


def test_statement_and_question_stand_where_the_record_says(stream):
    tokenizer, ids = tiny_model.tokenizer(), stream.stream.ids.tolist()
    assert len(stream.questions) == 2 * 2 * 3 and [q.number for q in stream.questions] == list(range(12))
    for question, place in zip(stream.questions, stream.placements):
        said = tokenizer.decode(ids[question.said - 1 : question.said + len(question.fact.statement)])
        assert said == f"\n{question.fact.fact.statement}\n"
        assert tuple(ids[question.first : question.judged]) == question.fact.question
        assert question.first - question.said == round(place.ratio * CAP)
    counts = {(q.fact.form, p.ratio) for q, p in zip(stream.questions, stream.placements)}
    assert len(counts) == 6, "every form at every distance"
    assert len({q.fact.fact.statement for q in stream.questions}) == 12


def test_strict_answers_inside_its_window_only(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(HfBackend, "open", lambda self: InductionDecoder(self.loaded.model, self.settings))
    batch = ExamBatch(tiny_model.loaded(), stream, Request(tmp_path, {}, COMMAND, 0), FactsRecord)
    strict, full = batch.run([blocks("strict"), blocks("full", allow_untrained_positions=True)], Console(quiet=True))
    cue = strict.answers["form"] == "cue"
    assert strict.answers["exact"][cue].tolist() == (strict.answers["ratio"][cue] == 0.5).tolist()
    assert full.answers["exact"][cue].all() and full.answers["exact"].sum() < 12
    (again, _) = FactsRecord.below(tmp_path)
    assert again.label == "strict" and again.answers["ratio"].tolist() == strict.answers["ratio"].tolist()
    table = facts_table([strict, full], "T")
    assert [row[:2] for row in table.rows[:3]] == [["strict", form] for form in ("cue", "open", "paraphrase")]
    assert draw_facts([strict, full], tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    (both,) = pooled([strict, strict])
    assert len(both.answers["correct"]) == 24 and accuracy(both.answers).value == accuracy(strict.answers).value
    _times_are_not_pooled(strict, full)
    _a_trial_takes_no_study_s_place(strict)


def _on(record, gpu, ttft_ms, text="sentences"):
    """The record, as if it had been made on that GPU in that time."""
    environment = record.environment | {"gpu": record.environment["gpu"] | {"name": gpu}}
    data = record.data | {"name": text}
    return replace(record, environment=environment, summary=record.summary | {"ttft_ms": ttft_ms}, data=data)


def _times_are_not_pooled(strict, full) -> None:
    def ttft(*records):
        return [row[-1] for row in facts_table(records).rows[::3]]

    one = [_on(strict, "NVIDIA H100", 5.0), _on(strict, "NVIDIA H100", 7.25, "another")]
    assert ttft(one[0]) == ["5.0"] and ttft(*one) == ["5.0 – 7.2"]
    assert ttft(*one, _on(strict, "NVIDIA H200", 3.0, "third")) == ["5.0 – 7.2 (H100); 3.0 (H200)"]
    assert ttft(*one, _on(full, "NVIDIA H200", 3.0)) == ["5.0 – 7.2 (H100)", "3.0 (H200)"], "in one table"
    assert pooled(one)[0].summary["ttft_ms"] is None and ttft(strict) == [EMPTY]


def _a_trial_takes_no_study_s_place(strict) -> None:
    trial = replace(strict, answers={name: column[:6] for name, column in strict.answers.items()})
    of = {"model": strict.model["name"], "cap": CAP}
    (kept,) = select_facts([strict, trial], **of)
    assert kept is strict, "the trial is later, and smaller"
    again = _on(strict, "NVIDIA H100", 5.0)
    (chosen,) = select_facts([trial, strict, again], **of)
    assert chosen is again, "of as many answers the newest"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"facts": 0}, "facts=0 is not accepted"),
        ({"forms": ("cue", "riddle")}, "--forms cue,riddle is not accepted; accepted: cue, open, paraphrase"),
        ({"forms": ()}, "accepted: cue, open"),
        ({"ratios": ()}, "--distances '' is not accepted"),
    ],
)
def test_wrong_designs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FactsDesign(**{"cap": CAP, "ratios": (4.0,), "facts": 2} | wrong)


def test_what_there_is_not_enough_of_is_told():
    with pytest.raises(ValueError, match=r"257 facts in form 'paraphrase' .* there are 256; accepted: fewer --facts"):
        FactsDesign(CAP, (4.0,), 257, ("paraphrase",)).facts_of(tiny_model.tokenizer())

    def short(tokens):
        raise ShortTextError("the text is too short", "another one")

    with pytest.raises(ValueError, match=r"too short \(facts at 12 places\); accepted: a longer text"):
        DESIGN.streams(short, tiny_model.tokenizer())


# ---- recall of a tiny model: what is brought back, by the records ----


@pytest.mark.parametrize(
    ("chooser", "least", "most"), [("oracle", 0.99, 1.0), ("late-oracle", 0.99, 1.0), ("recent", 0, 0.2)]
)
def test_records_say_what_recall_held(stream, chooser, least, most):
    settings = blocks("strict", recall={"recall": chooser, "recall_slots": 128, "recall_every": 8})
    asking = Asking(tiny_model.loaded(), stream.exam, settings)
    assert answer_all(asking) == ("complete", None)
    assert [answer.question.number for answer in asking.answers] == list(range(12))
    far = [a.held for a in asking.answers if stream.placements[a.question.number].ratio == 4]
    assert least <= np.mean(far) <= most
    plain = Asking(tiny_model.loaded(), stream.exam, blocks("strict"))
    answer_all(plain)
    assert all(answer.held is None for answer in plain.answers)
    assert len(asking.ttft) == 12 and asking.summary()["ttft_ms"] == round(1e3 * np.median(asking.ttft), 3) > 0
    assert plain.summary() == {"ttft_ms": None}  # its questions stand in longer feeds
    changed = [a.log_prob != b.log_prob for a, b in zip(asking.answers, plain.answers)]
    assert any(changed)


def test_passages_of_an_oracle_are_held_and_of_recency_are_not(tmp_path):
    design = RecallDesign(100, (0.5, 4.0), passages=2, passage_tokens=16)
    batch = RecallBatch(tiny_model.loaded(), design.streams(text_of), Request(tmp_path, {}, COMMAND, 0))
    choosers = [{"recall": name, "recall_slots": 40} for name in ("oracle", "late-oracle", "recent")]
    records = batch.run([blocks("strict", 100, recall=one) for one in ({}, *choosers)], Console(quiet=True))
    held = [record.passages["held"][record.passages["ratio"] == 4].mean() for record in records]
    assert np.isnan(held[0]) and held[1] == 1 and 0.1 < held[2] < 1 and held[3] == 0
    assert all(record.curve["edges"] == [1, 4, 8, 16] for record in records)
    for record in records:
        gains = record.passages["nll_unseen"] - record.passages["nll_again"]
        whole = np.array(record.curve["gains"]) @ np.array([3, 4, 8]) / 15
        assert whole == pytest.approx(gains, abs=1e-3)
    curve = curve_table(records)
    assert curve.header == ["Policy", "1–3", "4–7", "8–15"] and len(curve.rows) == 4
    assert has_recall(records) and not has_recall(records[:1])
    table = chooser_table(records)
    assert table.header[1:3] == ["0.5 ×", "4 ×"] and table.rows[1][-1] == "100 %" and table.rows[0][-1] == "–"


def test_an_oracle_is_told_the_place_of_every_passage(tmp_path):
    design = RecallDesign(100, (0.5, 4.0), passages=2, passage_tokens=16)
    batch = RecallBatch(tiny_model.loaded(), design.streams(text_of), Request(tmp_path, {}, COMMAND, 0))
    (trial,) = batch.streams.whole()
    for begin, end, first, last in batch._wanted(trial):
        ids = batch.streams.repeated.ids
        assert torch.equal(ids[begin:end], ids[first:last]) and end - begin == 16


# ---- pooling and shares ----


def test_texts_are_pooled_and_the_curve_with_them(tmp_path):
    design = RecallDesign(64, (0.5, 2.0), passages=3, passage_tokens=16)
    loaded = tiny_model.loaded()
    records = []
    for name, seed in (("a", 1), ("b", 2)):
        streams = design.streams(lambda n, name=name, seed=seed: text_of(n, name, seed))
        batch = RecallBatch(loaded, streams, Request(tmp_path, {}, COMMAND, 0))
        records += batch.run([blocks("strict", 64)], Console(quiet=True))
    object.__setattr__(loaded, "name", "tiny-pooled")
    far = RecallDesign(64, (0.5, 4.0), passages=1, passage_tokens=16).streams(text_of)
    newest = RecallBatch(loaded, far, Request(tmp_path / "far", {}, COMMAND, 0)).run(
        [blocks("strict", 64)], Console(quiet=True)
    )
    chosen = select_recalls([*records, *newest], model="tiny", cap=64, pooled_at=2.0)
    assert [r.id for r in chosen] == [r.id for r in records], "another layout does not hide this one"
    layouts = [[r.id for r in layout] for layout in by_layout([newest[0], *records], 0.5)]
    assert layouts == [[newest[0].id], [r.id for r in records]], "the layout of the newest record is last"
    assert by_layout([*records, newest[0], records[0]], 0.5)[-1][-1].id == records[0].id
    brought = replace(newest[0], policy=newest[0].policy | {"options": {"recall": "lexical"}})
    assert select_recalls([records[0], brought], model="tiny", cap=64) == records[:1], "recall has a table of its own"
    assert select_recalls([brought], model="tiny", cap=64) == [brought]
    lazy = replace(records[0], policy=records[0].policy | {"label": "lazy"})
    fullest = [records[0], lazy]
    assert select_recalls([*fullest, *newest], model="tiny", cap=64) == fullest, "one policy elsewhere hides no table"
    (both,) = pooled_passages(records)
    assert len(both.passages["ratio"]) == 12 and both.summary["ppl"] is None and len(both.curve["gains"]) == 12
    late = curve_of(both, 8, 16, [2.0])
    gains = [row[-1] for record in records for row, r in zip(record.curve["gains"], record.passages["ratio"]) if r == 2]
    assert late.value == pytest.approx(np.mean(gains), abs=1e-6)
    assert late.low == mean_interval(np.array(gains), block_tokens=1).low
    assert curve_of(both, 5, 16, [2.0]).value is None
    old = json.loads(records[0].path.read_text())
    del old["curve"], old["passages"]["held"]
    records[0].path.write_text(json.dumps(old))
    first = RecallRecord.below(tmp_path)[0]
    assert first.curve is None and "held" not in first.passages, "records of before are still read"


def test_a_share_is_a_ratio_of_means_with_the_noise_of_both():
    rng = np.random.default_rng(0)
    far, near = rng.normal(2.0, 1.0, 400), rng.normal(4.0, 1.0, 400)
    share = share_of(far, near)
    assert share.value == pytest.approx(far.mean() / near.mean())
    spread = np.hypot(1 / 4 / 20, 2 / 16 / 20)
    assert share.high - share.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert share_of(far, near[:0]).value is None and share_of(far, -near).value is None


# ---- one endless reply ----

REPLY = ReplyDesign(40_000, 64, facts=6)


@hypothesis_settings(max_examples=20)
@given(seed=st.integers(0, 999), facts=st.integers(1, 40))
def test_no_line_of_a_reply_touches_another_or_a_timed_window(seed, facts):
    design = ReplyDesign(60_000, 64, facts, seed=seed)
    starts = sorted(at for place in design.places(40) for at in place)
    assert len(starts) == 2 * facts and starts[0] >= 64 and starts[-1] + 40 <= 60_000
    assert all(b - a >= 40 for a, b in itertools.pairwise(starts))
    for window in design.windows:
        assert not any(window.start - 40 < at < window.stop for at in starts)
    assert all(again - first >= 64 for first, again in design.places(40))


def test_a_reply_is_timed_and_its_memory_is_flat(tmp_path, monkeypatch):
    loaded, tokenizer = tiny_model.loaded(), tiny_model.tokenizer()
    design = ReplyDesign(20_000, 64, facts=4)
    reply = design.write(text_of(5_000), tokenizer)
    assert len(reply.stream) == 20_000 and "4.0 times" in reply.stream.source
    recall = {"recall": "recent", "recall_slots": 16, "recall_every": 512, "recall_archive": "text"}
    batch = ReplyBatch(loaded, reply, Request(tmp_path, {}, COMMAND, 0), ReplyRecord)
    records = batch.run(
        [blocks("strict", 64), blocks("strict", 64, recall=recall, backend="ring")], Console(quiet=True)
    )
    for record in ReplyRecord.below(tmp_path):
        assert [w["first"] for w in record.windows] == [FIRST_WINDOW, 5_000, 10_000, 20_000 - WINDOW]
        assert all(w["tokens"] == WINDOW and w["mean"] > 0 for w in record.windows)
        assert len(record.answers["correct"]) == 4 and tpot_ratio(record) > 0
        late = [s["cache_bytes"] for s in record.samples if s["token"] > 4_000]
        assert record.summary["ttft_ms"] > 0
        assert record.samples[-1]["token"] == 20_000 and max(late) <= 1.5 * min(late)
    assert [[w["frames"] for w in record.windows] for record in records] == [[None] * 4, [1] * 4]
    assert records[1].samples[-1]["archived"] > 19_000 and records[0].samples[-1]["archived"] is None
    table = reply_table(records, "T")
    assert len(table.rows) == 2 and len(table.rows[0]) == len(table.header)
    figures, save = [], reply_tables.save
    monkeypatch.setattr(reply_tables, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    assert draw_reply(records, tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    for axis in figures[0].axes:
        highest = max(max(line.get_ydata()) for line in axis.lines)
        assert axis.get_ylim()[1] > 1.05 * highest, "the highest marker is whole"
    assert figures[0].axes[1].xaxis.get_major_formatter()(20_000, 0) == "20,000"
    cut_short = SimpleNamespace(label="strict", samples=[], windows=[{"first": 1, "mean": None}])
    assert draw_reply([cut_short], tmp_path / "cut.png", title="cut short").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 100}, "reply_tokens=100 is not accepted; accepted: at least"),
        ({"facts": 0}, "facts=0 is not accepted"),
        ({"forms": ("paraphrase",)}, "--forms paraphrase is not accepted; accepted: cue, open"),
    ],
)
def test_wrong_replies_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReplyDesign(**{"tokens": 40_000, "cap": 64} | wrong)


# ---- documents and keys ----

KEYS = ("passage_16x_share", "facts_16x_share", "ppl_delta_gated", "tpot_over_strict")
KEYS += ("million_token_accuracy", "million_token_tpot_ratio")


def test_keys_are_absent_until_measured_and_then_computed(tmp_path, stream):
    summary = write_summary(tmp_path)
    assert all(f"recall.{key}" in summary.missing and f"recall.{key}" not in summary.headlines for key in KEYS)
    assert all(
        render_tables(tmp_path)[f"{name}-smollm2"] == NONE_YET for name in ("recall-facts", "streameval", "reply")
    )
    loaded = tiny_model.loaded()
    object.__setattr__(loaded, "name", "SmolLM2-135M")
    design = FactsDesign(512, (0.5, 16.0), 2, ("cue",))
    facts = design.streams(text_of, tiny_model.tokenizer())
    batch = ExamBatch(loaded, facts, Request(tmp_path / "facts", {}, COMMAND, 0), FactsRecord)
    settings = [blocks("strict", 512), blocks("strict", 512, recall={"recall": "lexical"})]
    strict, lexical = batch.run(settings, Console(quiet=True))
    for record, right in ((strict, [1, 1, 0, 0]), (lexical, [0, 1, 1, 1])):
        content = json.loads(record.path.read_text())
        at = np.argsort(content["answers"]["ratio"], kind="stable")
        content["answers"]["correct"] = np.array(right)[np.argsort(at)].tolist()
        record.path.write_text(json.dumps(content))
    headline = write_summary(tmp_path).headlines["recall.facts_16x_share"]
    assert headline["value"] == 1.0 and headline["record"] == lexical.id
    other = FactsDesign(512, (16.0,), 1, ("open",)).streams(text_of, tiny_model.tokenizer())
    ExamBatch(loaded, other, Request(tmp_path / "open", {}, COMMAND, 0), FactsRecord).run(
        settings[:1], Console(quiet=True)
    )
    assert write_summary(tmp_path).headlines["recall.facts_16x_share"] == headline, "other forms hide nothing"
    assert "strict recall=lexical" in render_tables(tmp_path)["recall-facts-smollm2"]


# ---- command line ----


def test_the_command_asks_facts_in_several_texts(tmp_path, monkeypatch, capsys):
    tiny_model.save_model(tmp_path / "tiny")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(map(str, np.random.default_rng(ord(name)).integers(0, 9, 6000))))
    monkeypatch.chdir(tmp_path)
    line = ["recall", "--model=tiny", "--cap=300", "--policy=strict,strict:recall=lexical:recall_slots=64", "--text"]
    line += ["a.txt", "b.txt", "--distances=2", "--facts=1", "--forms=cue", "--out=out"]
    assert main(line) == 0
    records = FactsRecord.below("out")
    assert [(r.label, r.data["name"]) for r in records] == [
        (label, name) for name in "ab" for label in ("strict", "strict recall=lexical recall_slots=64")
    ]
    assert "facts in a, b" in capsys.readouterr().out and (tmp_path / "out" / "facts.png").exists()
    assert main([*line, "--resume"]) == 0 and len(FactsRecord.below("out")) == 4
    assert main([*line[:-3], "--facts=0"]) == 2 and "facts=0 is not accepted" in capsys.readouterr().err
    reply = ["streameval", "--model=tiny", "--cap=64", "--text=a.txt", "--facts=2", "--out=out"]
    assert main([*reply, "--reply-tokens=100"]) == 2 and "reply_tokens=100" in capsys.readouterr().err
    assert main([*reply, "--reply-tokens=20000", "--policy=full"]) == 2
    assert "'full' does not fit a reply without end" in capsys.readouterr().err
