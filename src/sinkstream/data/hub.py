"""Benchmark texts from the Hugging Face hub: parquet copies, pinned to a revision, read through `datasets`.

The pinned files are fetched by `huggingface_hub`, which keeps them and says at once when the hub is out of reach;
`datasets` itself would try again for half a minute.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from .text import TEXTS, Text


@TEXTS.register("pg19")
def pg19() -> Text:
    """PG19, test split: 100 books in the order of the split (arXiv 1911.05507)."""
    repo, revision = "emozilla/pg19", "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"
    books = _rows("pg19", repo, revision, "data/test-*.parquet")
    return Text.of("\n\n".join(books), name="pg19", source=f"{repo}@{revision[:7]}, test split", default_tokens=20_000)


@TEXTS.register("wikitext")
def wikitext() -> Text:
    """WikiText-103 (v1, with its <unk>), test split: the lines that are not blank, joined by empty lines."""
    repo, revision = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"
    lines = (line.strip() for line in _rows("wikitext", repo, revision, "wikitext-103-v1/test-*.parquet"))
    return Text.of(
        "\n\n".join(line for line in lines if line),
        name="wikitext",
        source=f"{repo}@{revision[:7]}, wikitext-103-v1, test split",
        default_tokens=4096,
    )


def _rows(name: str, repo: str, revision: str, pattern: str) -> Iterator[str]:
    """Return the "text" column of the parquet files that `pattern` names, in order."""
    instead = "a local text works without it: --text FILE.txt or --text FILE.json"
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"text {name!r} needs the package datasets (pip install 'sinkstream[data]'); {instead}")
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[pattern]))
    except (OSError, ValueError) as error:
        raise ValueError(f"text {name!r} is out of reach: the hub gives no {repo} ({error}); {instead}") from error
    files = sorted(str(path) for path in folder.glob(pattern))
    if not files:
        raise ValueError(f"text {name!r} is not at its place: {repo}@{revision[:7]} has no {pattern}; {instead}")
    return _texts(files)


def _texts(files: list[str]) -> Iterator[str]:
    from datasets import load_dataset  # slow to import

    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return (row["text"] for row in rows)
