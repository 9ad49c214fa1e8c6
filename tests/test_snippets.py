"""The Python of docs/cache.md, engine.md and recall.md runs, block after block, with a tiny model on a CPU."""

import re
from pathlib import Path

import pytest
import tiny_model
import torch

from sinkstream import Engine, StreamingCache
from sinkstream.compat import cache_argument

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("cache", "engine", "recall")
ELSEWHERE = {"migrate": "tests/test_migrate.py"}  # pages whose blocks another test runs


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


def test_every_page_with_python_is_run_by_a_test():
    assert {path.stem for path in DOCS.glob("*.md") if blocks_of(path.stem)} == {*PAGES, *ELSEWHERE}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_model.save_model(tmp_path / "model", "llama")
    model, tokenizer = tiny_model.tiny_model("llama"), tiny_model.tokenizer()
    model.config.max_position_embeddings = 4096  # for the caps of the pages
    model.generation_config.pad_token_id = 0
    text = tiny_model.SENTENCE * 3
    names = {
        **{"StreamingCache": StreamingCache, "Engine": Engine, "model": model, "tokenizer": tokenizer, "L": 64, "S": 4},
        **{"question_tokens": 4, "inputs": tokenizer(text, return_tensors="pt")},
        "engine": Engine(model, cap=2048, compress_every=64, refresh=64, scorer="window-attention"),
    }
    names["system_prompt_ids"] = names["conversation_ids"] = names["inputs"]["input_ids"]
    names["question_ids"] = names["conversation_ids"][:, 8:12]
    for number, code in enumerate(blocks_of(page), 1):
        code = re.sub(r"\bcache=cache\b", f"{cache_argument(model)}=cache", code)
        code = code.replace('"builtin"', repr(str(folder))).replace('backend="fused"', 'backend="ring"')
        if "engine.prefill(conversation_ids)" in code:  # an engine takes one row
            names |= {name: names[name][0] for name in ("conversation_ids", "question_ids")}
            names["prompt_ids"] = names["conversation_ids"]
        if "cache.recall_ask" in code:  # another conversation than that of the block above
            names["cache"].reset()
        torch.manual_seed(0)
        exec(compile(code, f"{page}.md, block {number}", "exec"), names)
    shown = {"cache": "chats", "engine": "batch", "recall": "answer"}[page]
    assert names[shown]
