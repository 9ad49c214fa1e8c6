"""Texts and token ids: every source, exactness of partial tokenization, hashes, and every refusal."""

import hashlib
import importlib.util
import json
import logging
import pydoc_data.topics
import random
import string

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sinkstream.data import TEXTS, Text, hub, load_text, random_tokens, repeating_tokens, tokenize, tokens


@pytest.fixture(scope="module")
def prose() -> str:
    """About 60,000 seeded characters of words, numbers, runs of blanks and empty lines."""
    chance = random.Random(0)
    words = ["".join(chance.choices(string.ascii_lowercase[:9], k=chance.randint(1, 9))) for _ in range(300)]
    gaps = [" "] * 12 + ["  ", "\n", "\n\n", ", ", ". ", " 1234 ", "\n    ", "=====", " é ", "'s "]
    return "".join(chance.choice(words) + chance.choice(gaps) for _ in range(9000))


@pytest.fixture(scope="module", params=["byte-level", "whole-text", "start-token", "end-token"])
def tokenizer(request, prose) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer: split into words, not split at all, with a start token, with an end token."""
    bpe = Tokenizer(models.BPE(unk_token="<s>" if request.param == "whole-text" else None))
    if request.param == "whole-text":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    source = [prose[i : i + 200] for i in range(0, len(prose), 200)]
    bpe.train_from_iterator(source, trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], show_progress=False))
    if request.param in ("start-token", "end-token"):
        template = "<s> $A" if request.param == "start-token" else "$A <s>"
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=16, bos_token="<s>")


def text_of(text: str, default_tokens: int | None = None) -> Text:
    """A text that is only in memory."""
    return Text.of(text, name="sample", source="test", default_tokens=default_tokens)


# Texts


def test_builtin_is_sorted_hashed_and_the_same_twice(monkeypatch):
    first = load_text("builtin")
    turned = dict(reversed(pydoc_data.topics.topics.items()))
    monkeypatch.setattr("sinkstream.data.builtin.topics", turned)
    assert load_text("builtin") == first
    assert len(first.text) > 300_000
    assert first.sha256 == hashlib.sha256(first.text.encode()).hexdigest()
    assert first.default_tokens == 4096


def test_txt_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a book.TXT"
    path.write_bytes("\n  Ünïcode\r\n\tend \n".encode())
    text = load_text(str(path))
    assert text.text == "\n  Ünïcode\r\n\tend \n"
    assert (text.name, text.source, text.default_tokens) == ("a book", "file a book.TXT", None)
    assert str(tmp_path) not in repr(text)


def test_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_text(str(tmp_path / "a.txt")).text == "hello"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"title": "x", "text": "one"}, "one"),
        (["one", "two"], "one\n\ntwo"),
        ([{"text": "one"}, "two"], "one\n\ntwo"),
    ],
)
def test_json_file_gives_its_texts(tmp_path, value, text):
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert load_text(str(tmp_path / "a.json")).text == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt' is empty"),
        ("a.txt", b" \n\t", "'a' .file a.txt. is empty"),
        ("a.txt", b"abc\0def", "a.txt' holds NUL bytes"),
        ("a.txt", b"\x89PNG\xff", "a.txt' is binary or not in UTF-8: byte 0"),
        ("a.pdf", b"%PDF-1.7\xe2\xe3", "a.pdf' is binary or not in UTF-8: byte 8"),
        ("a", b"ab\0c", "a' holds NUL bytes"),
        ("a.json", b"{", "a.json' is not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json' is not valid JSON"),
        ("a.jsonl", b'"one"\n{"text": "tw', "a.jsonl': line 2 is not valid JSON"),
        ("a.jsonl", b'"one"\n\n{"body": "two", "n": 3}', "line 3 has no field 'text'; its fields: body .FILE:FIELD."),
        ("a.jsonl", b'{"n": 3}', "line 1 has no field 'text'; its fields: none that is text"),
        ("a.jsonl", b'{"text": 3}', "field 'text' of line 1 is no string"),
        ("a.jsonl", b'"one"\n[1]', "line 2 is no string; accepted"),
        ("a.jsonl", b"\n \n", "file a.jsonl. is empty"),
        ("a.jsonl", b"", "a.jsonl' is empty"),
        ("a.json", b'"just a string"', "a.json' has another form"),
        ("a.json", b'{"title": "x"}', "its object has no field 'text'; its fields: title"),
        ("a.json", b'{"text": ["x"]}', "a.json' has another form"),
        ("a.json", b'["x", 1]', "a.json' has another form"),
        ("a.json", b"[]", "file a.json. is empty"),
        ("a.json", b'{"text": ""}', "file a.json. is empty"),
        ("a.json", b'{"text": "a\\u0000b"}', "file a.json. holds NUL"),
        ("a.json", b'{"text": "a\\ud800b"}', "file a.json. holds half of a character pair at 1"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / name))


def test_missing_file_directory_and_unknown_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt' does not exist"):
        load_text(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="holds no text files"):
        load_text(str(tmp_path))
    for unknown in ("pg20", "pg20:body"):
        with pytest.raises(
            ValueError, match=rf"unknown text '{unknown}'; accepted: builtin, pg19, wikitext, or a file: \.txt"
        ):
            load_text(unknown)


def test_lines_of_json_give_the_field_that_is_named(tmp_path):
    rows = [{"text": "one", "body": "1"}, {"text": "two", "body": "line 2"}]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    path = tmp_path / "a.JSONL"
    path.write_text(lines + "\n\n")
    assert load_text(str(path)).text == "one\n\ntwo"
    text = load_text(f"{path}:body")
    assert text.text == "1\n\n" + rows[1]["body"]
    assert (text.name, text.source) == ("a", "file a.JSONL, field 'body'")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert load_text(f"{tmp_path / 'b.json'}:body").text == text.text
    for wrong, words in (
        (f"{path}:title", "line 1 has no field 'title'; its fields: text, body"),
        (f"{path}:", "names no field"),
        (f"{tmp_path / 'c.jsonl'}:body", r"c\.jsonl' does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            load_text(wrong)
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(ValueError, match=r"plain\.txt' has no fields; accepted: FILE\.json:FIELD"):
        load_text(f"{tmp_path / 'plain.txt'}:body")
    (tmp_path / "odd:name.txt").write_text("a colon in a name")
    assert load_text(str(tmp_path / "odd:name.txt")).text == "a colon in a name"


@pytest.mark.parametrize("name", ["a.md", "a.rst", "code.py", "LICENSE", "a.tar.txt"])
def test_any_text_file_is_taken_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("# One\n\ntwo\n")
    assert load_text(str(tmp_path / name)).text == "# One\n\ntwo\n"


def test_a_directory_is_its_files_sorted_by_path(tmp_path, monkeypatch):
    folder = tmp_path / "books"
    held = {
        "b.txt": "two",
        "a/z.md": "one",
        "c.jsonl": '{"text": "three", "body": "3"}\n"four"',
        "d/.x/y": "no",
        ".e": "\0",
    }
    for name, content in sorted(held.items(), reverse=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    text = load_text(str(folder))
    assert text.text == "one\n\ntwo\n\nthree\n\nfour"
    assert (text.name, text.source) == ("books", "directory books, 3 files")
    monkeypatch.chdir(folder)
    assert load_text(".") == text
    assert load_text(f"{folder}:body").text == "one\n\ntwo\n\n3\n\nfour"
    (folder / "a.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"a\.bin' holds NUL bytes"):
        load_text(str(folder))
    (folder / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.bin' is empty"):
        load_text(str(folder))
    with pytest.raises(ValueError, match=r"holds no \.json or \.jsonl files, and field 'body' is named"):
        load_text(f"{folder / 'a'}:body")


# The hub


@pytest.mark.parametrize("name", ["pg19", "wikitext"])
def test_hub_text_without_hub_or_package_names_the_file_option(tmp_path, name, monkeypatch):
    def refuse(*args, **kwargs):
        raise HTTPError("offline")

    monkeypatch.setattr(hub, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"text '{name}': the hub is out of reach.*offline.*--text FILE"):
        load_text(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"text '{name}' needs the package datasets.*--text FILE"):
        load_text(name)


@pytest.mark.parametrize(
    ("name", "text", "default_tokens"),
    [
        ("pg19", " = One = \n\n\n\n\n  two\n\n\n = Three = \n", 20_000),
        ("wikitext", "= One =\n\ntwo\n\n= Three =", 4096),
    ],
)
def test_hub_text_is_read_from_its_pinned_test_split(tmp_path, monkeypatch, name, text, default_tokens):
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": [" = One = \n", "", "  two\n", " = Three = \n"]})
    asked = {}

    def give(repo, file, **options):
        asked.update(options, file=file)
        parquet.write_table(table, tmp_path / "test.parquet")
        return str(tmp_path / "test.parquet")

    monkeypatch.setattr(hub, "hf_hub_download", give)
    loaded = load_text(name)
    assert (loaded.name, loaded.text, loaded.default_tokens) == (name, text, default_tokens)
    assert "/test-00000-of-00001" in asked["file"]
    assert asked["repo_type"] == "dataset"
    assert len(asked["revision"]) == 40


def test_hub_file_that_is_kept_needs_no_network(monkeypatch):
    monkeypatch.setattr(hub, "dataset_info", None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *place, local_files_only, **more: f"kept {place[1]}")
    assert hub._fetch("some/repo", "abc", "test.parquet") == "kept test.parquet"


def test_every_registered_text_has_a_summary():
    assert TEXTS.names() == ["builtin", "pg19", "wikitext"]
    assert all(TEXTS.summary(name) for name in TEXTS)


# Token ids


def test_prefix_gives_the_ids_of_the_whole_text(tokenizer, prose):
    whole = tokenizer(prose, verbose=False)["input_ids"]
    assert len(whole) > 4000
    for wanted in (1, 2, 63, 500, 1501, len(whole) - 1, len(whole)):
        assert tokenize(text_of(prose), tokenizer, wanted).ids.tolist() == whole[:wanted], wanted


def test_long_runs_at_the_cut_do_not_change_the_ids(tokenizer):
    for piece in ("=", "ab", " ", "\n", "\n \n"):
        text = "a start " + piece * 4000 + " and an end"
        whole = tokenizer(text, verbose=False)["input_ids"]
        for wanted in (50, 200):
            assert tokenize(text_of(text), tokenizer, wanted).ids.tolist() == whole[:wanted], piece


def test_only_a_part_of_a_long_text_is_tokenized(tokenizer, prose, monkeypatch):
    lengths = []
    plain = tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda tok, text: lengths.append(len(text)) or plain(tok, text))
    tokenize(text_of(prose * 20), tokenizer, 500)
    assert max(lengths) < len(prose)


def test_special_tokens_stay_as_the_tokenizer_adds_them(tokenizer, prose):
    whole = tokenizer(prose, verbose=False)["input_ids"]
    ids = tokenize(text_of(prose), tokenizer).ids.tolist()
    assert ids == whole
    assert 0 not in ids[1:-1]


def test_stream_is_hashed_and_describes_itself(tokenizer):
    text = text_of("abc def ghi " * 30)
    stream = tokenize(text, tokenizer, 9)
    raw = b"".join(token.to_bytes(8, "little") for token in stream.ids.tolist())
    record = json.loads(json.dumps(stream.record()))
    assert (stream.ids.dtype, stream.ids.shape, len(stream)) == (torch.int64, (9,), 9)
    assert stream.sha256 == hashlib.sha256(raw).hexdigest()
    assert record == {
        "name": "sample",
        "source": "test",
        "tokens": 9,
        "sha256": stream.sha256,
        "text_sha256": text.sha256,
    }


def test_default_is_the_texts_own_number_of_tokens(tokenizer, prose):
    assert len(tokenize(text_of(prose, default_tokens=77), tokenizer)) == 77
    assert len(tokenize(text_of(prose, default_tokens=77), tokenizer, 78)) == 78


def test_short_text_names_both_counts(tokenizer):
    text = text_of("abc def")
    available = len(tokenizer("abc def")["input_ids"])
    with pytest.raises(ValueError, match=f"'sample' is too short: it has {available} tokens, 500 were asked for"):
        tokenize(text, tokenizer, 500)


@pytest.mark.parametrize("wanted", [0, -3])
def test_less_than_one_token_is_refused(tokenizer, wanted):
    with pytest.raises(ValueError, match=f"tokens={wanted} is not accepted"):
        tokenize(text_of("abc"), tokenizer, wanted)


def test_model_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="'sample' cannot be tokenized: this model has no tokenizer"):
        tokenize(text_of("abc"), None, 3)


def test_warning_about_the_models_maximum_stays_inside(tokenizer, prose, caplog):
    library = logging.getLogger("transformers")
    library.propagate = True
    try:
        tokenize(text_of(prose), tokenizer, 100)
        tokenize(text_of(prose), tokenizer)
        assert "maximum sequence length" not in caplog.text
        tokenizer(prose)
        assert "maximum sequence length" in caplog.text, "control: the library does warn on its own"
    finally:
        library.propagate = False
        tokenizer.deprecation_warnings.clear()


def test_repeated_passages_come_from_long_before():
    found = repeating_tokens(5_000, 3_000, back=300, seed=3, every=500, passage=20)
    plain, ids = random_tokens(5_000, 3_000, 3).ids, found.ids
    places = [place for place in range(0, 3_000, 500) if place >= 600]
    changed = (ids != plain).nonzero().flatten().tolist()
    assert changed and {t // 500 * 500 for t in changed} == set(places) and max(t % 500 for t in changed) < 20
    for place in places:
        passage = ids[place : place + 20]
        first = [f for f in range(place - 600, place - 299) if torch.equal(ids[f : f + 20], passage)]
        assert len(first) == 1
    assert found.name == "repeats" and "every 500 tokens 20 of 300 to 600 before, seed 3" in found.source
    with pytest.raises(ValueError, match="passage=20 is not accepted; accepted: 1 to 10"):
        repeating_tokens(50, 100, back=10, passage=20)


def test_random_tokens_follow_their_seed():
    first, again, other = (random_tokens(50, 400, seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert (int(first.ids.min()), int(first.ids.max())) == (0, 49)
    assert first.record()["source"] == "uniform below 50, seed 1"
    for vocab_size, count in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="is not accepted; accepted: a whole number of at least 1"):
            random_tokens(vocab_size, count)
