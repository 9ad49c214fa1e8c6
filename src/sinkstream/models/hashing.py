"""Content hashes that say which weights a run used."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 1 << 22


def sha256_of_files(paths: Iterable[Path]) -> str:
    """SHA-256, in hex, over the contents of the files in the given order; of one file it is that file's own hash."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: object) -> str:
    """SHA-256, in hex, of a JSON-able value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
