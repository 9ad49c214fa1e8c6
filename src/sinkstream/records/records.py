"""Run records on disk: `<id>.json` with everything about a run, and `<id>.npz` with its per-token arrays.

Records are the only source of tables, plots, verdicts and headline figures, so a record that lacks any required field
(see `schema.py`) is refused, on writing as on reading. Both files are written atomically, the JSON file last: an
`.npz` without its JSON file is no record. A record without its `.npz` is one: its block sums (`blocks`) are in the
JSON file, and only what needs single tokens says that the arrays are absent.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.base import StatusRecord
from sinkstream.records.blocks import Blocks
from sinkstream.records.files import write_atomically
from sinkstream.records.json_files import family_of, write_json
from sinkstream.records.pairs import PAIRS_FILE, Pairs
from sinkstream.records.schema import ARRAYS, NOT_NULL, REQUIRED, SCHEMA, STATUSES, check_arrays

#: JSON files beside records that are no records.
SUMMARY_FILE = "summary.json"
FAMILY = "sinkstream."  # how the schema of a record begins, of whatever kind

BLOCKED = ("index", "nll", "kv_length")  # the arrays that block sums are of


@dataclass(frozen=True)
class Record(StatusRecord):
    """One run: the fields of its JSON file (see `schema.REQUIRED`), and its per-token arrays, read when first used."""

    SCHEMA, KIND, REQUIRED, NOT_NULL, STATUSES = SCHEMA, "run", REQUIRED, NOT_NULL, STATUSES

    schema: str
    data: dict[str, Any]
    policy: dict[str, Any]
    summary: dict[str, Any]
    tokens_file: dict[str, Any]
    block_sums: dict[str, Any] | None = None
    pairs: Pairs = field(default_factory=Pairs, compare=False, repr=False)

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        Blocks.check(content.get("blocks"), where)

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(content) | {"block_sums": content.get("blocks")}

    @property
    def label(self) -> str:
        """The policy's label, or its name where an older record has no label."""
        return self.policy.get("label") or self.policy["name"]

    @property
    def tokens_path(self) -> Path:
        """Where the per-token arrays are, if they are there."""
        return self.path.parent / self.tokens_file["name"]

    @property
    def has_arrays(self) -> bool:
        """Whether the per-token arrays lie beside the record."""
        return self.tokens_path.is_file()

    def absent_arrays(self) -> str:
        """Says that the per-token arrays are absent, and which they are."""
        return f"record {self.id!r}: the per-token arrays ({', '.join(ARRAYS)}) are absent: no file {self.tokens_path}"

    @cached_property
    def blocks(self) -> Blocks | None:
        """NLL in blocks, from the JSON file, or from the arrays where an older record has only those; None if empty."""
        if self.block_sums is not None:
            return Blocks.read(self.block_sums)
        return Blocks.of(*(self.arrays[name] for name in BLOCKED))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Per-token arrays (tokens,) by name, as `schema.ARRAYS` defines them.

        Raises ValueError: the arrays are absent, or not those that the record was written with.
        """
        where = self.tokens_path
        if not self.has_arrays:
            raise ValueError(self.absent_arrays())
        try:
            with np.load(io.BytesIO(_verified_bytes(where, self.tokens_file["sha256"])), allow_pickle=False) as stored:
                return check_arrays(dict(stored), str(where))
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{where}: not a readable .npz file: {error}") from error


def write_record(record: Mapping[str, Any], arrays: Mapping[str, Any], directory: Path | str) -> Path:
    """Write a record and its per-token arrays, both or neither, to a folder; returns the path of the JSON file.

    `record` has every field of `schema.REQUIRED` but `schema`, `blocks` and `tokens_file`, which are filled in here;
    absolute paths are reduced to their last component and NaN becomes null. Arrays are cast to the types of
    `schema.ARRAYS`.

    Raises ValueError: a required field or array is missing or malformed, or a record of that id is there already.
    Raises WriteError: the files could not be written (an OSError: full disk, permission); neither is left behind.
    """
    where = f"record {record.get('id')!r}"
    typed = check_arrays(arrays, where)
    tokens, blocks = npz_bytes(typed), Blocks.of(*(typed[name] for name in BLOCKED))
    name = str(record.get("id"))
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(f"{where}: field 'id' must be a plain file name; see new_record_id")
    tokens_file = {"name": f"{name}.npz", "sha256": hashlib.sha256(tokens).hexdigest()}
    content = Record.build(record, blocks=blocks and blocks.record(), tokens_file=tokens_file)
    path = Record.place(content, directory)
    if path.exists():
        raise ValueError(f"{where}: {path} exists already; records are never overwritten")
    tokens_path = path.with_suffix(".npz")
    write_atomically(tokens_path, tokens)
    try:
        return write_json(path, content)
    except BaseException:
        tokens_path.unlink(missing_ok=True)
        raise


def load_record(path: Path | str, pairs: Pairs | None = None) -> Record:
    """Read and check one record; `pairs` holds the figures that it has with others, default none.

    Raises ValueError, naming the file and the field: not JSON, another schema version, a required field missing or
    null, the array file there with another content than the record states, or absent from a record without block sums.
    """
    record = Record.read(path)
    name = record.tokens_file["name"]
    if Path(name).name != name:
        raise ValueError(f"{path}: field 'tokens_file.name' is {name!r}; expected a file name without folders")
    if record.block_sums is None or record.has_arrays:
        _verified_bytes(record.tokens_path, record.tokens_file["sha256"])
    return replace(record, pairs=pairs) if pairs else record


def load_records(source: Path | str | Iterable[Path | str], pairs: Pairs | None = None) -> list[Record]:
    """Read all records below a folder, or those at the given paths, ordered by creation time and id.

    In a folder every `*.json` at any depth must be a record, except `summary.json` and files whose `schema` field
    names another kind of sinkstream file. Paths that are given one by one may be folders as well.
    All share the figures of `pairs`, default those of the first folder's ``pairs.json``.
    """
    entries = [Path(source)] if isinstance(source, str | Path) else [Path(entry) for entry in source]
    folder = next((entry for entry in entries if entry.is_dir()), None)
    pairs = pairs or (Pairs.load(folder) if folder else Pairs())
    records = {}
    for entry in entries:
        if not entry.exists():
            raise ValueError(f"{entry}: there is no such record or folder")
        for path in sorted(filter(_may_be_record, entry.rglob("*.json"))) if entry.is_dir() else [entry]:
            records[path.resolve()] = load_record(path, pairs)
    return sorted(records.values(), key=lambda record: (record.created, record.id))


def check_holds_records(folder: Path) -> None:
    """Raise ValueError unless there is a folder with a record of any kind below it.

    Without one every figure would be missing and every criterion not measured, as if nobody had measured anything.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder with records")
    paths = [path for path in sorted(folder.rglob("*.json")) if path.name not in (SUMMARY_FILE, PAIRS_FILE)]
    families = {path: family_of(path) for path in paths}
    if not any(family and family.startswith(FAMILY) for family in families.values()):
        other = next((f" ({path}: schema {family})" for path, family in families.items()), "")
        raise ValueError(f"{folder}: holds no record{other}; accepted: a folder of what sinkstream's commands write")


def _may_be_record(path: Path) -> bool:
    """False for files whose `schema` names another kind of file. Raises ValueError for a broken file."""
    if path.name == SUMMARY_FILE or path.name.startswith("."):
        return False
    family = family_of(path)
    return family is None or not family.startswith("sinkstream.") or family == SCHEMA.partition("/")[0]


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a compressed ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    return buffer.getvalue()


def _verified_bytes(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: field 'tokens_file.name': can not be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: field 'tokens_file.sha256' is {sha256}, but the file's is {found}")
    return data
