"""The timed decode loop: configurations that are compared decode in turns, a chunk of tokens at a time.

A chunk is one call under the project's timing function, without a device synchronisation inside. The order of the
turns rotates, so that clock drift affects all configurations alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sinkstream.archive import CHOOSERS, PREFIX, RecallSettings
from sinkstream.bench.rungs import open_timed, prompt_tokens
from sinkstream.bench.settings import BenchConfig, Protocol
from sinkstream.evaluation.decoders import Frames, step_weight_bytes
from sinkstream.evaluation.runner import Report
from sinkstream.measure.memory import held_mb, old_objects_aside
from sinkstream.measure.metrics import token_nll
from sinkstream.measure.timing import TokenClock, timed
from sinkstream.models import LoadedModel

STREAM_OFFSET = 1009  # tokens between the places where two streams begin in the text

SETUP = ("prepare_sec", "capture_sec", "prefill_sec", "warmup_sec")


class Source:
    """Endless token ids for all streams: `ids` (tokens,) int64 repeat, and each stream starts at another offset."""

    def __init__(self, ids: torch.Tensor, streams: int):
        self.table = torch.stack([ids.roll(-s * STREAM_OFFSET) for s in range(streams)], -1)

    def prompt(self, tokens: int, stream: int) -> torch.Tensor:
        """The first tokens of a stream, (tokens,)."""
        column = self.table[:, stream]
        return column.repeat(-(-tokens // len(column)))[:tokens]

    def row(self, position: int) -> torch.Tensor:
        """The tokens of all streams at one position, (streams,)."""
        return self.table[position % len(self.table)]


@dataclass
class Samples:
    """Measurements of the steady tokens of one configuration."""

    # chunk_tokens, chunk_seconds: tokens of every chunk, and wall seconds
    chunk_tokens: list[int] = field(default_factory=list)
    chunk_seconds: list[float] = field(default_factory=list)
    # each (tokens,), float32: seconds of every token; NaN for the first of a chunk
    latency: list[np.ndarray] = field(default_factory=list)
    # visible, event: KV entries that every token attended to, and whether a prune event began there
    visible: list[int] = field(default_factory=list)
    event: list[bool] = field(default_factory=list)
    # each (tokens,), float32: mean over the streams; only where a text is fed
    nll: list[np.ndarray] = field(default_factory=list)
    # (steady tokens so far, allocated MB) at the end of each block
    memory: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Steady tokens so far."""
        return sum(self.chunk_tokens)

    @property
    def seconds(self) -> float:
        """Wall seconds of the steady tokens."""
        return sum(self.chunk_seconds)


@dataclass
class TimedRun:
    """One configuration while it is measured: all that its record needs."""

    config: BenchConfig
    protocol: Protocol
    # id, turn: of this record, and of the first record of the group that takes turns
    id: str
    turn: str
    in_turn: int = 1  # size of that group
    samples: Samples = field(default_factory=Samples)
    # seconds of set-up by phase: `prepare` (packing, buffers, compilation, graph capture), `capture` (of an engine: a
    # second set-up, with packed weights and compiled kernels), `prefill` of all streams, `warmup`; keys end in "_sec"
    setup: dict[str, float] = field(default_factory=dict)
    weight_bytes: int = 0  # weights that one step reads
    profile: list[dict[str, Any]] | None = None
    reason: str | None = None  # why the run is not complete
    recall: dict[str, Any] | None = None  # what recall did in the steady tokens, see `recall_figures`


class ActiveRun:
    """One configuration of a group while it runs: the decoder, which is opened here, and the position in the text."""

    def __init__(self, run: TimedRun, loaded: LoadedModel, source: Source):
        self.run, self.source = run, source
        self.device = source.table.device
        self.clock = TokenClock(self.device)
        self.position = 0
        self.logits: torch.Tensor
        self.decoder, prepare, capture = open_timed(loaded, run.config)
        run.weight_bytes = self.decoder.weight_bytes
        run.setup = dict.fromkeys(SETUP, 0.0) | {"prepare_sec": prepare, "capture_sec": capture}

    def prefill(self, tokens: int) -> None:
        """Feed every stream its prompt."""
        prompts = [self.source.prompt(tokens, s) for s in range(self.run.config.streams)]
        rows, self.run.setup["prefill_sec"] = timed(
            lambda: [self.decoder.prefill(ids, s) for s, ids in enumerate(prompts)], device=self.device
        )
        self.logits, self.position = torch.cat(rows), tokens

    def note_recall(self) -> None:
        """Keep what recall has done in the steady tokens, if there is recall."""
        frames, settings = self.decoder.frames, self.run.config.run.recall
        if frames is not None:
            first = self.position - self.run.samples.tokens
            self.run.recall = recall_figures(frames, range(first, self.position), settings, self.decoder.counts())

    def warm_up(self) -> None:
        """Decode tokens that are not measured."""
        _, self.run.setup["warmup_sec"] = timed(self.decode, self.run.protocol.warmup, device=self.device)

    def resume(self, samples: Samples, position: int, logits: torch.Tensor) -> None:
        """Continue an earlier run, which had decoded up to `position`."""
        self.run.samples, self.position, self.logits = samples, position, logits

    def decode(self, tokens: int) -> torch.Tensor:
        """Choose and append tokens without a device synchronisation; every token is marked on the clock.

        Returns the NLL of the text (tokens, streams) float32 (zeros without one).
        """
        nll = torch.zeros((tokens, self.run.config.streams), dtype=torch.float32, device=self.device)
        logits = self.logits
        assert logits is not None, "a prompt or a snapshot comes first"
        chosen: torch.Tensor | None
        self.clock.start()
        for i in range(tokens):
            if self.run.protocol.teacher_forced:
                chosen = row = self.source.row(self.position)
                nll[i] = token_nll(logits, row)
            else:
                chosen = self.decoder.choose(logits)
            self.logits = logits = self.decoder.step(chosen)
            self.clock.tick()
            self.position += 1
        return nll

    def turn(self, tokens: int) -> None:
        """One timed chunk."""
        self.decoder.take_steps()
        nll, seconds = timed(self.decode, tokens, device=self.device)
        steps = self.decoder.take_steps()
        latency = self.clock.seconds().astype(np.float32)
        latency[0] = np.nan
        samples = self.run.samples
        if self.run.protocol.teacher_forced:
            samples.nll.append(nll.mean(-1).cpu().numpy())
        samples.visible += [step.visible for step in steps]
        samples.event += [step.event for step in steps]
        samples.chunk_tokens.append(tokens)
        samples.chunk_seconds.append(seconds)
        samples.latency.append(latency)  # last: a chunk without latency is dropped after an interrupt


@old_objects_aside()
def decode_in_turns(
    active: Sequence[ActiveRun],
    *,
    block_tokens: int,
    progress: Report,
    after_block: Callable[[], None] | None,
) -> None:
    """Decode the steady tokens of all runs, a chunk each in turn, from where the runs stand.

    After every `block_tokens` tokens the memory is noted and `after_block` called; `progress` is called with the
    steady tokens of a run and their total.
    """
    protocol, first = active[0].run.protocol, active[0].run.samples
    turn, limit = len(first.chunk_tokens), math.inf if protocol.seconds is None else protocol.seconds
    while first.tokens < protocol.tokens and max(one.run.samples.seconds for one in active) < limit:
        to_block_end = block_tokens - first.tokens % block_tokens
        tokens = min(protocol.chunk_tokens, protocol.tokens - first.tokens, to_block_end)
        for i in range(len(active)):
            active[(turn + i) % len(active)].turn(tokens)
        turn += 1
        if tokens == to_block_end:
            _note_memory(active)
            if after_block:
                after_block()
        progress(first.tokens, protocol.tokens)
    if first.tokens % block_tokens:
        _note_memory(active)


def choice_distances(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens between two choices of recall with such options: while something is recalled, and while nothing is."""
    given = {name: settings.get(PREFIX + name) for name in ("every", "empty_every")}
    chooser = CHOOSERS[settings["recall"]]() if isinstance(settings["recall"], str) else settings["recall"]
    made = RecallSettings(chooser, **{name: value for name, value in given.items() if value is not None})
    return made.every, made.empty_every


def recall_figures(
    frames: Frames, steady: range, settings: Mapping[str, Any], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What recall did while the tokens `steady` were appended.

    Returns
    -------
    dict
        ``gate_open``: share of the choices that brought something back; ``framed``: share of the tokens that saw
        recalled ones; ``frames``: how often the frame became another one, or was emptied; ``recalled_mean``: recalled
        tokens of a token that saw some; and the counts of the archive at the end.
    """
    opened = changed = framed = recalled = choices = 0
    held: tuple[tuple[int, int], ...] = ()
    every, empty_every = choice_distances(settings)
    firsts, ends = [0, *frames.tokens], [*frames.tokens, steady.stop]
    for first, end, spans in zip(firsts, ends, [(), *frames.spans]):
        inside = max(0, min(end, steady.stop) - max(first, steady.start))
        choices += sum(t % (every if spans else empty_every) == 0 for t in range(first + 1, end + 1) if t in steady)
        if first in steady:
            opened, changed = opened + bool(spans), changed + (spans != held)
        held = spans
        framed += inside * bool(spans)
        recalled += inside * sum(last - begin for begin, last in spans)
    return {
        "gate_open": opened / choices if choices else None,
        "framed": framed / len(steady),
        "frames": changed,
        "recalled_mean": recalled / framed if framed else 0.0,
        **{name: counts[name] for name in ("archived", "archive_bytes", "archive_file_bytes", "archive_lost")},
    }


def drop_unpaired_chunks(runs: Sequence[TimedRun]) -> None:
    """After an interrupt: drop the chunks of a turn that not every run has finished."""
    complete = min(len(run.samples.latency) for run in runs)
    for samples in (run.samples for run in runs):
        for parts in (samples.chunk_tokens, samples.chunk_seconds, samples.latency, samples.nll):
            del parts[complete:]
        del samples.visible[samples.tokens :], samples.event[samples.tokens :]


def _note_memory(active: Sequence[ActiveRun]) -> None:
    for one in active:
        one.run.samples.memory.append((one.run.samples.tokens, held_mb(one.device)))


class _ClockMark(LogitsProcessor):
    """Marks every token of generate() on the clock, after the warm-up; leaves the scores unchanged."""

    def __init__(self, clock: TokenClock, warmup: int):
        self.clock, self.warmup, self.calls = clock, warmup, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.warmup + 1:
            self.clock.tick()
        elif self.calls == self.warmup + 1:
            self.clock.start()
        return scores


@torch.no_grad()
def generate_static(run: TimedRun, loaded: LoadedModel, source: Source) -> None:
    """Time transformers' generate() with a static cache, whose forward generate() compiles during the warm-up.

    The loop of generate() is one chunk; a logits processor marks the clock. `warmup_sec` includes prefill and
    compilation.
    """
    from transformers import GenerationMixin

    model, device, protocol = loaded.model, source.table.device, run.protocol
    assert isinstance(model, GenerationMixin), "transformers generates with every causal language model"
    prompt = prompt_tokens(protocol, run.config)
    clock = TokenClock(device)
    settings = GenerationConfig(
        max_new_tokens=protocol.warmup + protocol.tokens + 1,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    ids = source.prompt(prompt, 0)[None]
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        _, total = timed(
            model.generate,
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_ClockMark(clock, protocol.warmup)]),
            device=device,
        )
    finally:
        model.generation_config.eos_token_id = ends
    latency = clock.seconds()
    tokens = len(latency)
    run.weight_bytes = step_weight_bytes(model)
    run.samples = Samples(
        chunk_tokens=[tokens],
        chunk_seconds=[float(latency.sum())],
        latency=[latency.astype(np.float32)],
        visible=[prompt + protocol.warmup + i + 1 for i in range(tokens)],
        event=[False] * tokens,
        memory=[(tokens, held_mb(device))],
    )
    run.setup = dict.fromkeys(SETUP, 0.0) | {"warmup_sec": total - run.samples.seconds}
