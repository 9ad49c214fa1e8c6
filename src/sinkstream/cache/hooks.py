"""The hooks that streaming caches put on the model that they were made for.

A model has one pair of hooks, however many caches live: put on with the first cache and taken off with the last. A hook
looks for a streaming cache among the arguments of a call and acts only on a cache that was made for this very model.
The hooks are plain functions of this module, so that a model with hooks can be copied and pickled.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import Cache

from sinkstream import compat
from sinkstream.cache.attention import SINKSTREAM_SDPA, release_attention, running, switch_attention
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.forward import refuse_gradients
from sinkstream.cache.hooked import HOOKED, Hooked, hooked_of
from sinkstream.cache.padding import call_tokens, check_embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HookedCache(Cache):
    """What the hooks ask of a cache.

    Attributes
    ----------
    spec : ModelSpec
    model : weak reference or None
        To the model the cache was made for; None before `attach` and after it is detached.
    checked_frequencies : tuple of Tensor
        The rotary frequencies of the model that were last compared with those of `spec`.
    chunk_user : object
        In whose name the model's attention is switched for one chunk.
    checked_weights : tuple or None
        The decoder's weights, as `_weights_of`, that the stream began with; None: whichever come first.
    compiled : bool
        Whether attention writes the entries, so that no length of the cache is in a compiled graph.
    ended : tuple of bool
        Rows of the generate() under way that had ended at its latest step; empty: none.
    """

    spec: ModelSpec
    chunk_user: object
    model: weakref.ref[nn.Module] | None = None
    checked_frequencies: tuple[torch.Tensor, ...] = ()
    checked_weights: tuple | None = None
    compiled = False
    ended: tuple[bool, ...] = ()

    @property
    @abstractmethod
    def seen_tokens(self) -> int:
        """Tokens appended since the beginning of the stream; of the longest row where rows differ."""

    @property
    @abstractmethod
    def row_seen(self) -> list[int]:
        """Tokens that each row has seen, pads left out; empty before the first."""

    @property
    @abstractmethod
    def needs_logits(self) -> bool:
        """Whether the logits of every token must be shown to `commit_forward`."""

    @abstractmethod
    def max_chunk_tokens(self) -> int:
        """The most tokens that the next forward may append."""

    @abstractmethod
    def prefill_all_but_last_chunk(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Feed ``(batch, tokens)`` new token ids of any number but for the last chunk, which is returned.

        The mask, ``(batch, tokens)`` if given, has 0 for pads.
        """

    @abstractmethod
    def begin_prompt(
        self, input_ids: torch.Tensor, new: int | None, given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int | None, dict[str, Any]]:
        """What the first call of a generate() is given, of a whole conversation ``(batch, tokens)``. Raises ValueError.

        Ids, how many of the last are new (None: all), and other arguments instead of `given` ones.
        """

    @abstractmethod
    def next_step(self, loop: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments for the call of a later step, given the variables of the loop of generate() where it is known."""

    @abstractmethod
    def enter_model(self) -> None:
        """The causal language model is called; its decoder will be."""

    @abstractmethod
    def begin_forward(
        self, batch: int, tokens: int, input_ids: torch.Tensor | None, device: torch.device, own: list[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor | None] | None]:
        """The decoder is called: returns (position_ids, attention mask, masks by layer type or None) of new tokens.

        `own`: how many of them are tokens of each row, behind pads; None: all.
        """

    @abstractmethod
    def end_decoder(self) -> None:
        """The decoder has returned; the forward ends here unless the causal language model was called."""

    @abstractmethod
    def commit_forward(self, logits: torch.Tensor) -> None:
        """The causal language model has returned."""

    @abstractmethod
    def abort_forward(self) -> None:
        """The forward raised: its tokens never came."""


_lock = threading.RLock()  # re-entrant: a cache may be collected, and detached, while another one is attached


def attach(cache: HookedCache, model: PreTrainedModel, *, attention: bool) -> Callable[[], None]:
    """Put the hooks on `model` unless they are there, and let them act on `cache`.

    Parameters
    ----------
    attention : bool
        Whether the model's attention must be switched to `sinkstream.cache.attention`.

    Returns
    -------
    callable
        Detaches the cache, and takes the hooks off with the last one; safe to call more than once.

    Raises
    ------
    ValueError
        If logits are needed and this model cannot show them, the attention to be switched is not sdpa, or the model's
        arguments are not those of a tested release of transformers.
    """
    if attention and cache.spec.attention != "sdpa":
        raise ValueError(
            "attention scorers, recall by heads and compiled models need attn_implementation='sdpa';"
            f" the model uses {cache.spec.attention!r}"
        )
    decoder = cache.spec.decoder
    if cache.needs_logits and model is decoder:
        raise ValueError(
            f"this policy reads the logits; {type(model).__name__} has none, give the causal language model"
        )
    compat.warn_if_untested()
    compat.check_forward(decoder)
    if model is not decoder:
        compat.check_forward(model, needed=("logits_to_keep",) if cache.needs_logits else ())
    modules: list[nn.Module] = [decoder] if model is decoder else [decoder, model]
    user = object()
    with _lock:
        for module in modules:
            _shed(module)
            hooked = hooked_of(module) or Hooked()
            setattr(module, HOOKED, hooked)
            hooked.users.add(user)
            if cache.compiled and not hooked.untraced:  # a compiler must not look into the hooks of other caches either
                hooked.untraced = True
                hooked.take_off()
            if not hooked.handles:
                hooked.handles = _register(module, is_decoder=module is decoder, untraced=hooked.untraced)
                hooked.weights = _weights_of(module)
                _watch_prompts(module)
        if attention:
            switch_attention(decoder, user)
    cache.model = weakref.ref(model)
    kept = [weakref.ref(module) for module in modules]
    close = weakref.finalize(cache, _detach, kept, user, cache.chunk_user)
    close.atexit = False
    return close


def _register(module: nn.Module, *, is_decoder: bool, untraced: bool) -> list[Any]:
    before, after = (_before_decoder, _after_decoder) if is_decoder else (_before_model, _after_model)
    if untraced:
        before, after = (_untraced(hook) for hook in (before, after))
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    return [*handles, module.register_load_state_dict_post_hook(_after_load)] if is_decoder else handles


def _weights_of(module: nn.Module) -> tuple:
    """Address and version of every parameter: others after a load, the same again after the first ones come back."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in module.parameters())


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    hooked = hooked_of(module)
    if hooked is not None:
        hooked.weights = _weights_of(module)


def _shed(module: Any) -> None:
    """Take off what a copy of a hooked model has brought along: hooks and a switched attention of no cache of it."""
    if hooked_of(module) is not None:
        return
    with _lock:
        ours = (_before_decoder, _after_decoder, _before_model, _after_model)
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if hook in ours]:
                for flags in ("", "_with_kwargs", "_always_called"):
                    getattr(module, name + flags, {}).pop(key, None)
        _unwatch_prompts(module)
        if compat.attention_implementation(module.config) == SINKSTREAM_SDPA:
            module.set_attn_implementation("sdpa")


def _detach(modules: list[weakref.ref[nn.Module]], user: object, chunk_user: object) -> None:
    decoder: Any = modules[0]()
    with _lock:
        for module in (ref() for ref in modules):
            hooked = hooked_of(module)
            if module is None or hooked is None:
                continue
            hooked.users.discard(user)
            if not hooked.users:
                hooked.take_off()
                delattr(module, HOOKED)
                _unwatch_prompts(module)
        if decoder is not None:
            release_attention(decoder, user)
            release_attention(decoder, chunk_user)


_PREPARE = "prepare_inputs_for_generation"


def _watch_prompts(module: nn.Module) -> None:
    """Let `_prepare` stand in the place of the module's method of the same name, if its class has one.

    It is the one place where generate() shows the whole conversation; the forward gets what lies past the cache.
    """
    if hasattr(type(module), _PREPARE) and _PREPARE not in vars(module):
        setattr(module, _PREPARE, types.MethodType(_prepare, module))


def _unwatch_prompts(module: nn.Module) -> None:
    ours = (_prepare, getattr(type(module), _PREPARE, None))  # a pickle binds the latter
    if _PREPARE in vars(module) and getattr(vars(module)[_PREPARE], "__func__", None) in ours:
        delattr(module, _PREPARE)


def _prepare(self, input_ids, next_sequence_length=None, *args, inputs_embeds=None, **kwargs):
    """As the method of the class, but the cache is given what it has not seen.

    A conversation that is passed again must be the one that the cache has seen; pads are taken out of it, wherever they
    are. In the steps that follow, rows that have ended get pads.
    """
    cache = compat.find_argument(HookedCache, args, kwargs)
    if cache is not None and kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False and a streaming cache exclude each other in generate(), which would feed the whole text"
            " for every token; accepted: use_cache=True, or no cache"
        )
    if cache is not None and input_ids is not None:
        if not kwargs.get("is_first_iteration"):
            kwargs |= cache.next_step(compat.sampling_loop(sys._getframe(1)))
        elif inputs_embeds is not None:
            check_embedded(inputs_embeds, cache.seen_tokens)
            cache.ended = ()
        else:
            input_ids, next_sequence_length, more = cache.begin_prompt(input_ids, next_sequence_length, kwargs)
            kwargs |= more
    more = kwargs if inputs_embeds is None else kwargs | {"inputs_embeds": inputs_embeds}
    of_all = cache is not None and cache.spec.drops_long_caches  # the method of the class would drop this very cache
    prepare = getattr(transformers.GenerationMixin if of_all else type(self), _PREPARE)
    return prepare(self, input_ids, *args, next_sequence_length=next_sequence_length, **more)


_prepare.__name__ = _PREPARE  # generate() reads the signature of the method, and pickle its name


def _decoders_cache(decoder: nn.Module, args: tuple, kwargs: dict[str, Any] | None) -> HookedCache | None:
    """The cache of a call of the decoder; None for a call with another cache or none.

    A call that begins while another thread takes the hooks off has its keyword arguments withheld: it is of no cache,
    since a cache that lives keeps the hooks on.
    """
    cache = None if kwargs is None else compat.find_argument(HookedCache, args, kwargs)
    return cache if cache is not None and cache.model is not None and cache.spec.decoder is decoder else None


def _models_cache(model: nn.Module, args: tuple, kwargs: dict[str, Any] | None) -> HookedCache | None:
    """The cache of a call of the causal language model that the cache was made for."""
    cache = None if kwargs is None else compat.find_argument(HookedCache, args, kwargs)
    return cache if cache is not None and cache.model is not None and cache.model() is model else None


def _before_decoder(module, args, kwargs=None):
    running.set(None)  # an interrupt may have ended the forward before without a word
    _shed(module)
    cache = _decoders_cache(module, args, kwargs)
    if cache is None:
        return None
    named = compat.named_arguments(module, args, kwargs, cache)
    ids = named.get("input_ids")
    given = ids if ids is not None else named.get("inputs_embeds")
    if given is None:
        return None  # the decoder itself refuses that
    batch, tokens = given.shape[:2]
    _check_checkpointing(module)
    _check_attention(cache.spec.attention, compat.attention_implementation(module.config))
    _check_frequencies(cache, module.rotary_emb)
    _check_weights(cache, module)
    own = None
    if named.get("attention_mask") is not None or named.get("position_ids") is not None:
        own = call_tokens(named, cache.row_seen or [0] * batch, batch, tokens)
    positions, mask = cache.begin_forward(batch, tokens, ids, given.device, own)
    named["position_ids"], named["attention_mask"] = positions, mask
    return (), named


def _after_decoder(module, args, kwargs=None, output=None):
    cache = _decoders_cache(module, args, kwargs)
    if cache is None:
        return
    if output is None:
        cache.abort_forward()
    else:
        refuse_gradients(output)
        cache.end_decoder()


def _before_model(module, args, kwargs=None):
    _shed(module)
    cache = _models_cache(module, args, kwargs)
    if cache is None:
        return None
    cache.abort_forward()
    named = _prefill_all_but_last_chunk(cache, module, compat.named_arguments(module, args, kwargs, cache))
    cache.enter_model()
    return (), named | {"logits_to_keep": 0} if cache.needs_logits else named


def _prefill_all_but_last_chunk(cache: HookedCache, model: PreTrainedModel, named: dict[str, Any]) -> dict[str, Any]:
    """Where only the last logits are asked for (as generate() asks of a prompt), feed a long prompt chunk by chunk.

    Returns the call that is left, that of the last chunk; the same call if the tokens fit one call as they are.
    """
    ids = named.get("input_ids")
    if ids is None or ids.shape[1] == 1 or named.get("logits_to_keep") != 1:
        return named
    if ids.shape[1] <= cache.max_chunk_tokens():
        return named
    for name in ("output_hidden_states", "output_attentions"):
        if named.get(name):
            raise ValueError(
                f"{name} of {ids.shape[1]} tokens, which are fed in chunks: those of the last chunk alone would come;"
                f" accepted: at most {cache.max_chunk_tokens()} tokens now, or all but the last token fed before, with"
                " cache.prefill(model, ids[:, :-1])"
            )
    own = call_tokens(named, cache.row_seen or [0] * len(ids), *ids.shape)
    mask = None if own is None else named["attention_mask"][:, -ids.shape[1] :]
    last = cache.prefill_all_but_last_chunk(model, ids, mask)
    left = None if mask is None else mask[:, -last.shape[1] :]
    return named | {"attention_mask": left, "position_ids": None, "input_ids": last}


def _after_model(module, args, kwargs=None, output=None):
    cache = _models_cache(module, args, kwargs)
    if cache is None:
        return
    if output is None:  # the head raised, or something after it: then the tokens never came
        cache.abort_forward()
    else:
        cache.commit_forward(output.logits if hasattr(output, "logits") else output[0])


@functools.cache
def _untraced(hook: Callable) -> Callable:
    """As `hook`, but cutting a compiled graph, between two modules, instead of being traced into it."""
    called = torch.compiler.disable(hook)  # which imports the compiler, for seconds: not before a model is compiled
    called.__name__ = called.__qualname__ = f"{hook.__name__}_untraced"  # by which pickle finds it
    return called


def __getattr__(name: str) -> Callable:
    """An untraced hook, for pickle."""
    for hook in (_before_decoder, _after_decoder, _before_model, _after_model):
        if name == f"{hook.__name__}_untraced":
            return _untraced(hook)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_checkpointing(decoder: nn.Module) -> None:
    """Refuse layers that would be given no cache, but the cache's mask."""
    if not (decoder.training and torch.is_grad_enabled()):
        return
    if any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.modules() if layer is not decoder):
        raise ValueError(
            "layers with gradient checkpointing pass no cache on in training mode; accepted: model.eval()"
            " or model.gradient_checkpointing_disable()"
        )


def _check_attention(made_for: str, now: str | None) -> None:
    """Refuse an attention implementation that was switched after the cache was made: masks are made for it."""
    if now not in (made_for, SINKSTREAM_SDPA if made_for == "sdpa" else made_for):
        raise ValueError(
            f"the model's attn_implementation was changed from {made_for!r} to {now!r} after the cache was made;"
            " change it back, or make the cache again"
        )


def _check_frequencies(cache: HookedCache, rotary: nn.Module) -> None:
    """Refuse rotary frequencies that are not those the cache rotates by; compared whenever the module has new ones."""
    known = cache.spec.frequencies
    now = [getattr(rotary, name) for name in known]
    if list(map(id, now)) == list(map(id, cache.checked_frequencies)) or any(one.is_meta for one in now):
        return
    if not all(torch.equal(a.detach().to("cpu", torch.float64), b) for a, b in zip(now, known.values())):
        raise ValueError(
            "the model's rotary frequencies changed after the cache was made (a model that was cast to half precision"
            " has rounded ones, also when it is cast back); load the model again, or make the cache again"
        )
    cache.checked_frequencies = tuple(now)


def _check_weights(cache: HookedCache, decoder: nn.Module) -> None:
    """Refuse weights that ``load_state_dict()`` has put into a model under a stream; compared after a load only."""
    hooked = hooked_of(decoder)
    if hooked is None or cache.checked_weights is hooked.weights:
        return
    if cache.seen_tokens and cache.checked_weights not in (None, hooked.weights):
        raise ValueError(
            "weights were loaded into the model (load_state_dict) while the cache held keys and values of the ones"
            " before; cache.reset() begins a new stream, or load the old weights again"
        )
    cache.checked_weights = hooked.weights
