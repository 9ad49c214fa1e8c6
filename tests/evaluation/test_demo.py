"""The demo: the promised list of methods, and a small run of the real thing whose control must collapse."""

import pytest
import torch

from sinkstream.cli import main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.data import load_text
from sinkstream.evaluation import demo
from sinkstream.evaluation.demo import demo_settings
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import load_model
from sinkstream.records.records import load_records

SMALL = ["--tokens", "240", "--cap", "112", "--sample-every", "40"]


def options_of(settings: RunSettings) -> dict:
    policy = settings.policy()
    return {} if policy is None else policy.record()


def test_the_list_is_the_promised_one():
    runs = {settings.method: options_of(settings) for settings in demo_settings(tokens=demo.FULL_FITS)}
    promised = {
        "recompute": {},
        "window-only": {"sink": 0, "compress_every": 1},
        "strict": {"sink": 4, "compress_every": 1},
        "lazy": {"compress_every": 32, "max_drop": None, "overlap": 0},
        "max-drop": {"compress_every": 32, "max_drop": 8},
        "overlap": {"compress_every": 32, "overlap": 32},
        "adaptive-entropy": {"adaptive": "entropy"},
    }
    for method, options in promised.items():
        assert options.items() <= runs[method].items(), method
    refreshed = [options for options in runs.values() if options.get("refresh")]
    assert len(refreshed) == 1 and refreshed[0]["scorer"], "refresh with a scorer, in order"
    assert {"full", *promised} < set(runs)


def test_the_control_is_the_full_cache_where_it_fits():
    methods = {tokens: [s.method for s in demo_settings(tokens=tokens)] for tokens in (8192, 8193, demo.TOKENS)}
    assert methods[8192] == ["full", *methods[8193]]
    assert methods[8192] == methods[demo.TOKENS] and methods[8193][0] == "strict"


def test_every_method_has_the_same_cap_and_another_label():
    settings = demo_settings(cap=200, sample_every=5)
    assert {s.cap for s in settings} == {200}
    assert {s.policy().peak for s in settings if s.policy()} == {200}
    assert len({s.label() for s in settings}) == len(settings)
    assert [s.sample_every for s in settings if s.method == "recompute"] == [5]
    assert {s.prefill_tokens(demo.TOKENS) for s in settings} == {200}


def test_the_text_is_long_enough_for_the_demo():
    assert len(load_text("builtin").text) > 10 * demo.TOKENS
    assert demo.TOKENS > 4 * demo.CAP and demo.TIMED_TOKENS > 64, "steady figures leave out 64 tokens"
    samples = (demo.TOKENS - demo.CAP) / demo.SAMPLE_EVERY
    assert samples >= 100, "recompute needs some"


@pytest.fixture(scope="module")
def small_model():
    """The real small model, as the demo loads it."""
    try:
        return load_model("builtin", dtype=torch.float32, device="cpu")
    except ValueError as error:
        pytest.skip(f"the built-in model is not installed: {error}")


@pytest.mark.slow
def test_the_control_collapses(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sinkstream.cli.demo.load_model", lambda *_, **__: small_model)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 2)
    monkeypatch.chdir(tmp_path)
    assert small_model.trained_positions == demo.FULL_FITS
    assert main(["demo", *SMALL]) == 0
    records = load_records("out/demo")
    by_name = {record.policy["name"]: record for record in records}
    assert {r.status for r in records} == {"complete"}
    assert set(by_name) == {settings.method for settings in demo_settings(112, tokens=240)}
    ppl = {name: record.summary["ppl"] for name, record in by_name.items()}
    assert ppl["window-only"] >= 1.3 * ppl["strict"], ppl
    sampled_or_control = ("recompute", "window-only")
    assert all(ppl[name] < 1.3 * ppl["strict"] for name in ppl if name not in sampled_or_control), ppl
    for name, record in by_name.items():
        assert record.arrays["index"].tolist() == list(range(113, 240))
        assert record.summary["kv_length"]["max"] <= (240 if name == "full" else 112)
        assert record.summary["timed_tokens"] == (1 if name == "recompute" else 2)
    assert by_name["recompute"].summary["scored_tokens"] == 4
    shown = capsys.readouterr().out
    assert "cap 112" in shown and "recompute (1 in 40" in shown and max(map(len, shown.splitlines())) <= PIPE_WIDTH
    assert "sinkstream chat" in shown.splitlines()[-1]
    assert (tmp_path / "out" / "demo" / "nll.png").read_bytes().startswith(b"\x89PNG")
