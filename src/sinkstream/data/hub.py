"""Benchmark texts from the Hugging Face hub: parquet copies, pinned to a revision, read through `datasets`.

The one file of a test split is fetched once and kept by `huggingface_hub`. Whether the hub answers is asked first,
because a download would try for half a minute before it gives up.
"""

import importlib.util
from collections.abc import Iterator

from huggingface_hub import dataset_info, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from sinkstream.data.text import TEXTS, Text


@TEXTS.register("pg19")
def pg19() -> Text:
    """PG19, test split: 100 books in the order of the split (arXiv 1911.05507)."""
    repo, revision = "emozilla/pg19", "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"
    books = _rows("pg19", repo, revision, "data/test-00000-of-00001-29a571947c0b5ccc.parquet")
    return Text.of("\n\n".join(books), name="pg19", source=f"{repo}@{revision[:7]}, test split", default_tokens=20_000)


@TEXTS.register("wikitext")
def wikitext() -> Text:
    """WikiText-103 (v1, with its <unk>), test split: the lines that are not blank, joined by empty lines."""
    repo, revision = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"
    rows = _rows("wikitext", repo, revision, "wikitext-103-v1/test-00000-of-00001.parquet")
    lines = (line.strip() for line in rows)
    return Text.of(
        "\n\n".join(line for line in lines if line),
        name="wikitext",
        source=f"{repo}@{revision[:7]}, wikitext-103-v1, test split",
        default_tokens=4096,
    )


def _rows(name: str, repo: str, revision: str, file: str) -> Iterator[str]:
    """Return the "text" column of a parquet file on the hub, in order. Raises ValueError if it cannot be had."""
    instead = "a local text works without it: --text FILE.txt or --text FILE.json"
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"text {name!r} needs the package datasets (pip install 'sinkstream[data]'); {instead}")
    try:
        path = _fetch(repo, revision, file)
    except (OSError, ValueError, HTTPError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"text {name!r}: the hub is out of reach, or has no {repo} ({reason}); {instead}") from error
    return _texts(path)


def _fetch(repo: str, revision: str, file: str) -> str:
    try:
        return hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        dataset_info(repo, revision=revision)
        return hf_hub_download(repo, file, repo_type="dataset", revision=revision)


def _texts(path: str) -> Iterator[str]:
    from datasets import load_dataset  # slow to import

    rows = load_dataset("parquet", data_files=path, split="train", streaming=True)
    return (row["text"] for row in rows)
