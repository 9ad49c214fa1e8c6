"""`StreamState`: everything that streams keep between two steps, in buffers whose addresses never change.

The host counts (`Counters`, `PruneSchedule`) and writes the scalars of many coming steps into a small plan table on the
device; each step moves the cursor and reads its own row, so that a CUDA graph can run many tokens without the host.
What needs a decision of the host (a refresh, a rebase) ends the plan: the host decides, between two steps, and goes on.
Whether an adaptive trigger prunes is decided on the device, see `decisions`.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine.buffers import PLAN_TOKENS
from sinkstream.engine.counts import StreamCounts
from sinkstream.engine.geometry import Counters
from sinkstream.engine.recorder import Recorder
from sinkstream.engine.refresh import rebase_stream, refresh_stream
from sinkstream.engine.sampling import SamplingState
from sinkstream.kernels.begin_step import read_plan
from sinkstream.kernels.layout import LIKELIEST, TOKEN
from sinkstream.policies import SIGNALS, EvictionPolicy, PruneSchedule

REBASE_AT = 16_384  # float64 angles would allow more; kernels with float32 angles would not


class StreamState(StreamCounts):
    """The buffers of several independent streams, their counts, and the life of one step.

    Parameters
    ----------
    rebase_at : int
        Window position past which positions are rebased; at least twice the policy's peak is used, so that a rebase
        stays rare.
    structure : Tensor or None, (vocab,), float32
        Structural weight of every token id, where the scorer needs it.
    spec, policy, positions, streams, vocab, device
        As for `StreamBuffers`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy,
        *,
        positions: str,
        streams: int,
        vocab: int,
        device: torch.device,
        rebase_at: int,
        structure: torch.Tensor | None = None,
    ):
        super().__init__(spec, policy, positions=positions, streams=streams, vocab=vocab, device=device)
        self.rebase_at = max(rebase_at, 2 * policy.peak)
        self.structure = None if structure is None else structure.to(device)
        self._recorders: list[Recorder] = []
        self.stale_logits: set[int] = set()  # streams whose logits are not those of their last token
        self.sampling = SamplingState(streams, vocab, device)
        self._filled: tuple[int, int] | None = None  # versions of `tokens` and the marks in it
        self.clear()

    def clear(self, stream: int | None = None) -> None:
        """Forget one stream, or all of them; addresses stay."""
        which = range(self.streams) if stream is None else [stream]
        self.stale_logits.difference_update(which)
        if stream is None:
            self.schedules_so_far = [PruneSchedule(self.policy) for _ in which]
            self.counters_so_far = [Counters(self.geometry) for _ in which]
            self._keep_recorded()
            for buffer in self._buffers().values():
                buffer.zero_()
            self._discard_plan()
            return
        self.settle()
        self.schedules[stream], self.counters[stream] = PruneSchedule(self.policy), Counters(self.geometry)
        for buffer in self.stream_buffers(stream).values():
            buffer.zero_()

    def check_goes_on(self, stream: int) -> None:
        """Raise ValueError unless a stream can go on without a token: it has begun, and its logits are known."""
        if not self.counters[stream].seen:
            raise ValueError(f"stream {stream} has not begun and the prompt is empty; give at least one token")
        if stream in self.stale_logits:
            raise ValueError(
                f"stream {stream} was rewound, or restored from a cache's file, which has no logits, and the prompt is"
                " empty; give at least one token"
            )

    def rewind(self, tokens: int, stream: int) -> None:
        """Take back the latest tokens of a stream; its logits are those of no token then. Raises ValueError."""
        self.settle()
        self.schedules[stream].rewind(tokens)
        if tokens:
            self.counters[stream].seen -= tokens
            self.stale_logits.add(stream)

    # ---- which tokens ----

    def choose(self, tokens: torch.Tensor | None) -> None:
        """Say what the next step appends.

        Parameters
        ----------
        tokens : Tensor or None, (streams,), int64, on the device
            None: what `sampling` says of each stream; nothing is launched if the step before was told so too.
        """
        if tokens is not None:
            self.tokens.copy_(tokens)
        elif self._filled != (self.tokens._version, self.sampling.version):  # every write counts, whoever did it
            self.tokens.copy_(self.sampling.marks)
            self._filled = (self.tokens._version, self.sampling.version)

    @contextmanager
    def recording(self, *, looks: bool = False):
        """Gives a `Recorder`, which tells the token ids that are appended from now on, while the context lasts.

        Parameters
        ----------
        looks : bool
            Whether tokens will be looked at one by one; otherwise no step pays for it.
        """
        recorder = Recorder(self, looks)
        self._recorders.append(recorder)
        try:
            yield recorder
        finally:
            self._recorders.remove(recorder)

    @property
    def steps_done(self) -> int:
        """Steps of the present plan that have been launched; their rows hold the token ids."""
        return self._row

    def appended(self, first: int) -> torch.Tensor:
        """Token ids that the steps of the present plan appended, from its step `first` on.

        Returns
        -------
        Tensor, (steps, streams), int64
            A copy on the device; `LIKELIEST` where the stream sat out, `NO_TOKEN` where nothing could be drawn.
        """
        ids = self.plan[first : self._row, :, TOKEN].long()
        for s in range(self.streams):
            if s not in self._active:
                ids[:, s] = LIKELIEST
        return ids

    # ---- the life of one step ----

    @contextmanager
    def step(self, active: Sequence[int]):
        """Plan if it is time, keep idle streams as they are, and count the step once it has run.

        Parameters
        ----------
        active : sequence of int
            Streams that append what `tokens` says.
        """
        active = tuple(active)
        if self._row == self._planned or active != self._active:
            self._plan(active)
        idle = [self._touched(s) for s in range(self.streams) if s not in active]
        kept = [[part.clone() for part in parts] for parts in idle]
        for recorder in self._recorders:
            recorder.due()
        try:
            yield
        except BaseException:
            self._catch_up(check=False)  # the device may have run the step that is not counted
            self.settle()
            raise
        for parts, copies in zip(idle, kept):
            for part, saved in zip(parts, copies):
                part.copy_(saved)
        self._row += 1
        self.stale_logits.difference_update(active)
        if self._decisions is None:
            self.count(active)

    def settle(self) -> None:
        """Take in what the steps so far have shown, and drop the rest of the plan."""
        if self._decisions is not None:
            self._catch_up()
        elif self.signals and self._row:
            for row in self.risks[: self._row].tolist():
                for s in self._active:
                    for signal, risk in zip(self.signals, row[s]):
                        self.schedules[s].observe(signal, risk)
        self._keep_recorded()
        self._discard_plan()

    def begin_row(self) -> None:
        """First thing in a step, on the device: its tokens and scalars (the op `begin_step` does the same)."""
        read_plan(self.tokens, self.logits, self.plan, self.cursor, self.scalars, self.sampling.draws)

    def end_row(self) -> None:
        """Last thing in a step, on the device: note what adaptive triggers read in the logits."""
        if self._decisions is not None:
            self._decisions.note()
        elif self.signals:
            log_probs = self.logits.log_softmax(-1)
            risks = torch.stack([SIGNALS[signal](log_probs) for signal in self.signals], -1)
            self.risks.index_copy_(0, self.cursor[:1], risks[None])

    # ---- planning ----

    def _plan(self, active: tuple[int, ...]) -> None:
        """Do what is due before the next token of each active stream and write the rows up to the next decision."""
        more = self._decisions
        if (
            more is not None
            and self._row
            and active == self._active
            and more.goes_on(active, self._row, self.rebase_at)
        ):
            self._keep_recorded()
            self._write_plan(more.go_on(active, self._row, PLAN_TOKENS), active)
            more.put_right()
            return
        self.settle()
        for s in active:
            self._refresh_if_due(s)
            if self.counters[s].seen - self.counters[s].base > self.rebase_at:
                rebase_stream(self, s)
        if more is not None:
            self._write_plan(more.begin(active, PLAN_TOKENS, self.schedules), active)
            return
        count = min([PLAN_TOKENS, *(self._sure_tokens(s) for s in active)])
        rows = [[self.geometry.idle_row()] * count for _ in range(self.streams)]
        for s in active:
            ahead = Counters(**vars(self.counters[s]))
            rows[s] = []
            for step in self.schedules[s].plan(count):
                ahead.append(step.drop)
                rows[s].append(ahead.row(self.observed_queries))
        self._write_plan(rows, active)

    def _write_plan(self, rows: list[list[list[int]]], active: tuple[int, ...]) -> None:
        table = torch.tensor(rows, dtype=torch.int32).transpose(0, 1).contiguous()
        self._planned, self._active, self._row = len(table), active, 0
        self.copy_in(self.plan[: len(table)], table)

    def _keep_recorded(self) -> None:
        for recorder in self._recorders:
            recorder.keep()

    def _discard_plan(self) -> None:
        self._row = self._planned = 0
        self._active = ()
        if self._decisions is not None:
            self._decisions.discard()
        self.cursor.fill_(-1)

    def _refresh_if_due(self, stream: int) -> None:
        counters = self.counters[stream]
        if self.policy.scorer is None or counters.refreshed_at == counters.seen:
            return
        drop = self.schedules[stream].plan(1)[0].drop
        if drop:
            refresh_stream(self, stream, counters.leaving(drop))
            counters.refreshed_at = counters.seen

    def _sure_tokens(self, stream: int) -> int:
        """How many tokens, at least 1, come before the next decision that is not known now."""
        if self.policy.plan_known:
            return PLAN_TOKENS
        ahead = self.schedules[stream].copy()
        ahead.step()
        return 1 + ahead.sure_steps()

    def _touched(self, stream: int) -> list[torch.Tensor]:
        """Views of what a step changes in a stream that has an idle row."""
        parts = [self.keys[:, stream, :, 0], self.values[:, stream, :, 0], self.logits[stream]]
        parts += [c[:, stream, :, 0] for c in self.channels.values()]
        return parts if self.queries is None else [*parts, self.queries[:, stream, :, 0]]
