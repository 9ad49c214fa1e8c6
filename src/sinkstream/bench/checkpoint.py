"""The files that an interrupted run of one stream goes on from."""

import io
from pathlib import Path

import numpy as np

from sinkstream.bench.decoding import ActiveRun, Samples
from sinkstream.engine import Engine
from sinkstream.evaluation.decoders import EngineDecoder
from sinkstream.records.files import write_atomically

ARRAYS = ("chunk_tokens", "chunk_seconds", "visible", "event", "latency", "nll", "memory")
JOINED = ("latency", "nll")


class Checkpoint:
    """What a run gave up to its latest block, and the snapshot of its stream there; both beside its record."""

    def __init__(self, folder: Path, record_id: str):
        self.folder, self.record_id = folder, record_id
        self.arrays = folder / f"{record_id}.progress.npz"

    def save(self, active: ActiveRun) -> None:
        """Keep a run as it stands. A reader finds both old files or both new ones."""
        samples = active.run.samples
        kept = self._snapshot(samples.tokens)
        _engine(active).snapshot(kept)
        held = {name: getattr(samples, name) for name in ARRAYS}
        held |= {name: np.concatenate(held[name]) if held[name] else np.empty(0) for name in JOINED}
        buffer = io.BytesIO()
        arrays = {name: np.asarray(value) for name, value in held.items()}
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
        write_atomically(self.arrays, buffer.getvalue())
        for old in set(self._snapshots()) - {kept}:
            old.unlink()

    def samples(self) -> Samples | None:
        """What was kept, if its snapshot is there too."""
        if not self.arrays.is_file():
            return None
        with np.load(self.arrays, allow_pickle=False) as stored:
            held = {name: stored[name] for name in ARRAYS}
        cuts = np.cumsum(held["chunk_tokens"])[:-1]
        samples = Samples(
            chunk_tokens=held["chunk_tokens"].tolist(),
            chunk_seconds=held["chunk_seconds"].tolist(),
            latency=np.split(held["latency"].astype(np.float32), cuts),
            visible=held["visible"].tolist(),
            event=held["event"].tolist(),
            nll=np.split(held["nll"].astype(np.float32), cuts) if held["nll"].size else [],
            memory=[(int(tokens), float(mb)) for tokens, mb in held["memory"]],
        )
        return samples if self._snapshot(samples.tokens).is_file() else None

    def restore(self, active: ActiveRun) -> bool:
        """Bring a run to where it was kept; False if nothing was."""
        samples = self.samples()
        if samples is None:
            return False
        engine = _engine(active)
        engine.restore(self._snapshot(samples.tokens))
        active.resume(samples, engine.stats()["seen"], engine.state.logits)
        return True

    def remove(self) -> None:
        """Forget all of it: the run is complete."""
        for path in (self.arrays, *self._snapshots()):
            path.unlink(missing_ok=True)

    def _snapshot(self, tokens: int) -> Path:
        return self.folder / f"{self.record_id}-{tokens}.safetensors"

    def _snapshots(self) -> list[Path]:
        return list(self.folder.glob(f"{self.record_id}-*.safetensors"))


def _engine(active: ActiveRun) -> Engine:
    """The engine of a run; no other rung has snapshots."""
    assert isinstance(active.decoder, EngineDecoder)
    return active.decoder.engine
