"""Lanes: the streams of one decoder, each with the stream of one session; those that write are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sinkstream.engine.batch import StreamBatch
from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.generation import refuse_logits
from sinkstream.engine.inputs import Ids
from sinkstream.engine.log_probs import TopLogProbs
from sinkstream.engine.sampling import StreamSampler
from sinkstream.models import LoadedModel
from sinkstream.policies import EvictionPolicy
from sinkstream.serve.captures import Count, capture_at_start
from sinkstream.serve.settings import ServeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SINK = 4  # without the first tokens of a stream models collapse
PREFILL_TOKENS = {"cpu": 128}  # of a prompt, between two steps
DEFAULT_PREFILL_TOKENS = 1024


class Lane:
    """One stream of a decoder that others share.

    Attributes
    ----------
    stream : int
    """

    def __init__(self, lanes: Lanes, stream: int):
        self._lanes, self._decoder, self.stream = lanes, lanes.decoder, stream

    # ---- what it holds ----

    @property
    def seen(self) -> int:
        """Tokens appended since the beginning."""
        return self._decoder.state.counters[self.stream].seen

    @property
    def sink(self) -> int:
        """Pinned tokens."""
        return self._decoder.state.counters[self.stream].sink

    @property
    def oldest(self) -> int:
        """Index in the stream of the oldest window token."""
        return self._decoder.state.schedules[self.stream].oldest

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self._decoder.state.sampling.vocab

    def counts(self) -> dict[str, int]:
        """As `StreamState.counts`."""
        return self._decoder.state.counts(self.stream)

    # ---- what is done to it between two steps ----

    def prefill(self, ids: Ids) -> None:
        """Append token ids ``(tokens,)``; the other lanes are not touched."""
        self._decoder.prefill(ids, stream=self.stream)

    def begin_turn(self, ahead: int = 0) -> None:
        """Say that a turn begins `ahead` tokens after the next one."""
        self._decoder.begin_turn(ahead, stream=self.stream)

    def rewind(self, tokens: int) -> None:
        """Take back the latest tokens. Raises ValueError if they are gone."""
        self._decoder.rewind(tokens, stream=self.stream)

    def dump(self) -> bytes:
        """The stream as the bytes of a snapshot file."""
        return self._decoder.dump(stream=self.stream)

    def undump(self, data: bytes) -> None:
        """Go on with the stream that `dump` gave, pinned tokens included. Raises ValueError if it does not fit."""
        self._decoder.undump(data, stream=self.stream)

    def reset(self, sink: int | None = None) -> None:
        """Forget everything; what comes then has so many pinned tokens."""
        self._decoder.reset(stream=self.stream, sink=sink)

    # ---- writing ----

    def begin(self, sampler: StreamSampler, log_probs: int | None) -> None:
        """Write from the next step on. Raises ValueError as `StreamBatch.join`."""
        self._lanes.batch.join(self.stream, sampler, log_probs=log_probs)

    def ask(self) -> None:
        """Ask for a token of the next step."""
        self._lanes.asked.append(self.stream)

    def answer(self, index: int) -> int:
        """The token that was asked for, which the stream holds already.

        Parameters
        ----------
        index : int
            How many came before it, for a message.

        Raises
        ------
        ValueError
            If there was nothing to draw from.
        Exception
            Whatever the step raised.
        """
        token = self._lanes.answer(self.stream)
        if token is None:
            refuse_logits(f"new token {index}", self.stream)
        return token

    def log_probs(self, token: int) -> tuple[float, TopLogProbs]:
        """As `StreamBatch.latest_log_probs`, of the token that was answered."""
        return self._lanes.batch.latest_log_probs(self.stream, token)

    def end(self) -> None:
        """Write no more."""
        self._lanes.leave(self.stream)


class Lanes(Sequence[Lane]):
    """All lanes of a decoder.

    Attributes
    ----------
    asked : list of int
        Streams that the next step is for.
    """

    def __init__(self, decoder: StreamDecoder):
        self.decoder, self.batch = decoder, StreamBatch(decoder)
        self.asked: list[int] = []
        self._answers: dict[int, int | BaseException | None] = {}
        self._lanes = [Lane(self, stream) for stream in range(decoder.state.streams)]

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, index):
        return self._lanes[index]

    @property
    def most_pinned(self) -> int:
        """Pinned tokens that a lane has slots for."""
        return self.decoder.state.geometry.sink

    @property
    def bytes(self) -> int:
        """Memory of all streams, in bytes."""
        return self.decoder.state.bytes

    def step(self, meanwhile: Callable[[], None]) -> None:
        """One step for all lanes that have asked; an error is told to each of them.

        Parameters
        ----------
        meanwhile : callable
            Called while the device computes, as for `StreamBatch.step`.
        """
        asked, self.asked = self.asked, []
        if not asked:
            return
        try:
            self._answers.update(self.batch.step(asked, meanwhile))
        except BaseException as error:
            self._answers.update(dict.fromkeys(asked, error))

    def answer(self, stream: int) -> int | None:
        """What the step gave a stream. Raises what it raised."""
        found = self._answers.pop(stream)
        if isinstance(found, BaseException):
            raise found
        return found

    def leave(self, stream: int) -> None:
        """Take a stream out of the batch, at any moment."""
        self._answers.pop(stream, None)
        self.asked = [s for s in self.asked if s != stream]
        self.batch.leave(stream)


def make_lanes(
    loaded: LoadedModel, settings: ServeSettings, backend: str, count: Count, *, untrained: bool = False
) -> Lanes:
    """As many lanes as sessions may be resident.

    Parameters
    ----------
    backend : str
        The engine's.
    count : callable
        Told of captured CUDA graphs, as in `capture_at_start`.
    untrained : bool
        Whether positions beyond the trained ones are allowed.

    Raises
    ------
    ValueError
        If the model, the cap or the backend does not fit, or memory does not suffice.
    """
    policy = {"evict": "turns"} if settings.evict == "turns" else {"compress_every": 1}
    decoder = StreamDecoder(
        loaded.model,
        EvictionPolicy.build(cap=settings.cap, sink=LEAST_SINK, **policy),
        backend=backend,
        streams=settings.resident,
        max_sink=settings.most_pinned,
        tokenizer=loaded.tokenizer,
        allow_untrained_positions=untrained,
    )
    capture_at_start(decoder, settings.captures, prefill_tokens(loaded.model), count)
    assert decoder.model_hash, "hashing the weights takes time, which no request should wait for"
    return Lanes(decoder)


def prefill_tokens(model: PreTrainedModel) -> int:
    """Tokens of a prompt that are fed at once, between two steps."""
    return PREFILL_TOKENS.get(model.device.type, DEFAULT_PREFILL_TOKENS)
