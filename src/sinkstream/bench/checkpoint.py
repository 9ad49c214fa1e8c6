"""Checkpoints of a long run of one stream, which an interrupted run is resumed from."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.bench.decoding import ActiveRun, Samples
from sinkstream.engine import Engine
from sinkstream.evaluation.decoders import EngineDecoder
from sinkstream.records.files import write_atomically
from sinkstream.records.plain import plain_json
from sinkstream.records.records import npz_bytes

ARRAYS = ("chunk_tokens", "chunk_seconds", "visible", "event", "latency", "nll", "memory")
JOINED = ("latency", "nll")
ENDING = ".progress.npz"


class Checkpoint:
    """The samples of a run up to its latest block, and the engine's snapshot there; two files beside the record.

    Parameters
    ----------
    folder : Path
    record_id : str
    identity : dict
        What makes two runs the same: a run that was killed has written no record that says so.
    """

    def __init__(self, folder: Path, record_id: str, identity: dict[str, Any]):
        self.folder, self.record_id, self.identity = folder, record_id, _text(identity)
        self.arrays = folder / f"{record_id}{ENDING}"

    @classmethod
    def begun(cls, folder: Path, identity: dict[str, Any]) -> list[str]:
        """Ids of the runs of this identity that have a checkpoint in a folder and no record, the latest last.

        Raises ValueError for a checkpoint that is damaged.
        """
        ids = []
        for path in sorted(folder.glob(f"*{ENDING}"), key=lambda path: path.stat().st_mtime):
            record_id = path.name.removesuffix(ENDING)
            if not (folder / f"{record_id}.json").exists() and _read(path).get("identity") == _text(identity):
                ids.append(record_id)
        return ids

    def save(self, active: ActiveRun) -> None:
        """Write the run as it stands. A reader finds both old files or both new ones."""
        samples = active.run.samples
        snapshot = self._snapshot(samples.tokens)
        _engine(active).snapshot(snapshot)
        arrays = {name: np.asarray(getattr(samples, name)) for name in ARRAYS if name not in JOINED}
        arrays |= {name: np.concatenate(getattr(samples, name) or [np.empty(0)]) for name in JOINED}
        write_atomically(self.arrays, npz_bytes(arrays | {"identity": np.array(self.identity)}))
        for old in set(self._snapshots()) - {snapshot}:
            old.unlink()

    def samples(self) -> Samples | None:
        """The samples of the checkpoint; None without one, or without its snapshot. Raises ValueError for damage."""
        if not self.arrays.is_file():
            return None
        arrays = _read(self.arrays)
        cuts = np.cumsum(arrays["chunk_tokens"])[:-1]
        samples = Samples(
            chunk_tokens=arrays["chunk_tokens"].tolist(),
            chunk_seconds=arrays["chunk_seconds"].tolist(),
            latency=np.split(arrays["latency"].astype(np.float32), cuts),
            visible=arrays["visible"].tolist(),
            event=arrays["event"].tolist(),
            nll=np.split(arrays["nll"].astype(np.float32), cuts) if arrays["nll"].size else [],
            memory=[(int(tokens), float(mb)) for tokens, mb in arrays["memory"]],
        )
        return samples if self._snapshot(samples.tokens).is_file() else None

    def restore(self, active: ActiveRun) -> bool:
        """Resume a run from the checkpoint; False if there is none."""
        samples = self.samples()
        if samples is None:
            return False
        engine = _engine(active)
        engine.restore(self._snapshot(samples.tokens))
        active.resume(samples, engine.stats()["seen"], engine.state.logits)
        return True

    def remove(self) -> None:
        """Delete the checkpoint: the run is complete."""
        for path in (self.arrays, *self._snapshots()):
            path.unlink(missing_ok=True)

    def _snapshot(self, tokens: int) -> Path:
        return self.folder / f"{self.record_id}-{tokens}.safetensors"

    def _snapshots(self) -> list[Path]:
        return list(self.folder.glob(f"{self.record_id}-*.safetensors"))


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(plain_json(identity), sort_keys=True)


def _read(path: Path) -> dict[str, Any]:
    """The arrays of a checkpoint and, as text, its ``identity``, which an older one lacks. Raises ValueError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
            return arrays | {"identity": str(stored["identity"])} if "identity" in stored else arrays
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: damaged, so that the run cannot be resumed ({error}); accepted: without this file it begins anew"
        ) from error


def _engine(active: ActiveRun) -> Engine:
    """The engine of a run; only the engine has snapshots."""
    assert isinstance(active.decoder, EngineDecoder)
    return active.decoder.engine
