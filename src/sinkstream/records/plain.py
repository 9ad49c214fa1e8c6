"""What may stand in a record: names of files, plain JSON, no path of a machine."""

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

NAME_LENGTH, HASH_LENGTH = 34, 4  # of a record's name before its time, and of the hash of what was cut

_EMBEDDED_PATH = re.compile(r"(?<![\w.:/~-])(?:file://)?(?:/[^\s/,;:'\"()=]+){2,}/?|\b[A-Za-z]:\\[^\s,;'\"()=]+")


def new_record_id(*parts: object) -> str:
    """A readable name that is safe as a file name on every system: the parts, the UTC time, and four random digits.

    It has at most 55 characters. Parts that are longer together are cut, and a hash of them follows.

    >>> new_record_id("SmolLM2-135M", "pg19", "lazy R=32")  # doctest: +SKIP
    'smollm2-135m-pg19-lazy-r-32-20260105-101500-9f3a'
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{short_name(*parts)}-{stamp}-{secrets.token_hex(2)}"


def short_name(*parts: object) -> str:
    """The parts in lower case, joined by hyphens, at most `NAME_LENGTH` characters; the longest part is cut first."""
    slugs = [re.sub(r"[^a-z0-9.]+", "-", str(part).lower()).strip("-.") for part in parts]
    slugs = [slug for slug in slugs if slug] or ["run"]
    whole = "-".join(slugs)
    if len(whole) <= NAME_LENGTH:
        return whole
    room = NAME_LENGTH - HASH_LENGTH - len(slugs)
    while sum(map(len, slugs)) > room:
        longest = max(range(len(slugs)), key=lambda at: len(slugs[at]))
        slugs[longest] = slugs[longest][:-1]
    digest = hashlib.sha256(whole.encode()).hexdigest()[:HASH_LENGTH]
    return "-".join([*(slug.rstrip("-.") for slug in slugs), digest])


def scrub_paths(value: Any) -> Any:
    """Replace absolute paths by their last component, in strings, `Path` objects, lists and dicts, at any depth.

    Also inside longer strings (`--out=/a/b/c`, an error message). Relative paths, URLs and hub ids stay.
    """
    if isinstance(value, Mapping):
        return {key: scrub_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_paths(entry) for entry in value]
    if isinstance(value, PurePath):
        return scrub_paths(str(value))
    if not isinstance(value, str):
        return value
    option, equals, rest = value.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={scrub_paths(rest)}"
    if "\n" not in value and PurePosixPath(value).is_absolute():
        return PurePosixPath(value).name or value
    if "\n" not in value and PureWindowsPath(value).drive and PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name or value
    return _EMBEDDED_PATH.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], value)


def plain_json(value: Any) -> Any:
    """The value as plain JSON types: numpy scalars unpacked, arrays and tuples as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain_json(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain_json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
