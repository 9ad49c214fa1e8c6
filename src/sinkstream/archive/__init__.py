"""The archive of evicted tokens, and the choosers that say which of them come back."""

from sinkstream.archive.base import ARCHIVES, Archive, Fetched
from sinkstream.archive.block_file import BlockFile
from sinkstream.archive.choosers import CHOOSERS, Chooser, Evicted, Hits, Index, Query
from sinkstream.archive.kv import KVArchive
from sinkstream.archive.settings import PREFIX, RecallSettings
from sinkstream.archive.spans import Span, chosen_tokens, runs
from sinkstream.archive.text import TextArchive

__all__ = [
    "ARCHIVES",
    "CHOOSERS",
    "PREFIX",
    "Archive",
    "BlockFile",
    "Chooser",
    "Evicted",
    "Fetched",
    "Hits",
    "Index",
    "KVArchive",
    "Query",
    "RecallSettings",
    "Span",
    "TextArchive",
    "chosen_tokens",
    "runs",
]
