"""`StreamBatch`: continuous batching. Streams that generate together join and leave between two steps."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.log_probs import LogProbs, TopLogProbs
from sinkstream.engine.recorder import Recorder
from sinkstream.engine.sampling import StreamSampler
from sinkstream.kernels.layout import NO_TOKEN
from sinkstream.policies.options import plain

FORGET_AFTER = 256  # steps of which log-probabilities are kept although only the latest can be asked for


class StreamBatch:
    """Streams of one decoder that generate together.

    A stream generates the tokens that it would generate alone, whatever joins or leaves beside it. A CUDA graph is
    captured at the first step of a block of streams or of a kind of draw only.

    Parameters
    ----------
    decoder : StreamDecoder
        Its streams are fed with `prefill` or `join`, before they join the batch or between two steps.
    """

    def __init__(self, decoder: StreamDecoder):
        self.decoder = decoder
        self._members: dict[int, int | None] = {}  # by stream: of how many tokens log-probabilities are asked for
        self._open = ExitStack()
        self._recorder: Recorder | None = None
        self._log_probs: LogProbs | None = None
        self._steps = 0

    @property
    def members(self) -> list[int]:
        """Streams that have joined and not left, in order."""
        return sorted(self._members)

    def join(self, stream: int, sampler: StreamSampler | None = None, *, log_probs: int | None = None) -> None:
        """Let a stream that holds tokens generate from the next step on.

        Parameters
        ----------
        sampler : StreamSampler or None
            How it draws; None: the likeliest token.
        log_probs : int or None
            Number of likeliest tokens that `latest_log_probs` returns; None: no log-probabilities.

        Raises
        ------
        ValueError
            If the stream cannot go on, or is a member, or an option is not accepted; nothing has changed then.
        """
        state = self.decoder.state
        if stream in self._members:
            raise ValueError(f"stream {stream} is a member of the batch; accepted: leave({stream}) before")
        self.decoder.prompt_ids([], stream)
        log_probs = plain(log_probs)
        LogProbs.check(log_probs, state.sampling.vocab)
        if sampler is None:
            state.sampling.end(stream)  # of a batch that was dropped while the stream was its member
        elif isinstance(sampler, StreamSampler):
            state.sampling.begin(stream, sampler)
        else:
            name = type(sampler).__name__
            raise ValueError(f"sampler={name} is not accepted; accepted: a StreamSampler(Sampler(…), seed), or None")
        self._members[stream] = log_probs

    def leave(self, stream: int) -> None:
        """Take a stream out of the batch; it keeps its tokens."""
        if stream in self._members:
            del self._members[stream]
            self.decoder.state.sampling.end(stream)
        if not self._members:
            self._open.close()
            self._recorder = None

    def step(
        self, streams: Sequence[int] | None = None, meanwhile: Callable[[], None] | None = None
    ) -> dict[int, int | None]:
        """Generate one token in each stream.

        Parameters
        ----------
        streams : sequence of int or None
            Members; default: all of them.
        meanwhile : callable or None
            Called once the step is launched, before its tokens are waited for.

        Returns
        -------
        dict of int or None by int
            The token of each stream, appended already; None where a logit was not a number, so that nothing could be
            drawn (see `generation.refuse_logits`).
        """
        active = self.members if streams is None else sorted(streams) if isinstance(streams, Collection) else []
        if not active or not self._members.keys() >= set(active) or len(set(active)) < len(active):
            accepted = f"members of the batch, {self.members}, each once"
            raise ValueError(f"streams={active or streams} is not accepted; accepted: {accepted}")
        if self._recorder is None:
            self._recorder = self._open.enter_context(self.decoder.state.recording(looks=True, keeps=False))
        self.decoder.state.wake(active)
        self._note_log_probs()
        self.decoder.advance(None, active)
        if meanwhile is not None:
            meanwhile()
        tokens = self._recorder.latest()
        return {s: None if tokens[s] == NO_TOKEN else tokens[s] for s in active}

    def latest_log_probs(self, stream: int, token: int) -> tuple[float, TopLogProbs]:
        """Log-probability of a token at the place of the latest step, and those of the likeliest ones with their ids.

        Only for streams that take part in that step.

        Raises
        ------
        ValueError
            If the stream is no member that has joined with ``log_probs``, or there was no step since.
        """
        count = self._members.get(stream)
        if self._log_probs is None or count is None:
            known = [s for s, asked in sorted(self._members.items()) if asked is not None]
            raise ValueError(
                f"stream={stream!r} has no log-probabilities; accepted, after a step: members that were joined with"
                f" log_probs=N, {known}"
            )
        value, top = self._log_probs.latest(stream, token)
        return value, top[:count]

    def _note_log_probs(self) -> None:
        """Before a step: note the log-probabilities of as many likeliest tokens as any member asks for."""
        counts = [count for count in self._members.values() if count is not None]
        if not counts:
            self._log_probs = None
            return
        if self._log_probs is None or self._log_probs.count != max(counts):
            self._log_probs, self._steps = LogProbs(self.decoder.state, max(counts)), 0
        if self._steps % FORGET_AFTER == 0:
            self._log_probs.forget()
        self._steps += 1
        self._log_probs.before_step()
