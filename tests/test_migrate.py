"""docs/migrate.md: every block of code runs, in order, with a tiny model; and the sizes count as the page says."""

import re
from pathlib import Path

import pytest
import tiny_model
import torch

from sinkstream.cache import StreamingCache
from sinkstream.compat import cache_argument, with_cache

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrate.md"
SECTIONS = dict(
    re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
)
OPENING = PAGE.read_text(encoding="utf-8").partition("## ")[0]


def code_of(text: str, model) -> str:
    """The Python of a part of the page, under the name that the installed release gives the argument."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    return re.sub(r"\bcache=(cache|chat)\b", rf"{cache_argument(model)}=\1", code)


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> dict:
    """What the page takes for granted."""
    folder = tiny_model.save_model(tmp_path_factory.mktemp("migrate") / "model", "llama")
    loaded = tiny_model.loaded("llama")
    loaded.model.generation_config.pad_token_id = 0
    ids = torch.randint(1, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    sizes = {"L": 64, "S": 4, "W": 60, "R": 60, "T": 40, "ratio": 0.5, "i": 1}
    return sizes | {
        "model": loaded.model,
        "tokenizer": loaded.tokenizer,
        "name": str(folder),
        "text": tiny_model.SENTENCE * 3,
        "new_ids": ids,
        "token": ids[:, :1],
        "questions": [ids[:, :5], ids[:, 5:]],
    }


@pytest.mark.parametrize("section", SECTIONS)
def test_every_line_runs(section, held):
    names = dict(held)
    exec(compile(code_of(OPENING + SECTIONS[section], held["model"]), f"{PAGE.name}: {section}", "exec"), names)
    assert names["cache"].policy.peak <= 65 or section == "kvpress"
    assert len(re.findall(r"^# ", code_of(SECTIONS[section], held["model"]), re.MULTILINE)) >= 6, "a line for each call"
    if section == "kvpress":
        assert len(names["answers"]) == 2 and names["context"].seen_tokens == len(held["text"])
    if "nll" in names:
        assert names["nll"].shape == (len(held["text"]),) and names["nll"][1:].isfinite().all()


@torch.no_grad()
def test_the_window_counts_one_more_than_recent_size(held):
    """A token of streaming-llm sees start_size and recent_size tokens and itself; eviction comes afterwards."""
    model, start, recent, past = held["model"], 4, 6, []
    cache = StreamingCache.for_model(model, sink=start, window=recent + 1)
    for token in torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(1)):
        model(token.view(1, 1), **with_cache(model, cache))
        visible = [*past, token]
        assert cache.kept_tokens == len(visible)
        past = visible if len(visible) <= start + recent else visible[:start] + visible[-recent:]
    assert cache.kept_tokens == start + recent + 1


def test_the_page_names_every_project():
    assert [name.split(":")[0] for name in SECTIONS] == ["transformers", "attention_sinks", "streaming-llm", "kvpress"]
