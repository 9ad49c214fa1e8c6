"""What happens to streams between decode steps: captures, turns, snapshots, counts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sinkstream.cache.recall import RecallEvent
from sinkstream.engine import snapshot as snapshots
from sinkstream.engine.capturing import capture_ahead, chunks_of
from sinkstream.engine.graphs import GraphCaptures
from sinkstream.engine.inputs import check_stream
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.recalling import StreamRecall
from sinkstream.engine.sampling import Sampler
from sinkstream.engine.steps import StepFunction
from sinkstream.engine.watch import WatchedModel
from sinkstream.policies import Step
from sinkstream.policies.options import check_whole


class StreamKeeper(WatchedModel):
    """The part of `StreamDecoder` beside decoding."""

    weights: PackedWeights
    recall: StreamRecall | None
    _step: StepFunction
    _append: Callable[[torch.Tensor, int], None]

    # ---- CUDA graphs ----

    def capture(
        self, samplers: Sequence[Sampler] = (), told: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Capture now every CUDA graph of steps that take the likeliest token, and of chunks of prompts.

        Otherwise a graph is captured when it is first needed, and that step or prompt waits. Streams that hold tokens
        are not affected. Does nothing with backends that capture nothing.

        Parameters
        ----------
        samplers : sequence of Sampler
            Samplers whose draws are captured too. Which options are set matters, not their values. Streams that draw
            together need the options of all.
        told : callable
            ``told(done, total)`` after each piece of the work.

        Raises
        ------
        ValueError
            If a stream draws at present.
        """
        capture_ahead(self._step, chunks_of(self._append), [Sampler(), *samplers], told)

    @property
    def captures(self) -> GraphCaptures:
        """The CUDA graphs that steps and prompts have captured so far."""
        return self.state.captures

    # ---- turns of a conversation ----

    def begin_turn(self, ahead: int = 0, *, stream: int = 0) -> None:
        """Announce that a turn begins `ahead` tokens after the next one, for ``evict="turns"`` and recall.

        Raises
        ------
        ValueError
            If `ahead` is no whole number from 0, or a later turn has been announced already.
        """
        self._check_stream(stream)
        ahead = check_whole("ahead", ahead, 0)
        self.state.settle()
        schedule = self.state.schedules[stream]
        schedule.begin_turn(schedule.seen + ahead)
        if self.recall is not None:
            self.recall.memory.begin_turn(schedule.seen + ahead)

    def rewind(self, tokens: int, *, stream: int = 0) -> None:
        """Take back the latest tokens of a stream; feed at least one token before anything is generated.

        A turn that began with the first of them, or later, is forgotten.

        The stream is then as before these tokens, except that tokens evicted meanwhile stay evicted.

        Raises
        ------
        ValueError
            If so many tokens are not in the window, the policy pins older tokens or reads the logits, or recall has
            read them; nothing is taken back then.
        """
        self._check_stream(stream)
        tokens = check_whole("tokens", tokens, 0)
        self.state.rewind(tokens, stream)
        if tokens and self.recall is not None:
            self.recall.memory.forget_turns()

    # ---- keeping ----

    def snapshot(self, path: str | Path, *, stream: int = 0) -> None:
        """Write one stream to a safetensors file, which `restore` and `StreamingCache.load` read.

        With recall the archive, the frame and the events are in the file too.

        Raises
        ------
        ValueError
            If the file of the archive is damaged.
        WriteError
            If the file cannot be written; an older one stays as it was.
        """
        self._check_stream(stream)
        self.check_model()
        snapshots.save(path, self.state, stream, model_hash=self.model_hash, recall=self.recall)

    def restore(self, path: str | Path, *, stream: int = 0, row: int | None = None) -> None:
        """Replace one stream by that of a file of `snapshot`, which continues bit for bit, or of a cache's `save`.

        Parameters
        ----------
        row : int or None
            Which row, where a cache has saved a batch.

        Raises
        ------
        ValueError
            If the file does not fit this engine: no snapshot, or another format, model, dtype, policy, positions or
            recall, or an archive that ``recall_bytes`` and ``recall_file_bytes`` have no room for.
        WriteError
            If the file of the archive cannot be made. The stream that was there has one still: `reset` deletes it.
        """
        self._check_stream(stream)
        self.check_model()
        snapshots.load(path, self.state, stream, model_hash=self.model_hash, row=row, recall=self.recall)

    def dump(self, *, stream: int = 0) -> bytes:
        """One stream as the bytes of a snapshot file."""
        self._check_stream(stream)
        self.check_model()
        return snapshots.dump(self.state, stream, model_hash=self.model_hash, recall=self.recall)

    def undump(self, data: bytes, *, stream: int = 0) -> None:
        """As `restore`, from the bytes that `dump` gave."""
        self._check_stream(stream)
        self.check_model()
        snapshots.undump(data, self.state, stream, model_hash=self.model_hash, recall=self.recall)

    def reset(self, *, stream: int | None = None, sink: int | None = None) -> None:
        """Forget one stream; or all of them, and take the model's weights anew.

        Parameters
        ----------
        sink : int or None
            Sinks of what comes then, up to ``max_sink``; the window gives their slots. Default: the policy's.

        Raises
        ------
        ValueError
            If there are not so many slots for sinks, or the weights do not fit (see `renew_model`).
        """
        self.state.policy_of(sink)
        self.renew_model() if stream is None else self._check_stream(stream)
        self.state.clear(stream, sink=sink)

    def leave(self, stream: int) -> None:
        """Forget one stream, so that another one may join in its place; the others are not affected."""
        self.reset(stream=stream)

    def close(self) -> None:
        """Remove the prefill hooks from the model, as garbage collection of the engine does; delete a recall_file."""
        self._cache.close()
        if self.recall is not None:
            self.recall.memory.close()

    @property
    def active(self) -> list[int]:
        """Streams that hold tokens, in order: those that have joined and not left."""
        return [s for s, counters in enumerate(self.state.counters) if counters.seen]

    @property
    def last_steps(self) -> list[Step | None]:
        """What the policy did in each stream at the latest step; None for a stream that was idle."""
        return self.state.last_steps

    def stats(self, *, stream: int = 0) -> dict[str, int]:
        """Counts of one stream: seen, kept, evicted tokens, prune events, rebases; bytes of all streams, weights.

        ``persistent_layers`` is 1 where one kernel computes all layers of a stream that is stepped alone, else 0. With
        recall also what stands in the frame and what the archive holds, as `StreamingCache.stats` has it.
        """
        self._check_stream(stream)
        recalled = {} if self.recall is None else self.recall.catch_up().stats()
        own = {"weight_bytes": self.weights.step_bytes, "persistent_layers": int(self._step.persistent)}
        return self.state.stats(stream) | own | recalled

    @property
    def recall_events(self) -> list[RecallEvent]:
        """When the frame was set, why, and what came back: the latest 1,024; empty without recall."""
        return [] if self.recall is None else self.recall.events

    def _check_stream(self, stream: int) -> None:
        check_stream(stream, self.state.streams)
