"""Streaming question answering: facts, the stream's plan, a copying model whose answers are known, records, command."""

import itertools
import re
import shlex
import signal
from dataclasses import replace

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
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.evaluation.backends import HfBackend
from sinkstream.evaluation.decoders import Frames
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.studies.facts.asking import Answer, Asking, answer_all, told
from sinkstream.studies.facts.record import accuracy
from sinkstream.studies.facts.run import ExamBatch
from sinkstream.studies.facts.statements import SOURCES, FactTokenizer, named_facts, paraphrased_facts
from sinkstream.studies.facts.words import ADJECTIVES, HIDING_PLACES, PEOPLE, PLACES, RELATIONS, THINGS, TOWNS
from sinkstream.studies.streameval.design import FactStream, StreamEvalDesign
from sinkstream.studies.streameval.record import StreamEvalRecord
from sinkstream.studies.streameval.tables import draw_streameval, select_streamevals, streameval_table

CAP, SINK = 400, 4
DESIGN = StreamEvalDesign((3, 12), every=3, questions=6)


@pytest.fixture(scope="module")
def stream() -> FactStream:
    return FactStream.write(DESIGN, tiny_model.tokenizer())


@pytest.fixture
def batch(tmp_path, monkeypatch, stream):
    """Run policies with the model that copies what it sees."""
    monkeypatch.setattr(HfBackend, "open", lambda self: InductionDecoder(self.loaded.model, self.settings))
    return ExamBatch(
        tiny_model.loaded(), stream, Request(tmp_path, {}, ["sinkstream", "streameval"], 0), StreamEvalRecord
    )


def policy(name: str, cap: int = CAP, **options) -> RunSettings:
    return RunSettings(name, cap, options, evaluate="blocks", block_tokens=64)


# ---- facts ----


def test_words_of_a_name_and_answers_are_told_apart():
    for table in (ADJECTIVES, PLACES, TOWNS):
        assert len(set(table)) == len(table) > 3 / 0.05, "no word stands in many facts"
    assert not set(ADJECTIVES) & set(PLACES)
    for answers in (*(answers for _, answers in RELATIONS.values()), HIDING_PLACES):
        assert len({answer[0] for answer in answers}) == len(answers) == 10
    for said, asked in (PEOPLE | THINGS).items():
        assert not set(said.split()) & set(asked.split())


@pytest.mark.parametrize("form", SOURCES)
def test_facts_are_seeded_unique_and_answerable(form):
    first, again, other = (list(itertools.islice(SOURCES[form](seed), 200)) for seed in (1, 1, 2))
    assert first == again != other
    subjects = [fact.asked[form][0] for fact in first]
    assert len(set(subjects)) == len(subjects)
    assert all(fact.answer in fact.alternatives and fact.statement.endswith(f" {fact.answer}.") for fact in first)
    assert 0.02 < np.mean([fact.answer == fact.alternatives[0] for fact in first]) < 0.25


def test_a_paraphrase_shares_no_word_of_content():
    for fact in itertools.islice(paraphrased_facts(0), 256):
        said, (question, _) = fact.statement.lower().rstrip(".").split(), fact.asked["paraphrase"]
        shared = set(said) & set(re.findall(r"\w+", question.lower()))
        assert shared <= {"the"}, (fact, shared)


@pytest.mark.parametrize("form", SOURCES)
def test_a_fact_in_tokens_says_what_the_words_say(form):
    tokenizer = tiny_model.tokenizer()
    for fact in itertools.islice(SOURCES[form](0), 20):
        tokens = FactTokenizer(tokenizer).tokenize(fact, form)
        question, reply = fact.asked[form]
        assert tokenizer.decode(tokens.statement) == fact.statement + "\n"
        assert tokenizer.decode(tokens.asked) == f"Question: {question} Answer: {reply}".rstrip() + f" {fact.answer}.\n"
        assert tokens.rest[0] == tokens.choices[tokens.answer] and len(set(tokens.choices)) == 10
        assert [tokenizer.decode([token]) for token in tokens.choices] == [word[0] for word in fact.alternatives]


def test_answers_that_begin_alike_are_refused():
    fact = next(named_facts(0))
    object.__setattr__(fact, "alternatives", (*fact.alternatives, fact.answer + "s"))
    with pytest.raises(ValueError, match=r"the same first token"):
        FactTokenizer(tiny_model.tokenizer()).tokenize(fact, "cue")


# ---- the plan of the stream ----


@hypothesis_settings(max_examples=30)
@given(
    distances=st.lists(st.sampled_from([1, 2, 5, 17, 60]), min_size=1, unique=True),
    every=st.integers(2, 9),
    questions=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_question_is_about_a_line_that_far_back(distances, every, questions, seed):
    design = StreamEvalDesign(tuple(distances), every, questions, seed=seed)
    lines = design.plan()
    asked = [line for line in lines if line.about is not None]
    assert [line.number for line in lines] == list(range(len(lines)))
    assert all(line.number % every == 0 for line in asked)
    assert len({line.about for line in asked}) == len(asked), "no fact is asked twice"
    assert all(lines[line.about].about is None for line in asked), "a question is about a statement"
    assert all(line.number - line.about >= line.distance for line in asked)
    counts = {d: sum(line.distance == d for line in asked) for d in distances}
    assert min(counts.values()) == questions
    assert lines[-1].about is not None, "it ends when every distance has its questions"
    late = [line.number - line.about - line.distance for line in asked]
    assert max(late) <= 2 * every * max(counts.values())
    assert design.plan() == lines


def test_the_stream_holds_what_the_questions_say(stream):
    tokenizer, ids = tiny_model.tokenizer(), stream.stream.ids.tolist()
    assert len(stream.questions) == len(stream.distances) >= 12
    for question in stream.questions:
        text = tokenizer.decode(ids[question.said : question.said + len(question.fact.statement)])
        assert text == question.fact.fact.statement + "\n"
        assert ids[question.judged] == question.fact.choices[question.fact.answer]
        assert tuple(ids[question.first : question.judged]) == question.fact.question
        assert tokenizer.decode(ids).count(question.fact.fact.statement) <= 2  # said, and as the reply of a cue
    assert [q.judged for q in stream.questions] == sorted(q.judged for q in stream.questions)


def test_stretches_ask_each_question_once_where_it_fits(stream):
    exams = stream.exam.stretches(1000)
    numbers = [q.number for exam in exams for q in exam.questions]
    assert len(set(numbers)) == len(numbers)
    assert {q.number for q in stream.questions if q.judged - q.said < 500} <= set(numbers) < set(range(12))
    for exam in exams:
        assert len(exam.ids) <= 1000
        for question in exam.questions:
            assert tuple(exam.ids[question.first : question.judged].tolist()) == question.fact.question
            assert tuple(exam.ids[question.said :][: len(question.fact.statement)].tolist()) == question.fact.statement
    with pytest.raises(ValueError, match=r"nearest question .*50 trained positions; accepted: another --policy"):
        stream.exam.stretches(50)


# ---- answers that are known ----


def visible(question, window: int) -> bool:
    """Whether the token that answers stands in the window of the last token of the question."""
    answer = question.said + len(question.fact.statement) - len(question.fact.rest)
    return answer > question.judged - 1 - window


def test_strict_answers_what_its_window_holds(batch):
    (record,) = batch.run([policy("strict")], Console(quiet=True))
    cue = record.answers["form"] == "cue"
    wanted = [visible(q, CAP - SINK) for q in batch.paper.questions]
    assert len(record.answers["correct"]) == len(batch.paper.questions) and 0 < sum(wanted) < len(wanted)
    for right, exact, at, seen, question in zip(
        record.answers["correct"], record.answers["exact"], cue, wanted, batch.paper.questions
    ):
        assert right == exact == seen or not at or (not seen and question.fact.answer == 0)
    near = accuracy(record.answers, cue & (record.answers["lines"] == 3))
    far = accuracy(record.answers, cue & (record.answers["lines"] == 12))
    assert near.value == 1 and far.value < 0.5, "the control, far out of the window, must fail"


def test_the_full_cache_answers_all_that_its_stretches_hold(batch):
    (record,) = batch.run([RunSettings("full", evaluate="blocks", block_tokens=64)], Console(quiet=True))
    cue = record.answers["form"] == "cue"
    assert cue.sum() > 2 and record.answers["correct"][cue].all()
    assert not record.answers["correct"][~cue].all(), "an open question has nothing to copy"


@pytest.mark.parametrize("block_tokens", [7, 64, 10_000])
def test_answers_are_those_of_one_plain_forward(stream, block_tokens):
    loaded = tiny_model.loaded()
    (exam, *_) = stream.exam.stretches(loaded.trained_positions)
    asking = Asking(loaded, exam, RunSettings("full", evaluate="blocks", block_tokens=block_tokens))
    assert answer_all(asking) == ("complete", None) and asking.done == len(exam.ids)
    with torch.no_grad():
        log_probs = torch.log_softmax(loaded.model(exam.ids[None]).logits[0].float(), -1)
    for answer, question in zip(asking.answers, exam.questions, strict=True):
        at = log_probs[question.judged - 1]
        among = at[list(question.fact.choices)]
        assert answer.log_prob == pytest.approx(float(among[question.fact.answer]), abs=1e-4)
        assert answer.correct == (int(among.argmax()) == question.fact.answer)
        assert answer.exact == (int(at.argmax()) == question.fact.choices[question.fact.answer])


@pytest.mark.parametrize("name", ["strict", "lazy", "adaptive-entropy"])
def test_answers_do_not_depend_on_the_blocks(stream, name):
    loaded, found = tiny_model.loaded(), []
    for block_tokens in (11, 128):
        settings = RunSettings(name, 200, evaluate="blocks", block_tokens=block_tokens)
        asking = Asking(loaded, stream.exam, settings)
        assert answer_all(asking)[0] == "complete"
        found.append([answer.log_prob for answer in asking.answers])
    assert len(found[0]) == len(stream.questions)
    assert found[0] == pytest.approx(found[1], abs=2e-3)


@pytest.mark.parametrize("chooser", [None, "lexical", "oracle"])
def test_the_engine_answers_what_the_drop_in_answers(stream, chooser):
    recall = {"recall": chooser, "recall_slots": 48} if chooser else {}
    loaded, found = tiny_model.loaded(), []
    for backend in ("hf", "ring"):
        settings = RunSettings("strict", 200, evaluate="blocks", block_tokens=64, recall=recall, backend=backend)
        asking = Asking(loaded, stream.exam, settings)
        assert answer_all(asking)[0] == "complete" and asking.done == len(stream.exam.ids)
        found.append([[a.log_prob for a in asking.answers], [a.held for a in asking.answers]])
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-3)
    assert found[0][1] == found[1][1] and (chooser != "oracle" or min(found[0][1]) > 0)


def test_an_oracle_is_told_what_each_question_wants(stream):
    settings = RunSettings("strict", CAP, recall={"recall": "oracle", "recall_slots": 8})
    options = told(settings, stream.questions).recall
    begin, end, first, last = options["recall_told"][2]
    question = stream.questions[2]
    assert (begin, end) == (question.first, question.judged + 1) and options["recall_slots"] == 8
    assert (first, last) == (question.said, question.said + len(question.fact.statement))
    plain = RunSettings("strict", CAP, recall={"recall": "lexical"})
    assert told(plain, stream.questions) is plain


def test_what_a_frame_holds():
    class Event:
        def __init__(self, token, *spans):
            self.token = token
            self.spans = [type("Span", (), {"first": a, "end": b}) for a, b in spans]

    events, frames = [Event(10, (0, 4), (20, 26))], Frames()
    frames.take(events)
    frames.take(events)
    events.append(Event(30))
    frames.take(events)
    assert frames.tokens == [10, 30]
    assert [frames.held(t, range(22, 30)) for t in (9, 10, 29, 30)] == [0, 0.5, 0.5, 0]


# ---- records, table, picture ----


def test_a_record_reads_back_and_a_broken_one_is_refused(batch, tmp_path):
    (made,) = batch.run([policy("strict")], Console(quiet=True))
    (read,) = StreamEvalRecord.below(tmp_path)
    assert read.id == made.id and read.status == "complete" and read.protocol["distances"] == [3, 12]
    assert read.data["sha256"] == batch.paper.stream.sha256 and np.isnan(read.answers["held"]).all()
    text = read.path.read_text()
    for broken, message in (
        (text.replace("streameval/1", "streameval/9"), "this version reads"),
        (text.replace('"correct"', '"correctness"'), "field 'answers' must hold"),
        (text.replace('"cue","open"', '"cue","opened"'), "field 'answers.form' holds 'opened'"),
        (text.replace('"forms":', '"form":'), "required field 'protocol.forms' is missing"),
    ):
        assert broken != text
        read.path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            StreamEvalRecord.below(tmp_path)


def test_table_and_picture(batch, tmp_path):
    records = batch.run([RunSettings("full", evaluate="blocks"), policy("strict")], Console(quiet=True))
    table = streameval_table(records, "T")
    assert [row[:2] for row in table.rows] == [[n, f] for n in ("full", "strict") for f in ("cue", "open")]
    assert table.header[2:4] == ["3 lines", "12 lines"] and table.rows[2][2].startswith("100 % [")
    assert "On" not in table.header, "one machine is named above the table"
    elsewhere = records[0].environment | {"gpu": records[0].environment["gpu"] | {"name": "NVIDIA H200"}}
    mixed = streameval_table([replace(records[0], environment=elsewhere), records[1]])
    assert mixed.header[-1] == "On" and [row[-1] == "H200" for row in mixed.rows] == [True, True, False, False]
    assert draw_streameval(records, tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no streameval records"):
        draw_streameval([], tmp_path / "s.png")


def test_accuracy_counts_what_it_is_asked_for():
    answers = {"correct": np.array([1, 0, 1, 1])}
    assert accuracy(answers).value == 0.75
    assert accuracy(answers, np.array([False, True, False, False])).value == 0
    assert accuracy(answers, np.zeros(4, dtype=bool)).value is None
    assert Answer._fields[1:3] == ("correct", "exact")


# ---- command line ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tiny model, to run commands in."""
    tiny_model.save_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(more: str = "", **options) -> list[str]:
    given = {"model": "tiny", "cap": 200, "policy": "strict", "out": "out"}
    given |= {"distances": "2,5", "questions": 2, "every": 3} | options
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return ["streameval", *words, *shlex.split(more)]


def test_the_command_writes_records_and_picture_and_resumes(here, capsys):
    assert main(line(policy="full,strict,lazy:compress_every=8", backend="ring")) == 0
    records = StreamEvalRecord.below("out")
    assert [r.policy["label"] for r in records] == ["full", "strict", "lazy R=8"]
    assert [r.protocol["backend"] for r in records] == ["hf", "ring", "ring"], "no engine runs a baseline"
    assert (here / "out" / "streameval.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "lazy R=8" in shown and "5 lines" in shown and max(map(len, shown.splitlines())) <= PIPE_WIDTH
    assert main(line("--resume", policy="strict,window-only", backend="ring")) == 0
    assert len(StreamEvalRecord.below("out")) == 4 and "strict: taken from streameval-tiny" in capsys.readouterr().out
    assert main(line(policy="strict", distances="2,9")) == 0
    found = select_streamevals(StreamEvalRecord.below("out"), model="tiny")
    assert [[r.policy["label"] for r in one] for one in found] == [
        ["strict"],
        ["full", "strict", "lazy R=8", "window-only"],
    ]
    assert found[0][0].data["tokens"] > found[1][0].data["tokens"], "the longer stream comes first"


def test_ctrl_c_keeps_the_answers(here, monkeypatch, capsys):
    judge, calls = Asking._judge, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return judge(*args)

    monkeypatch.setattr(Asking, "_judge", pressed)
    assert main(line()) == 130
    (record,) = StreamEvalRecord.below("out")
    assert record.status == "partial" and len(record.answers["correct"]) == 2
    assert "strict: partial: interrupted after token" in capsys.readouterr().out


MISTAKES = [
    ({"cap": None}, "", "give --cap SLOTS"),
    ({"distances": "0"}, "", "--distances 0 is not accepted"),
    ({"distances": "2,2"}, "", "--distances 2,2 names one twice"),
    ({"distances": ","}, "", "--distances '' is not accepted"),
    ({"every": 1}, "", "every=1 is not accepted; accepted: a whole number of at least 2"),
    ({"questions": 0}, "", "questions=0 is not accepted"),
    ({"seed": -1}, "", "seed=-1 is not accepted"),
    ({"forms": "cue,paraphrase"}, "", "--forms cue,paraphrase is not accepted; accepted: one or more of cue, open"),
    ({"policy": "strict,recompute"}, "", "'recompute' .*accepted: full, or an eviction policy"),
    ({"policy": "full", "distances": "900"}, "", "full cache of the nearest question .*shorter --distances"),
    ({"recall": "nosuch"}, "", "invalid choice: 'nosuch'"),
    ({"policy": "full", "recall": "lexical"}, "", "policy 'full' has no recall"),
    ({"out": "tiny/config.json"}, "", "--out tiny/config.json: cannot be written"),
]


@pytest.mark.parametrize(("options", "more", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(here, capsys, options, more, message):
    before = sorted(here.rglob("*"))
    try:
        code = main(line(more, **options))
    except SystemExit as stop:
        code = stop.code
    told_of = capsys.readouterr()
    assert code == 2 and re.fullmatch(r"sinkstream streameval: error: .+\n", told_of.err), told_of.err
    assert re.search(message, told_of.err), told_of.err
    assert sorted(here.rglob("*")) == before
