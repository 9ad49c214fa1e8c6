"""The API: options reach the sampler, every mistake has OpenAI's shape, nobody sees another's session."""

import json
import re
import time

import httpx2 as httpx
import pytest
from openai import APIStatusError
from serving import BIAS, CAP, SYSTEM, TEMPLATE, client_of, loaded, make_service, served, user

from sinkstream.engine import Engine

REFUSES = "{% for m in messages if m['content'] == 'refused' %}{{ raise_exception('no') }}{% endfor %}" + TEMPLATE
KEYS = ("key-of-ann", "key-of-bo")
ERROR_FIELDS = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    service = make_service(model, spill=tmp_path_factory.mktemp("sessions"), body_mb=1, max_tokens_limit=5000)
    with served(service, KEYS) as found:
        yield found


@pytest.fixture
def client(address):
    return client_of(address, KEYS[0])


def post(address: str, path: str, body, key: str = KEYS[0]) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(address + path, content=content, headers=headers)


def chat(client, text: str = "Hello", **more):
    options = {"temperature": 0, "max_tokens": 10, "logit_bias": BIAS} | more
    return client.chat.completions.create(model="tiny-llama", messages=[SYSTEM, user(text)], **options)


# ---- what is served ----


def test_the_model_is_listed_and_others_are_not_known(client):
    assert [m.id for m in client.models.list()] == ["tiny-llama"]
    assert client.models.retrieve("tiny-llama").owned_by == "sinkstream"
    with pytest.raises(APIStatusError) as error:
        chat(client, extra_body={"model": "gpt-9"})
    assert error.value.status_code == 404 and error.value.code == "model_not_found"


def test_completions_are_those_of_the_engine(client, model):
    engine = Engine(model.model, cap=CAP, sink=4, tokenizer=model.tokenizer)
    for prompt in ("Once upon a time", "a long text " * 30):
        engine.reset()
        engine.prefill(model.tokenizer(prompt)["input_ids"])
        expected = engine.generate([], max_new_tokens=20, logit_bias=BIAS).text
        options = {"model": "tiny-llama", "temperature": 0, "max_tokens": 20, "logit_bias": BIAS}
        for given in (prompt, model.tokenizer(prompt)["input_ids"]):
            assert client.completions.create(prompt=given, **options).choices[0].text == expected
        stream = client.completions.create(prompt=prompt, stream=True, **options)
        assert "".join(c.choices[0].text for c in stream) == expected
    both = client.completions.create(prompt=[prompt, "x"], n=2, **options)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[1].text == expected
    assert both.usage.completion_tokens == 80


def test_stop_strings_end_a_reply_and_the_session_goes_on_before_them(client):
    whole = chat(client, "stop here").choices[0].message.content
    for stop in (whole[4:7], [whole[6], "never"]):
        first = stop if isinstance(stop, str) else stop[0]
        for stream in (False, True):
            answer = chat(client, "stop here", stop=stop, stream=stream)
            if stream:
                chunks = list(answer)
                text = "".join(c.choices[0].delta.content or "" for c in chunks)
                reason = chunks[-1].choices[0].finish_reason
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (text, reason) == (whole[: whole.index(first)], "stop")
    messages = [SYSTEM, user("stop here"), {"role": "assistant", "content": text}, user("go on")]
    answer = client.chat.completions.create(model="tiny-llama", messages=messages, max_tokens=3)
    assert answer.usage.context["sent"] == len("\n<u>go on\n<a>"), "nothing past the stop string is in the stream"


def test_options_reach_the_sampler(client, model):
    forced = model.tokenizer.convert_tokens_to_ids("q")
    assert chat(client, logit_bias={str(forced): 100}).choices[0].message.content == "q" * 10
    options = {"temperature": 1.0, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}}
    drawn = [chat(client, seed=seed, **options) for seed in (1, 1, 2)]
    texts = [d.choices[0].message.content for d in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(chat(client, frequency_penalty=100, max_tokens=40).choices[0].message.content)) == 40
    assert (
        chat(client, temperature=0.8, extra_body={"top_k": 1}).choices[0].message.content
        == chat(client).choices[0].message.content
    )


def test_several_choices_are_those_of_their_seeds(client):
    three = chat(client, temperature=1.0, seed=7, n=3)
    alone = [chat(client, temperature=1.0, seed=7 + i).choices[0].message.content for i in range(3)]
    assert [c.message.content for c in three.choices] == alone and len(set(alone)) == 3
    assert three.usage.completion_tokens == 30


def test_log_probabilities_are_the_models_own(client, model):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    engine = Engine(model.model, cap=CAP, sink=4)
    ids = model.tokenizer(f"<s>{SYSTEM['content']}\n<u>Hello\n<a>")["input_ids"]
    logits = engine.prefill(ids)
    entries = answer.choices[0].logprobs.content
    assert "".join(e.token for e in entries) == answer.choices[0].message.content
    for entry in entries:
        log_probs = logits.flatten().log_softmax(-1)
        token = model.tokenizer.convert_tokens_to_ids(entry.token)
        assert entry.logprob == pytest.approx(log_probs[token].item(), abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(log_probs.topk(3).values.tolist(), abs=1e-4)
        logits = engine.step([token])
    text = client.completions.create(model="tiny-llama", prompt="Hi", max_tokens=4, temperature=0, logprobs=2)
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 4 and found.text_offset == [0, 1, 2, 3]


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"


def test_tokens_health_and_metrics(client, address):
    tokens = post(address, "/tokenize", {"messages": [user("hi")]}).json()
    assert tokens["count"] == len("<u>hi\n<a>") == len(tokens["tokens"])
    assert post(address, "/tokenize", {"text": "abc"}).json()["count"] == 3
    assert httpx.get(address + "/health").json()["status"] == "ok"
    assert httpx.head(address + "/health").status_code == 200, "some load balancers ask so"
    text = httpx.get(address + "/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}).text
    assert 'sinkstream_tokens_total{kind="completion"}' in text and "sinkstream_ttft_seconds_bucket" in text


# ---- mistakes ----

HI = [{"role": "user", "content": "hi"}]
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
WRONG = [
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [SYSTEM]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", {"messages": HI, "temperature": -1}, 400, "temperature"),
    ("/v1/chat/completions", {"messages": HI, "temperature": "hot"}, 400, "temperature"),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 5001}, 400, "max_tokens"),
    ("/v1/chat/completions", {"messages": HI, "top_p": 1.5}, 400, "top_p"),
    ("/v1/chat/completions", {"messages": HI, "n": 17}, 400, "n"),
    ("/v1/chat/completions", {"messages": HI, "logit_bias": {"97": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {"messages": HI, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {"messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"messages": HI, "colour": "red"}, 400, "colour"),
    ("/v1/chat/completions", {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [IMAGE]}, 400, "messages.0.content.0.type"),
    ("/v1/chat/completions", {"messages": HI, "stop": ["x", ""]}, 400, "stop.1"),
    ("/v1/chat/completions", {"messages": HI, "session_id": "sess_x"}, 404, None),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', 400, None),
    ("/v1/completions", b'{"prompt": ["x", "\\udc00"]}', 400, None),
    ("/v1/responses", b'{"input": "a\\ud83d"}', 400, None),
    ("/v1/sessions", b'{"messages": [{"role": "system", "content": "\\ud800"}]}', 400, None),
    ("/tokenize", b'{"text": "\\ud800"}', 400, None),
    ("/v1/chat/completions", b"{", 400, None),
    ("/v1/chat/completions", b"\xff\xfe", 400, None),
    ("/v1/chat/completions", b'"' + b"x" * 2_000_000 + b'"', 413, None),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [97]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, 400, "best_of"),
    ("/v1/sessions/sess_x/fork", {}, 404, None),
    ("/v1/sessions/load", {"name": "nothing"}, 404, None),
    ("/v1/sessions/load", {"name": "../../x"}, 400, "name"),
    ("/v1/nothing", {}, 404, None),
    ("/health", {}, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
def test_mistakes_have_the_shape_of_openai(path, body, status, param, address):
    answer = post(address, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error.keys() == ERROR_FIELDS and error["message"] and "Traceback" not in answer.text
    assert error["type"] == "invalid_request_error"


def test_half_a_pair_of_surrogates_is_told_and_a_whole_one_is_a_character(address):
    body = b'{"messages": [{"role": "user", "content": "%s"}], "max_tokens": 2}'
    answer = post(address, "/v1/chat/completions", body % rb"\ud83d")
    assert "messages holds half of a surrogate pair; accepted: Unicode text" in answer.text
    assert post(address, "/v1/chat/completions", body % rb"\ud83d\ude00").status_code == 200


def test_a_model_without_a_chat_template_still_completes(model):
    with served(make_service(loaded(template=None))) as address:
        answer = post(address, "/v1/chat/completions", {"messages": HI})
        assert answer.status_code == 400 and "no chat template; accepted: /v1/completions" in answer.text
        assert post(address, "/v1/completions", {"prompt": "x", "max_tokens": 3}).json()["choices"][0]["text"]


def test_a_failure_of_the_server_tells_nothing_of_its_insides(model, monkeypatch, caplog):
    service = make_service(model)

    def broken(*_):
        raise RuntimeError("secret path /x/y")

    monkeypatch.setattr(service.conversations, "_feed", broken)
    with served(service) as address:
        answer = post(address, "/v1/chat/completions", {"messages": HI})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "secret path" in caplog.text
        monkeypatch.undo()
        assert post(address, "/v1/chat/completions", {"messages": HI}).status_code == 200


def test_no_text_is_logged(client, caplog):
    caplog.set_level("DEBUG", logger="sinkstream")
    chat(client, "a very private question")
    assert "private" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("sinkstream"))


def test_the_page_needs_nobody_else_and_a_foreign_host_is_refused(address):
    page = httpx.get(address + "/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|https?://|innerHTML", page.text)
    for path in ("/", "/health", "/v1/models"):
        answer = httpx.get(address + path, headers={"Host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")


# ---- whose sessions ----


def test_a_key_is_asked_for_and_sees_its_own_sessions_only(address, client):
    assert post(address, "/v1/chat/completions", {"messages": HI}, key="wrong").status_code == 401
    assert httpx.get(address + "/v1/models").json()["error"]["code"] == "invalid_api_key"
    other = client_of(address, KEYS[1])
    mine = client.post("/sessions", body={}, cast_to=object)["id"]
    assert mine in [s["id"] for s in client.get("/sessions", cast_to=object)["data"]]
    assert other.get("/sessions", cast_to=object)["data"] == []
    for call in (other.get, other.delete):
        with pytest.raises(APIStatusError) as error:
            call(f"/sessions/{mine}", cast_to=object)
        assert error.value.status_code == 404
    chat(client, "mine alone")
    again = chat(other, "mine alone")
    assert again.usage.prompt_tokens_details.cached_tokens == 0, "no token of another key's session is used"
    assert client.delete(f"/sessions/{mine}", cast_to=object)["deleted"]


def test_a_rate_is_kept(model):
    with served(make_service(model, rate=3)) as address:
        answers = [post(address, "/tokenize", {"text": "x"}) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"


# ---- clients that go away, and too many of them ----


def running(address: str) -> int:
    return httpx.get(address + "/health").json()["running"]


def test_a_client_that_goes_away_frees_its_step(model):
    with served(make_service(model, queue=2, resident=2)) as address:
        client = client_of(address)
        streams = []
        for i in range(2):
            stream = chat(client, f"endless {i}", max_tokens=60_000, stream=True)
            next(stream)
            streams.append(stream)
        refused = post(address, "/v1/chat/completions", {"messages": HI})
        assert refused.status_code == 429 and refused.headers["retry-after"]
        with pytest.raises(httpx.ReadTimeout):
            body = {"messages": HI, "max_tokens": 60_000}
            streams[0].close()
            while running(address) > 1:
                time.sleep(0.01)
            httpx.post(address + "/v1/chat/completions", json=body, timeout=0.3)
        streams[1].close()
        while running(address):
            time.sleep(0.01)
        assert post(address, "/v1/chat/completions", {"messages": HI, "max_tokens": 2}).status_code == 200


def test_a_session_that_could_not_be_fed_is_not_left_behind(model):
    """Its client has no id of it, and a session with an id is never given up."""
    service = make_service(loaded(template=REFUSES), sessions=2)
    with served(service) as address:
        client = client_of(address)
        for _ in range(3):
            with pytest.raises(APIStatusError) as error:
                client.post("/sessions", body={"messages": [SYSTEM, user("refused")]}, cast_to=object)
            assert error.value.status_code == 400
        assert not client.get("/sessions", cast_to=object)["data"]
        assert client.post("/sessions", body={"messages": [SYSTEM, user("y")]}, cast_to=object)["turns"]["seen"] == 1


def test_a_completion_that_begins_a_session_comes_after_its_system_prompt(model):
    with served(make_service(model)) as address:
        client = client_of(address)
        session = client.post("/sessions", body={"messages": [SYSTEM]}, cast_to=object)["id"]
        more = {"max_tokens": 8, "temperature": 0, "logit_bias": BIAS, "model": "tiny-llama"}
        text = client.completions.create(prompt="Hi", **more, extra_body={"session_id": session}).choices[0].text
        whole = f"<s>{SYSTEM['content']}\n"
        assert text == client.completions.create(prompt=whole + "Hi", **more).choices[0].text
        assert client.get(f"/sessions/{session}", cast_to=object)["tokens"]["pinned"] == len(whole)


def test_a_bias_of_a_token_id_of_very_many_digits_is_refused(client):
    with pytest.raises(APIStatusError) as error:
        client.completions.create(model="tiny-llama", prompt="x", logit_bias={"1" * 5000: 1})
    assert error.value.status_code == 400
