"""Choosers: which blocks of the archive come back. One file and its registered classes each."""

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Hits, Index, Query
from sinkstream.registry import import_folder

import_folder(__name__, __path__)

__all__ = ["CHOOSERS", "Chooser", "Evicted", "Hits", "Index", "Query"]
