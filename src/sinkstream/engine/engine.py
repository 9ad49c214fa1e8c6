"""`Engine`: a model that decodes for ever in static memory, under any eviction policy.

engine = Engine(model, cap=2052, compress_every=64, backend="ring")
engine.prefill(prompt_ids)
out = engine.generate([], max_new_tokens=1000)
"""

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from sinkstream import compat
from sinkstream.cache import ModelSpec
from sinkstream.cache.streaming import REBASE_AT as PREFILL_REBASE_AT
from sinkstream.engine import snapshot as snapshots
from sinkstream.engine.custom_generate import check as check_custom_generate
from sinkstream.engine.custom_generate import run as run_custom_generate
from sinkstream.engine.generation import Callback, Generation, StopRule, generate
from sinkstream.engine.handover import give_to_cache, take_from_cache
from sinkstream.engine.memory import check_engine, check_weights
from sinkstream.engine.packing import PackedWeights, check_packable, pack
from sinkstream.engine.prefill import PrefillCache
from sinkstream.engine.sampling import Sampler
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.engine.steps import STEPS
from sinkstream.models import load_model, weight_bytes
from sinkstream.policies import EvictionPolicy, Step

Ids = torch.Tensor | Sequence[int]


class Engine:
    """Decodes one or several independent streams with one set of weights.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a supported family; its parameters become views of the packed weights.
    policy : EvictionPolicy or None
        Or give its options: ``sink``, ``window`` or ``cap``, ``compress_every`` … (see `EvictionPolicy.build`).
    backend : str
        Name in `STEPS`: how a step is done.
    streams : int
        How many streams are held; each has its own ring.
    positions : {"cache", "original"}
        As in `StreamingCache.for_model`.
    tokenizer : tokenizer or None
        Needed by ``scorer="structural"``, stop strings and text.
    allow_untrained_positions : bool
        As in `StreamingCache.for_model`.
    rebase_at : int
        Window position past which positions are rebased (at least twice the policy's peak is used).

    Raises
    ------
    ValueError
        If the model, the policy, an option or the backend does not fit, or the device's memory does not suffice;
        before anything is allocated.

    Attributes
    ----------
    policy : EvictionPolicy
    spec : ModelSpec
    weights : PackedWeights
    state : StreamState
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy | None = None,
        *,
        backend: str = "ring",
        streams: int = 1,
        positions: str = "cache",
        tokenizer: Any = None,
        allow_untrained_positions: bool = False,
        rebase_at: int = REBASE_AT,
        **options: Any,
    ):
        self._cache = _checked_cache(
            model,
            policy,
            backend=backend,
            streams=streams,
            positions=positions,
            tokenizer=tokenizer,
            allow_untrained_positions=allow_untrained_positions,
            rebase_at=min(rebase_at, PREFILL_REBASE_AT),
            **options,
        )
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.policy: EvictionPolicy = self._cache.policy
        self.spec: ModelSpec = self._cache.spec
        self.weights: PackedWeights = pack(model)
        self.state = StreamState(
            self.spec,
            self.policy,
            positions=positions,
            streams=streams,
            vocab=self.weights.head.shape[0],
            device=model.device,
            rebase_at=rebase_at,
            structure=self._cache.structure,
        )
        self._step = STEPS[backend](self.weights, self.state)
        self._step.prepare()

    @staticmethod
    def check(
        model: PreTrainedModel,
        policy: EvictionPolicy | None = None,
        *,
        backend: str = "ring",
        streams: int = 1,
        **options: Any,
    ) -> None:
        """Raise ValueError as the constructor, which takes the same, would; nothing is packed or allocated."""
        _checked_cache(model, policy, backend=backend, streams=streams, **options).close()

    @classmethod
    def from_pretrained(
        cls,
        spec: str,
        policy: EvictionPolicy | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **more: Any,
    ) -> "Engine":
        """Load a model and make an engine of it.

        Parameters
        ----------
        spec : str
            As `sinkstream.models.load_model`: "builtin", "random:SHAPE", a directory, a .gguf file or a hub id.
        dtype : torch.dtype or None
            Default: bfloat16 on a GPU, float32 on a CPU.
        device : str, torch.device or None
            Default: the first CUDA device, or else the CPU.
        **more
            Options of `Engine`.

        Raises
        ------
        ValueError
            Also if the weights cannot fit: before anything is loaded for "random:SHAPE" and directories of safetensors
            files. The size of other models is not known then.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        check_weights(spec, weight_bytes(spec, dtype), device)
        loaded = load_model(spec, dtype=dtype, device=device)
        return cls(loaded.model, policy, **{"tokenizer": loaded.tokenizer} | more)

    # ---- feeding ----

    @torch.no_grad()
    def prefill(self, ids: Ids, *, stream: int = 0) -> torch.Tensor:
        """Append a text of any length to a stream, in chunks through the transformers module, evicting on the way.

        If that is interrupted or fails, the stream is forgotten; others are left as they are.

        Parameters
        ----------
        ids : Tensor, (tokens,), int64, or sequence of int
            New tokens only; at least one.

        Returns
        -------
        Tensor, (vocab,), float32
            Logits after the last token.
        """
        ids = self._ids(ids, stream)
        self.state.settle()
        try:
            give_to_cache(self.state, stream, self._cache)
            logits = self._cache.prefill(self.model, ids[None], self._cache.chunk_tokens)
            take_from_cache(self.state, stream, self._cache, logits[0])
        except BaseException:
            self.state.clear(stream)
            raise
        finally:
            self._cache.reset()
        return self.state.logits[stream].clone()

    @torch.no_grad()
    def step(self, tokens: Ids, *, streams: Sequence[int] | None = None) -> torch.Tensor:
        """Append one token to each stream.

        Parameters
        ----------
        tokens : Tensor, (len(streams),), int64, or sequence of int
        streams : sequence of int or None
            Which streams take part, each once; default: all of them. The others are left as they are.

        Returns
        -------
        Tensor, (len(streams), vocab), float32
            Logits after these tokens.
        """
        which = list(range(self.state.streams)) if streams is None else list(streams)
        if len(set(which)) < len(which) or not which:
            raise ValueError(f"streams={which} is not accepted; accepted: at least one stream, each once")
        for stream in which:
            self._check_stream(stream)
        tokens = self._ids(tokens, which[0])
        if len(tokens) != len(which):
            raise ValueError(f"{len(tokens)} tokens for {len(which)} streams; accepted: one token a stream")
        if len(which) == self.state.streams and streams is None:
            self.advance(tokens, which)
            return self.state.logits.clone()
        index = torch.tensor(which, device=self.state.device)
        self.advance(self.state.tokens.index_copy(0, index, tokens), sorted(which))
        return self.state.logits[index]

    def advance(self, tokens: torch.Tensor | None, streams: Sequence[int]) -> None:
        """The bare step: append ``tokens[s]`` to each stream s of `streams`; logits are left in ``state.logits``.

        Parameters
        ----------
        tokens : Tensor or None, (all streams,), int64, on the device
            Token ids, not checked. A negative one means the likeliest token of the stream's logits; None means that of
            all streams, and one such step after another launches nothing between two replays of a graph.
        """
        self.state.choose(tokens)
        with self.state.step(streams):
            self._step()

    @torch.no_grad()
    def score(self, ids: Ids, *, stream: int = 0) -> torch.Tensor:
        """Append a text token by token and return how surprising each token was.

        Returns
        -------
        Tensor, (tokens,), float32, nats
            NLL of each token given everything before it; NaN for the first token of a stream.
        """
        ids = self._ids(ids, stream)
        begun = self.state.counters[stream].seen > 0
        nll = torch.empty(len(ids), dtype=torch.float32, device=self.state.device)
        logits = self.state.logits[stream]
        for i in range(len(ids)):
            token = ids[i : i + 1]
            nll[i] = torch.nn.functional.cross_entropy(logits[None], token)
            tokens = self.state.tokens.clone() if self.state.streams > 1 else token
            if self.state.streams > 1:
                tokens[stream] = token[0]
            self.advance(tokens, [stream])
        if not begun:
            nll[0] = float("nan")
        return nll

    # ---- generating ----

    def generate(self, ids: Ids | str, *, max_new_tokens: int, stream: int = 0, **more: Any) -> Generation:
        """Append a prompt to a stream and let it write; everything written is in the stream afterwards.

        Parameters
        ----------
        ids : Tensor (tokens,), sequence of int or str
            New tokens only; empty to go on with a stream that has begun. Text needs a tokenizer.
        max_new_tokens : int
        temperature, top_k, top_p, min_p, repetition_penalty
            See `Sampler`; the default is greedy.
        stop : str or sequence of str
            Texts that end the stream.
        stop_tokens : sequence of int or None
            Token ids that end it; default: the model's end-of-text tokens; () for none.
        callback : callable or None
            Called with (token, stream) after each token; a true answer ends the stream.
        streamer : BaseStreamer or None
            As in transformers' generate(): is given the prompt, then each token; `TextIteratorStreamer` and others
            make text of them as it comes (the stop string included).
        seed : int, default=0

        Raises
        ------
        ValueError
            If an option or the prompt is not accepted.
        """
        return self._generate({stream: ids}, max_new_tokens, **more)[stream]

    def generate_batch(self, prompts: Sequence[Ids | str], *, max_new_tokens: int, **more: Any) -> list[Generation]:
        """As `generate`, with prompt i in stream i; the streams are stepped together and end one by one."""
        if not 0 < len(prompts) <= self.state.streams:
            raise ValueError(f"{len(prompts)} prompts; accepted: 1 to {self.state.streams}, the engine's streams")
        return list(self._generate(dict(enumerate(prompts)), max_new_tokens, **more).values())

    def _generate(
        self,
        prompts: dict[int, Ids | str],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        callback: Callback | None = None,
        streamer: BaseStreamer | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> dict[int, Generation]:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} is not accepted; accepted: a whole number from 1")
        unknown = sorted(set(sampling) - set(Sampler.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; accepted: {', '.join(Sampler.__dataclass_fields__)}")
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"streamer= takes the text of one stream, and there are {len(prompts)} prompts")
        strings = [stop] if isinstance(stop, str) else list(stop)
        tokens = self._end_tokens() if stop_tokens is None else stop_tokens
        return generate(
            self,
            {s: self._prompt(ids, s) for s, ids in prompts.items()},
            max_new_tokens=max_new_tokens,
            sampler=Sampler(**sampling),
            stop=StopRule(tokens, strings, callback, self.tokenizer),
            seed=seed,
            streamer=streamer,
        )

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Decode for transformers: ``model.generate(**inputs, custom_generate=engine.custom_generate)``.

        Each row of the batch becomes a stream of its own, from stream 0 on; these streams start over. Logits processors
        and stopping criteria are those that generate() has made from its options, and the caller's own. Greedy output
        is that of generate() with a `StreamingCache` of the same policy; the last token is in the stream as well.

        Returns
        -------
        Tensor, (batch, tokens), int64, or GenerateDecoderOnlyOutput
            Prompt and new tokens, as generate() returns them.

        Raises
        ------
        ValueError
            Naming what the engine cannot do: beams, an assistant, padding, a cache, embeddings or positions of the
            caller's own, more rows than streams, another model. The streams are as they were then.
        """
        extra = compat.generate_arguments(inspect.currentframe().f_back, model)
        check_custom_generate(
            self, model, input_ids, generation_config, {"synced_gpus": synced_gpus, **model_kwargs, **extra}
        )
        streamer = streamer if streamer is not None else extra.get("streamer")
        return run_custom_generate(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer)

    # ---- keeping ----

    def snapshot(self, path: str | Path, *, stream: int = 0) -> None:
        """Write one stream to a safetensors file."""
        self._check_stream(stream)
        snapshots.save(path, self.state, stream, model_hash=self.model_hash)

    def restore(self, path: str | Path, *, stream: int = 0) -> None:
        """Replace one stream by what `snapshot` wrote; it goes on bit for bit.

        Raises
        ------
        ValueError
            If the file does not fit this engine: no snapshot, or another format, model, dtype, policy or positions.
        """
        self._check_stream(stream)
        snapshots.load(path, self.state, stream, model_hash=self.model_hash)

    def reset(self, *, stream: int | None = None) -> None:
        """Forget one stream, or all of them."""
        if stream is not None:
            self._check_stream(stream)
        self.state.clear(stream)

    def close(self) -> None:
        """Take the prefill hooks off the model. Happens by itself when the engine is collected."""
        self._cache.close()

    @property
    def last_steps(self) -> list[Step | None]:
        """What the policy did in each stream at the latest step; None for a stream that sat it out."""
        return self.state.last_steps

    @cached_property
    def model_hash(self) -> str:
        """Hash of the model's shape, dtype and weights."""
        return snapshots.fingerprint(self.model)

    def stats(self, *, stream: int = 0) -> dict[str, int]:
        """Counts of one stream: seen, kept, evicted tokens, prune events, rebases; bytes of all streams, weights."""
        self._check_stream(stream)
        c = self.state.counters[stream]
        return {
            "seen": c.seen,
            "kept": c.kept,
            "evicted": c.seen - c.kept,
            "events": c.events,
            "rebases": c.rebases,
            "bytes": self.state.bytes,
            "weight_bytes": self.weights.step_bytes,
        }

    # ---- checks ----

    def _check_stream(self, stream: int) -> None:
        if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < self.state.streams:
            raise ValueError(f"stream={stream!r} is not accepted; accepted: 0 to {self.state.streams - 1}")

    def _ids(self, ids: Ids, stream: int, *, empty: bool = False) -> torch.Tensor:
        """Token ids as (tokens,) int64 on the device, checked where that costs no waiting for the device."""
        self._check_stream(stream)
        on_host = not isinstance(ids, torch.Tensor) or ids.device.type == "cpu"
        if not isinstance(ids, torch.Tensor):
            ids = torch.tensor(ids, dtype=None if len(ids) else torch.int64)
        if ids.ndim != 1 or (not len(ids) and not empty) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids of shape {tuple(ids.shape)} and {ids.dtype}; accepted: (tokens,) whole numbers")
        vocab = self.weights.embedding.shape[0]
        if on_host and len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
            raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())}; accepted: 0 to {vocab - 1}")
        return ids.to(self.state.device, torch.int64)

    def _prompt(self, ids: Ids | str, stream: int) -> torch.Tensor:
        if isinstance(ids, str):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer; give the engine tokenizer=TOKENIZER, or ids")
            ids = self.tokenizer(ids)["input_ids"]
        ids = self._ids(ids, stream, empty=True)
        if not len(ids) and not self.state.counters[stream].seen:
            raise ValueError(f"stream {stream} has not begun and the prompt is empty; give at least one token")
        return ids

    def _end_tokens(self) -> list[int]:
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _checked_cache(
    model: PreTrainedModel, policy: EvictionPolicy | None, *, backend: str, streams: int, **options: Any
) -> PrefillCache:
    """The cache that prompts go through, empty, once everything that the engine asks for is found to be possible."""
    step = STEPS[backend]
    if isinstance(streams, bool) or not isinstance(streams, int) or streams < 1:
        raise ValueError(f"streams={streams!r} is not accepted; accepted: a whole number of at least 1")
    check_packable(model)
    cache = PrefillCache.for_model(model, policy=policy, **options)
    try:
        step.check(cache.spec, cache.policy, model.device)
        check_engine(model, cache.spec, cache.policy, streams, model.device)
    except ValueError:
        cache.close()
        raise
    return cache
