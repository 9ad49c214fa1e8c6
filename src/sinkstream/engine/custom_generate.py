"""Decoding for transformers' generate(): its logits processors and stopping criteria around the engine's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from sinkstream import compat
from sinkstream.cache.padding import check_zeros_and_ones, default_positions
from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.generation import Writer, feed, write
from sinkstream.engine.recorder import CopyInFlight

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation import GenerateDecoderOnlyOutput

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# what generate() passes on for its own decoding loop: checked below, or of no meaning to the engine
KNOWN = ("attention_mask", "position_ids", *compat.CACHE_NAMES, "use_cache", "logits_to_keep", "cache_position")


def run(
    decoder: StreamDecoder,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    recall_ask: int = 0,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Start over with a stream for each row and let all of them write; `check` comes before. See `custom_generate`.

    `mask`, ``(batch, tokens)`` if given, has 0 for pads, which no stream is fed.
    """
    for row, ids in enumerate(input_ids):
        decoder.reset(stream=row)
        feed(decoder, ids if mask is None else ids[mask[row] != 0], row, recall_ask)
    writer = ProcessorsWriter(decoder.state.streams, input_ids, processors, criteria, config, streamer)
    write(decoder, writer, range(len(input_ids)), config.max_length - input_ids.shape[1])
    return writer.result()


class ProcessorsWriter(Writer):
    """Draws and ends as the sampling loop of transformers does, with the same random numbers.

    Parameters
    ----------
    streams : int
        All streams of the engine; row i of the batch is stream i.
    input_ids : Tensor, (batch, tokens), int64, on the engine's device
    processors, criteria : LogitsProcessorList, StoppingCriteriaList
        As generate() has made them.
    config : GenerationConfig
    streamer : BaseStreamer or None
    """

    def __init__(self, streams: int, input_ids: torch.Tensor, processors, criteria, config, streamer):
        batch, self._length = input_ids.shape
        self._ids = input_ids.new_zeros((batch, config.max_length))
        self._ids[:, : self._length] = input_ids
        self._tokens = input_ids.new_zeros(streams)
        self._done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        self._processors, self._criteria, self._config, self._streamer = processors, criteria, config, streamer
        self._pad = compat.pad_token(config) if any(hasattr(c, "eos_token_id") for c in criteria) else None
        self._looks = streamer is not None or any(not isinstance(c, MaxLengthCriteria) for c in criteria)
        kept = config.return_dict_in_generate
        self._scores: list[torch.Tensor] | None = [] if kept and config.output_scores else None
        self._logits: list[torch.Tensor] | None = [] if kept and config.output_logits else None

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[: len(self._ids)].clone()  # processors may write into them
        scores = self._processors(self._ids[:, : self._length], logits)
        for kept, new in ((self._scores, scores), (self._logits, logits)):
            if kept is not None:
                kept.append(new)
        if self._config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if self._pad is not None:
            tokens = torch.where(self._done, self._pad, tokens)
        self._ids[:, self._length] = self._tokens[: len(tokens)] = tokens
        self._length += 1
        so_far = None if self._scores is None else tuple(self._scores)
        self._done = self._done | self._criteria(self._ids[:, : self._length], so_far)
        return self._tokens

    def look(self) -> Callable[[], list] | None:
        if not self._looks:
            return None
        return CopyInFlight(torch.stack([self._tokens[: len(self._done)], self._done.long()])).tolist

    def ended(self, shown: list, active: Sequence[int]) -> list[int]:
        tokens, done = shown
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens))
        if self._pad is None and not all(done):  # as in transformers: without a token for padding all go on
            return []
        return [s for s in active if done[s]]

    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What generate() returns."""
        sequences = self._ids[:, : self._length].clone()
        if not self._config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        scores, logits = (cast(Any, None if kept is None else tuple(kept)) for kept in (self._scores, self._logits))
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences), scores=scores, logits=logits)


def check(
    decoder: StreamDecoder,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    given: dict[str, Any],
) -> None:
    """Refuse, by name, what the engine cannot do for generate(); nothing has been touched then. Raises ValueError.

    Parameters
    ----------
    given : dict
        Model arguments, and what `compat.generate_arguments` found.
    """
    if model is not decoder.model:
        raise ValueError("custom_generate of an engine was given another model; accepted: the model it was made with")
    decoder.check_model()
    _check_config(config)
    unknown = [k for k, v in given.items() if v is not None and k not in (*KNOWN, *compat.NOT_PASSED)]
    for name in ("assistant_model", "negative_prompt_ids", *unknown):
        if given.get(name) is not None:
            _refuse(name, "no such argument")
    _check_shape(decoder, input_ids)
    if given.get("synced_gpus"):
        _refuse("synced_gpus=True", "synced_gpus=False")
    if any(compat.is_callers_cache(value) for value in given.values()):
        _refuse("a cache of the caller's own", "no cache: the engine holds the streams itself")
    mask, positions, tokens = given.get("attention_mask"), given.get("position_ids"), input_ids.shape[1]
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape or not bool((mask != 0).any(1).all()):
        _refuse("an attention_mask of another shape or a row of pads alone", "(batch, tokens) with 0 for pads")
    check_zeros_and_ones(mask)
    if positions is not None:
        fits = positions.shape[-1] == tokens
        if not fits or not bool(((positions == default_positions(mask)) | (mask == 0)).all()):
            _refuse("position_ids of the caller's own", "no position_ids")


def _check_shape(decoder: StreamDecoder, input_ids: torch.Tensor) -> None:
    streams, device = decoder.state.streams, decoder.state.device
    if input_ids.device != device:
        _refuse(f"input_ids on {input_ids.device}", f"input_ids on {device}")
    if len(input_ids) > streams:
        _refuse(f"{len(input_ids)} rows", f"at most {streams}, the engine's streams")
    if not input_ids.shape[1]:
        _refuse("an empty prompt", "at least one token")


def _check_config(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in MODES:
        _refuse(mode.value.replace("_", " "), "greedy decoding and sampling (num_beams=1, no assistant)")
    if config.guidance_scale not in (None, 1):
        _refuse(f"guidance_scale={config.guidance_scale}", "none")
    if config.use_cache is False:
        _refuse("use_cache=False", "use_cache=True")
    if config.cache_implementation is not None:
        _refuse(f"cache_implementation={config.cache_implementation!r}", "none: the engine holds the streams itself")
    if config.max_length is None:
        _refuse("a generation without a length", "max_new_tokens or max_length")
    wanted = [n for n in ("output_attentions", "output_hidden_states") if getattr(config, n)]
    if config.return_dict_in_generate and wanted:
        _refuse(f"{wanted[0]}=True", "output_scores and output_logits")


def _refuse(what: str, accepted: str) -> None:
    raise ValueError(f"{what}: not supported by the engine's custom_generate; accepted: {accepted}")
