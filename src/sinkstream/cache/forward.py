"""`PendingForward`: one forward of a stream, from the call of the decoder until the called model returns.

Between the two only the buffer changes: a prune that is due at the forward's first token is done, and new entries are
written behind those that count. A forward that raises is dropped, and the stream goes on as if it had not been called.
"""

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch

from sinkstream.cache.attention import Forward, running, switch_attention, writing_mask
from sinkstream.cache.channels import UNCERTAINTY, token_channels
from sinkstream.cache.chosen_frames import ChosenFrames, chooses
from sinkstream.cache.chunks import PinnedCopies, Segments, TwoFrames
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.families.base import FULL, SLIDING
from sinkstream.cache.recall import one_row
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.sliding import SlidingRing
from sinkstream.cache.stream import Stream
from sinkstream.policies import SIGNALS, Step, Steps
from sinkstream.policies.schedule import check_finite


class PendingForward:
    """Prunes if it is time, makes room and takes the new entries of every layer.

    Parameters
    ----------
    stream : Stream
    batch, tokens : int
        Of the forward; the tokens are at most `Stream.max_chunk_tokens`.
    input_ids : Tensor or None, (batch, tokens), int64
        None where the caller gave embeddings.
    device : torch.device

    Attributes
    ----------
    positions : Tensor, (batch, tokens), int64
        Position ids of the new tokens.
    mask : Tensor or None, (1, 1, tokens, visible), bool or dtype of the model
        None where the causal mask is the right one. Of a hybrid model, a dict with the mask of either kind of layers.
    """

    def __init__(self, stream: Stream, batch: int, tokens: int, input_ids: torch.Tensor | None, device: torch.device):
        self.stream, self.tokens, self.input_ids = stream, tokens, input_ids
        self._layers_written = 0
        stream.own()
        self.ring = self._ring(batch, device)
        if stream.recall is not None:
            stream.recall.choose(self.ring, stream.schedule)
        self.schedule = stream.schedule.copy()
        self.steps = self.schedule.advance(tokens)
        # a failed forward may have dropped already
        drop = int(self.steps.drop[0]) - (stream.schedule.cached - self.ring.live)
        if drop > 0:
            self.ring.prune(drop, stream.policy.refresh, stream.choose)
        self._open(batch, device)

    def _ring(self, batch: int, device: torch.device) -> SoftRing:
        ring = self.stream.ring
        return self.stream.allocate(batch, device) if ring is None or ring.seen == 0 else ring

    def _open(self, batch: int, device: torch.device) -> None:
        """Make room, and let the attention of the forward know what it must do."""
        stream, ring, tokens = self.stream, self.ring, self.tokens
        delta = ring.make_room(tokens)
        if stream.observer and delta is not None:
            stream.observer.rebase(delta)
        self._observe_attention()
        self._crossing = _crossing(stream, ring, self.steps)
        self._copies = self._crossing if isinstance(self._crossing, PinnedCopies) else None
        self._device = ring.keys.get_device()
        ring.open(tokens)
        if stream.sliding:
            stream.sliding.make_room(tokens, ring.base)
            stream.sliding.open(tokens)
        frames = self._crossing if isinstance(self._crossing, TwoFrames | ChosenFrames) else None
        if frames is not None:
            switch_attention(stream.spec.decoder, stream.user)
        queries = None if stream.recall is None else stream.recall.queries
        if queries is not None:
            queries.begin(ring)
        shown = stream.observer or queries
        if isinstance(frames, ChosenFrames):
            shown = None  # they tell the observer themselves
        self._attention = Forward(shown, frames, rows=stream.spec.streaming_rows)
        running.set(self._attention)
        first = ring.seen - ring.base
        self.positions = torch.arange(first, first + tokens, device=device).expand(batch, -1)
        mask = None if self._crossing is None else attention_mask(stream.spec, self._crossing.mask())
        self.mask = self._masks(stream.sliding, mask) if stream.sliding else mask

    def _observe_attention(self) -> None:
        if self.stream.observer:
            lets_go = self.stream.speculates and self.stream.schedule.signals()
            self.stream.observer.begin(self.tokens, spare=self.tokens - 1 if lets_go else 0)

    def write_in_attention(self) -> torch.Tensor:
        """Let the switched attention itself call `write`; returns the mask by which it knows."""
        sliding = self.mask[SLIDING] if isinstance(self.mask, dict) else None
        running.set(replace(self._attention, write=self.write, sliding_mask=sliding))
        return writing_mask(self.positions.device)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new entries ``(batch, kv_heads, new, head_dim)`` of one layer; returns what its queries may see.

        Raises
        ------
        ValueError
            If the model's dtype or device is not that of the buffers.
        """
        spec = self.stream.spec
        if not self._layers_written or keys.dtype is not spec.dtype or keys.get_device() != self._device:
            check_entries(spec, keys, self.ring.keys.device, layer if self._layers_written else 0)
        self._layers_written += 1
        row = spec.streaming_rows.get(layer)
        if row is None:
            assert self.stream.sliding is not None, "allocated when the forward began"
            return self.stream.sliding.write(spec.sliding_rows[layer], keys, values)
        visible = self.ring.write(row, keys, values)
        return self._copies.extend(row, *visible) if self._copies is not None else visible

    def commit(self, logits: torch.Tensor | None) -> None:
        """The called model has returned: count the tokens, do the prunes inside the chunk, observe the logits.

        Parameters
        ----------
        logits : Tensor or None, (batch, tokens, vocab)
            Given where the policy reads the logits.

        Raises
        ------
        ValueError
            If a layer wrote nothing, or an adaptive policy reads logits that are not finite.
        """
        check_written(self.stream.spec, self._layers_written)
        self._read(logits)
        self._count()

    def _read(self, logits: torch.Tensor | None) -> None:
        """What the policy reads of the logits; the stream stays as it is. Raises ValueError if they are not finite."""
        self._log_probs, self._risks = None, dict[str, list[float]]()
        if not self.stream.needs_logits:
            return
        assert logits is not None, "a policy that reads the logits is refused when the decoder is called alone"
        self._log_probs = torch.log_softmax(logits.detach().float(), dim=-1)
        for signal in self.stream.schedule.signals():
            self._risks[signal] = SIGNALS[signal](self._log_probs).mean(0).tolist()
            check_finite(signal, self._risks[signal], self.stream.seen)

    def _count(self) -> None:
        stream, begun, log_probs = self.stream, self.tokens, self._log_probs
        if self._risks:
            self._observe(self._risks)
        if stream.observer:
            stream.observer.commit(let_go=begun - self.tokens)
        self._fill_channels(log_probs)
        if stream.seen_ids:
            stream.seen_ids.append(None if self.input_ids is None else self.input_ids[:, : self.tokens])
        if stream.recall is not None:
            assert self.input_ids is not None, "recall reads token ids"
            stream.recall.append(self.input_ids[0, : self.tokens])
        choose = self._crossing.refreshed if isinstance(self._crossing, ChosenFrames) else None
        self.ring.advance(self.tokens, int(self.steps.drop[1:].sum()) if self.tokens > 1 else 0, choose)
        if stream.sliding:
            stream.sliding.advance(self.tokens)
        stream.schedule, stream.last_steps = self.schedule, self.steps
        stream.events += int(np.count_nonzero(self.steps.event))

    def _observe(self, risks: dict[str, list[float]]) -> None:
        """Step and observe token by token; the first prune on the way ends it.

        Parameters
        ----------
        risks : dict of list of float
            Signal -> risk after every token.
        """
        schedule, steps = self.stream.schedule, list[Step]()
        for i in range(self.tokens):
            ahead = schedule.copy()
            step = ahead.step()
            if step.drop and steps:
                break
            schedule = ahead
            steps.append(step)
            for signal, values in risks.items():
                schedule.observe(signal, values[i])
        self.schedule, self.steps, self.tokens = schedule, Steps.of(steps), len(steps)

    def _fill_channels(self, log_probs: torch.Tensor | None) -> None:
        """What is kept of every new token besides key and value; before the ring counts them."""
        ring, tokens = self.ring, self.tokens
        if not ring.channels:
            return
        drawn_from = None if log_probs is None else self._drawn_from(log_probs[:, :tokens])
        ids = None if self.input_ids is None else self.input_ids[:, :tokens]
        for name, known in token_channels(ring.channels, ids, drawn_from, self.stream.structure).items():
            ring.channels[name][..., ring.tail : ring.tail + tokens] = known[:, None]

    def _drawn_from(self, log_probs: torch.Tensor) -> torch.Tensor | None:
        """The distributions that tokens were drawn from, given those that were predicted after them."""
        if not UNCERTAINTY & self.ring.channels.keys():
            return None
        before, self.stream.log_probs = self.stream.log_probs, log_probs[:, -1:].clone()
        before = torch.zeros_like(self.stream.log_probs) if before is None else before
        return torch.cat([before, log_probs[:, :-1]], 1)

    def _masks(self, sliding: SlidingRing, crossing: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        """The masks of a hybrid model, which makes none itself once it is given one; a single token sees everything."""
        if self.tokens == 1:
            return {FULL: crossing, SLIDING: None}
        if crossing is None:
            live = self.ring.live
            causal = torch.arange(live + self.tokens) <= live + torch.arange(self.tokens)[:, None]
            crossing = attention_mask(self.stream.spec, causal[None, None].to(self.ring.keys.device))
        visible = sliding.visible_columns(self.tokens)[None, None].to(sliding.keys.device)
        return {FULL: crossing, SLIDING: attention_mask(self.stream.spec, visible)}


def attention_mask(spec: ModelSpec, visible: torch.Tensor) -> torch.Tensor:
    """A mask as the model's attention takes it: bool for sdpa, else 0 or the lowest number, in the model's dtype."""
    if spec.attention == "sdpa":
        return visible
    lowest = torch.finfo(spec.dtype).min
    return torch.zeros_like(visible, dtype=spec.dtype).masked_fill_(~visible, lowest)


def check_entries(spec: ModelSpec, keys: torch.Tensor, device: torch.device, layer: int = 0) -> None:
    """Raise ValueError if a layer's dtype or device is not that of the buffers; `layer`: 0, or one behind another."""
    if keys.dtype != spec.dtype and not torch.is_autocast_enabled(keys.device.type):
        if layer:
            raise ValueError(
                f"layer {layer} makes keys of {keys.dtype}, and the layers before it {spec.dtype}; accepted: keys and"
                " values of one dtype in all layers"
            )
        raise ValueError(
            f"the model's dtype was changed from {spec.dtype} to {keys.dtype} after the cache was made;"
            " change it back, or make the cache again"
        )
    if keys.device != device:
        raise ValueError(
            f"the model was moved from {device} to {keys.device} after the cache was filled; move it"
            " back, or begin again with cache.reset()"
        )


def check_written(spec: ModelSpec, layers: int) -> None:
    """Raise ValueError unless all layers have written."""
    if layers != spec.layers:
        raise ValueError(
            f"{layers} of {spec.layers} layers wrote their keys and values into the cache, so"
            " its tokens are not counted: layers with gradient checkpointing pass no cache on in training mode;"
            " call model.eval(), or model.gradient_checkpointing_disable()"
        )


def check_forward(stream: Stream, batch: int, tokens: int, input_ids: torch.Tensor | None, *, has_logits: bool) -> None:
    """Raise ValueError unless the stream can take these tokens in one forward."""
    if tokens < 1:
        raise ValueError("0 tokens in one call; accepted: at least 1")
    if stream.recall is not None and batch != 1:
        raise one_row(batch)
    if stream.batch and batch != stream.batch:
        raise ValueError(
            f"batch of {batch}, but this cache holds {stream.batch} streams; use reset() or another cache, or change"
            " the rows with cache.batch_select_indices(indices) or cache.batch_repeat_interleave(times)"
        )
    if input_ids is None and (stream.recall is not None or {"structure", "nll"} & stream.policy.needs):
        what = "recall" if stream.recall is not None else "this policy"
        raise ValueError(f"{what} reads token ids; inputs_embeds are not supported, give input_ids")
    if stream.needs_logits and not has_logits:
        raise ValueError("this policy reads the logits; call the causal language model, not its decoder alone")
    if stream.recall is not None and input_ids is not None:
        stream.recall.check_coming(input_ids[0])
    if tokens > 1 and tokens > stream.max_chunk_tokens():
        way = "feed them with cache.prefill(model, input_ids), or ask for the last logits only (logits_to_keep=1)"
        if input_ids is None:
            way = "embeddings are fed in calls of at most cache.max_chunk_tokens() tokens each, model(inputs_embeds=…)"
        raise ValueError(
            f"{tokens} tokens in one call, but this cache takes at most {stream.max_chunk_tokens()} now; {way}"
        )


def refuse_gradients(output: Any) -> None:
    """Let a backward through what the decoder has returned raise ValueError: the graph is cut at keys and values."""
    if not torch.is_grad_enabled():
        return
    last = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    layers = getattr(output, "hidden_states", None) or ()
    for states in (last, *layers[1:]):  # the first are the embeddings, before any layer
        if states.requires_grad:
            states.register_hook(_refuse_backward)


def _refuse_backward(gradient: torch.Tensor) -> NoReturn:
    raise ValueError(
        "backward() through a StreamingCache, which keeps keys and values without how they came about, would give wrong"
        " gradients; accepted: a forward without a cache (use_cache=False)"
    )


def _crossing(stream: Stream, ring: SoftRing, steps: Steps) -> PinnedCopies | TwoFrames | ChosenFrames | None:
    """How a chunk crosses the prunes that fall inside it; None if none does."""
    if len(steps) == 1 or not steps.drop[1:].any():
        return None
    if not stream.policy.plan_known:  # speculative, or what is pinned is chosen on the way
        return ChosenFrames(ring, steps, stream.observer) if stream.observer and chooses(ring, stream.policy) else None
    ours = stream.spec.attention == "sdpa" and stream.spec.observable
    return TwoFrames(ring, steps) if ours else PinnedCopies(ring, Segments.of(steps))
