"""`Engine`: a model that decodes for ever in static memory, under any eviction policy.

engine = Engine(model, cap=2052, compress_every=64, backend="ring")
engine.prefill(prompt_ids)
out = engine.generate([], max_new_tokens=1000)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sinkstream import compat
from sinkstream.engine.custom_generate import check as check_custom_generate
from sinkstream.engine.custom_generate import run as run_custom_generate
from sinkstream.engine.decoder import StreamDecoder, checked_cache
from sinkstream.engine.generation import Generation, check_question, ending, feed, generate
from sinkstream.engine.inputs import Ids, encoded
from sinkstream.engine.memory import check_weights
from sinkstream.models import check_dtype, load_model, resolve_device, resolve_dtype, weight_bytes
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.options import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation import GenerateDecoderOnlyOutput


class Engine(StreamDecoder):
    """A `StreamDecoder` that also generates: by itself, or for transformers' generate().

    Parameters, attributes and errors are those of `StreamDecoder`.
    """

    @staticmethod
    def check(
        model: PreTrainedModel,
        policy: EvictionPolicy | None = None,
        *,
        backend: str = "ring",
        streams: int = 1,
        **options: Any,
    ) -> None:
        """Raise the ValueError that the constructor would raise for these arguments; nothing is packed or allocated."""
        checked_cache(model, policy, backend=backend, streams=streams, **options).close()

    @classmethod
    def from_pretrained(
        cls,
        spec: str,
        policy: EvictionPolicy | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **more: Any,
    ) -> Engine:
        """Load a model and make an engine of it.

        Parameters
        ----------
        spec : str
            As `sinkstream.models.load_model`: "builtin", "random:SHAPE", a directory, a .gguf file or a hub id.
        dtype : torch.dtype or None
            Default: float16 on a GPU, float32 on a CPU, as for every command.
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
        device = resolve_device(None if device is None else str(device))
        dtype = dtype or resolve_dtype(None, device)
        check_dtype(dtype)
        check_weights(spec, weight_bytes(spec, dtype), device)
        loaded = load_model(spec, dtype=dtype, device=device)
        return cls(loaded.model, policy, **{"tokenizer": loaded.tokenizer} | more)

    def generate(self, ids: Ids | str, *, max_new_tokens: int, stream: int = 0, **more: Any) -> Generation:
        """Append a prompt to a stream and generate; the stream then holds the prompt and every generated token.

        Parameters
        ----------
        ids : Tensor (tokens,), sequence of int or str
            New tokens only; empty to continue a stream that has begun. Text needs a tokenizer.
        max_new_tokens : int
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias
            See `Sampler`; the default is greedy.
        stop : str or sequence of str
            Texts that end the stream.
        stop_tokens : sequence of int or None
            Token ids that end it; default: the model's end-of-text tokens; () for none.
        callback : callable or None
            Called with (token, stream) after each token; a true return value ends the stream.
        streamer : BaseStreamer or None
            As in transformers' generate(): receives the prompt, then each token; `TextIteratorStreamer` and others
            decode them as they arrive (the stop string included).
        seed : int, default=0
            Seed of the draws. A drawn token is a function of the seed, its position in the stream and the logits.
        log_probs : int or None
            Also return the log-probability of each token and of this many likeliest ones, at most 20; 0: of the token.
        recall_ask : int, default=0
            Tokens at the end of the prompt that are a question for recall, as in `ask`.

        Raises
        ------
        ValueError
            If an option or the prompt is not accepted.
        """
        return generate(self, {stream: ids}, max_new_tokens, **more)[stream]

    def ask(self, ids: Ids | str, *, stream: int = 0, replay: bool = True) -> torch.Tensor:
        """Feed a question at the end of a turn; recall chooses by the question alone, without a gate.

        Parameters
        ----------
        ids : Tensor (tokens,), sequence of int or str
            New tokens only; at least one. Text needs a tokenizer.
        replay : bool
            Whether the question itself sees the tokens that come back. If not, only later tokens see them.

        Returns
        -------
        Tensor, (vocab,), float32
            Logits after the question; ``generate([], …)`` continues from there.

        Raises
        ------
        ValueError
            If the engine has no recall, or the question is empty or not accepted.
        """
        question = self._ids(encoded(ids, self.tokenizer), stream)
        check_question(self, len(question), len(question))
        if replay or self.recall is None:
            return feed(self, question, stream, len(question))
        logits = self.prefill(question, stream=stream, checked=True)
        self.recall.memory.ask(question.tolist())
        return logits

    def generate_batch(self, prompts: Sequence[Ids | str], *, max_new_tokens: int, **more: Any) -> list[Generation]:
        """As `generate`, with prompt i in stream i; the streams are stepped together and end one by one."""
        if not 0 < len(prompts) <= self.state.streams:
            raise ValueError(f"{len(prompts)} prompts; accepted: 1 to {self.state.streams}, the engine's streams")
        return list(generate(self, dict(enumerate(prompts)), max_new_tokens, **more).values())

    def __call__(self, *args: Any, **options: Any) -> NoReturn:
        """Raise TypeError: `generate(custom_generate=engine)` would pass over an object that cannot be called."""
        raise TypeError("an engine is no function; accepted: custom_generate=engine.custom_generate, engine.generate")

    def __copy__(self) -> NoReturn:
        """Refused: two engines would write to the same buffers."""
        raise _not_copied()

    def __deepcopy__(self, memo: dict) -> NoReturn:
        """Refused: captured graphs write to the buffers of this engine."""
        raise _not_copied()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: a pickle would hold the model."""
        raise _not_copied()

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        recall_ask: int = 0,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Decode for transformers: ``model.generate(**inputs, custom_generate=engine.custom_generate)``.

        Row i of the batch, without its pads, goes to stream i, which is reset first. Logits processors and stopping
        criteria are those that generate() has made from its options, and the caller's own. Greedy output is that of
        generate() with a `StreamingCache` of the same policy; the last token is in the stream as well. With recall,
        ``model.generate(…, recall_ask=TOKENS)`` says how many tokens at the end of the prompt are a question, as in
        `ask`.

        Returns
        -------
        Tensor, (batch, tokens), int64, or GenerateDecoderOnlyOutput
            Prompt and new tokens, as generate() returns them.

        Raises
        ------
        ValueError
            Naming what the engine cannot do: beams, an assistant, a cache, embeddings or positions of the
            caller's own, more rows than streams, another model. The streams are unchanged then.
        """
        frame = inspect.currentframe()
        extra = compat.generate_arguments(frame.f_back if frame else None, model)
        given = {"synced_gpus": synced_gpus, **model_kwargs, **extra}
        streamer = streamer if streamer is not None else extra.get("streamer")
        recall_ask = plain(recall_ask)
        with ending(streamer):
            check_custom_generate(self, model, input_ids, generation_config, given)
            mask = model_kwargs.get("attention_mask")
            check_question(self, recall_ask, input_ids.shape[1] if mask is None else int(mask.count_nonzero(1).min()))
            return run_custom_generate(
                self, input_ids, mask, logits_processor, stopping_criteria, generation_config, streamer, recall_ask
            )


def _not_copied() -> ValueError:
    return ValueError(
        "an engine cannot be copied or pickled; accepted: engine.snapshot(path, stream=…) and another engine's"
        " restore(path), or dump() and undump(data)"
    )
