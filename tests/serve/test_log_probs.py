"""Log probabilities of a reply: those of the tokens that wrote it, with their bytes and places."""

import pytest
from serving import client_of, loaded, make_service, served, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkstream.serve.text import TextStream
from sinkstream.serve.token_texts import TokenTexts

TEXT = "Hello 😀 wörld — “ça”"
EMOJI = "😀".encode()


def byte_level(*words: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and for some words, as GPT-2's tokenizer writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(word.replace(" ", "Ġ") for word in words)])}
    merges = []
    for word in words:
        pieces = list(word.replace(" ", "Ġ"))
        merges += [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]
        vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges) if "".join(pair) not in vocab}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words that begin with a space, and bytes by their numbers, as SentencePiece writes them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁w", "ör", "ld"]
    found = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    strip = decoders.Strip(content=" ", left=1, right=0)
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def test_the_bytes_of_all_tokens_are_those_of_the_text():
    tokenizer = byte_level(" w", " Hello")
    texts, ids = TokenTexts(tokenizer), tokenizer(TEXT)["input_ids"]
    found = [texts[token] for token in ids]
    assert b"".join(one.data for one in found) == TEXT.encode()
    first = next(i for i, one in enumerate(found) if one.data == EMOJI[:1])
    assert [one.data for one in found[first : first + 4]] == [EMOJI[i : i + 1] for i in range(4)]
    assert found[first].text == "\ufffd" and found[first].name == r"bytes:\xf0"
    assert [one.name for one in found if one.text == " w"] == [" w"], "control: a whole text is its name"


def test_bytes_by_their_numbers_and_spaces_at_the_beginning_of_words():
    tokenizer = byte_fallback()
    texts, ids = TokenTexts(tokenizer), tokenizer.convert_tokens_to_ids
    emoji = [texts[ids(f"<0x{byte:02X}>")] for byte in EMOJI]
    assert b"".join(one.data for one in emoji) == EMOJI and emoji[0].name == r"bytes:\xf0"
    assert [texts[ids(piece)].text for piece in ("▁Hello", "▁w", "ör", "<0x41>")] == [" Hello", " w", "ör", "A"]
    assert tokenizer.decode(ids(["▁Hello", "▁w", "ör"])) == "Hello wör", "control: a text alone begins without a space"


def sent(tokenizer, text: str, stop: str) -> tuple[str, list[int], TextStream]:
    """What is sent of a text, and how many tokens are sent in whole after each token."""
    stream, pieces, counts = TextStream(tokenizer, [stop]), "", []
    for token in tokenizer(text)["input_ids"]:
        pieces += stream.push(token)
        counts.append(stream.tokens_sent())
        if stream.stopped:
            break
    return pieces + stream.finish(), counts, stream


def test_a_token_is_told_once_all_of_its_text_is_sent():
    tokenizer = byte_level()
    assert sent(tokenizer, "abcabd", "abd")[1] == [0, 0, 3, 3, 3, 3]
    text, counts, _ = sent(tokenizer, "a😀b", "xyz")
    assert text == "a😀b" and counts == [1, 1, 1, 1, 5, 6]
    assert sent(byte_level("bc"), "abcd", "cx")[1] == [1, 1, 3], "a token of which one half is held back"


def test_a_part_of_a_character_past_the_stop_string_is_taken_back():
    """Its token wrote no text by itself, and stayed in the stream."""
    tokenizer = byte_level(" w", " ð")  # a space and the first byte of an emoji are one token
    ids = tokenizer(TEXT)["input_ids"]
    for stop, tokens in ((" 😀", 5), (" ", 5), ("😀 ", 5), (" w", 9), ("ö", 10)):
        text, _, stream = sent(tokenizer, TEXT, stop)
        assert text == TEXT[: TEXT.index(stop)] and stream.tokens_within() == tokens
        assert text.startswith(tokenizer.decode(ids[:tokens])), "nothing of it is in the stream"


@pytest.fixture(scope="module")
def client():
    with served(make_service(loaded())) as address:
        yield client_of(address)


def reply(client, **options):
    given = {"model": "tiny-llama", "messages": [user("Hello")], "temperature": 0, "max_tokens": 10, "logprobs": True}
    return client.chat.completions.create(**given | options)


def test_what_comes_past_a_stop_string_is_not_told(client):
    whole = reply(client).choices[0]
    text = whole.message.content
    assert "".join(entry.token for entry in whole.logprobs.content) == text and len(text) == 10
    stop = text[4:6]
    ended = reply(client, stop=[stop]).choices[0]
    assert ended.message.content == text[: text.index(stop)] and ended.finish_reason == "stop"
    assert "".join(entry.token for entry in ended.logprobs.content) == ended.message.content
    chunks = [chunk.choices[0] for chunk in reply(client, stop=[stop], stream=True) if chunk.choices]
    told = [entry.token for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    assert "".join(told) == ended.message.content


def test_the_offsets_of_tokens_are_places_in_the_text(client):
    found = client.completions.create(
        model="tiny-llama", prompt="Hi", max_tokens=8, temperature=0, logprobs=2, n=2, stop=["\n\n"]
    )
    for choice in found.choices:
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token


def test_more_prompts_than_are_ever_served_at_once_are_a_mistake(client):
    """429 would say that the same request may succeed later."""
    with pytest.raises(Exception, match="65 prompts in one request; accepted: at most 64") as caught:
        client.completions.create(model="tiny-llama", prompt=["a"] * 65, max_tokens=1)
    assert caught.value.status_code == 400
