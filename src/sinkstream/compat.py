"""What differs between the releases of transformers, and what sinkstream reads of their insides: all of it is here.

===================  ==================================================  =========================================
release              what it does                                        answered by
===================  ==================================================  =========================================
5.24 and newer       a model's argument ``past_key_values`` is called    `cache_argument`, `with_cache`,
                     ``cache``, in ``generate()`` too                    `named_arguments`, `find_argument`
5.17 and newer       ``generate()`` hands a callable neither the         `generate_arguments`
                     streamer nor the assistant
5.17 and newer       which rows have ended is known to the decoding      `sampling_loop`, `ended_rows`
                     loop alone
5.17 and newer       whether a cache came from the caller, the padding   `is_callers_cache`, `pad_token`,
                     token and the attention in use are private names    `attention_implementation`
===================  ==================================================  =========================================

A new release is taken in by raising `NEWEST_TESTED` after `make test-newest` has passed with it.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig

OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"
CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument: since 5.24, before 5.24
_CACHE_NAME = CACHE_NAMES[Version(transformers.__version__).release[:2] < (5, 24)]  # of the installed release
OWNED_BY_THE_CACHE = ("attention_mask", "position_ids")  # a streaming cache gives them itself
NOT_PASSED = ("streamer", "assistant_model", "negative_prompt_ids", "synced_gpus")


@functools.cache
def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warn once a process about a transformers release newer than every tested one; patch releases count as tested."""
    if Version(version).release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"transformers {version} is newer than {NEWEST_TESTED}, the newest release that this version of sinkstream"
            " was tested with; what has changed by a name is refused, but compare results with the tested release",
            UserWarning,
            stacklevel=3,
        )


@functools.cache
def _parameters(forward: Callable) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward, without ``self`` and what ``*`` and ``**`` gather."""
    gathered = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(n for n, p in inspect.signature(forward).parameters.items() if p.kind not in gathered)[1:]


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that the class of a module declares for ``forward``, in order."""
    return _parameters(type(module).forward)


@functools.cache
def _cache_argument(forward: Callable) -> str:
    declared = _parameters(forward)
    return next((name for name in CACHE_NAMES if name in declared), _CACHE_NAME)


def cache_argument(module: nn.Module) -> str:
    """The name under which a module takes its KV cache.

    A wrapper that passes all of its arguments on declares no name; it gets the one of the installed release.
    """
    return _cache_argument(type(module).forward)


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """A cache as the keyword argument of a call of `module`."""
    return {cache_argument(module): cache}


def find_argument(kind: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first argument of a call that is an instance of `kind`, whatever it is called; None if there is none."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, kind):
            return value
    return None


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """All arguments of a call of `module` by name, and the cache under the name of the installed release.

    Raises
    ------
    TypeError
        If there are too many positional arguments, or one of them is also given by name.
    """
    if args:
        names = parameters(module)
        twice = sorted(set(names[: len(args)]) & kwargs.keys())
        if len(args) > len(names) or twice:
            what = f"multiple values for argument {twice[0]!r}" if twice else f"{len(args)} positional arguments"
            raise TypeError(f"{type(module).__name__}.forward() got {what}; accepted: {', '.join(names)}")
        kwargs = dict(zip(names, args)) | kwargs
    named = {n: v for n, v in kwargs.items() if v is not cache}
    for name in CACHE_NAMES:
        if named.get(name) is None:
            named.pop(name, None)
    named[cache_argument(module)] = cache
    return named


def check_forward(module: nn.Module, *, needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError if a model of the installed release lacks an argument that a streaming cache sets by name.

    A model gathers names that it does not know and says nothing: without this check a renamed argument would be
    passed over, and every position would be wrong.
    """
    declared = parameters(module)
    missing = [n for n in (*OWNED_BY_THE_CACHE, *needed) if n not in declared]
    if not set(CACHE_NAMES) & set(declared):
        missing.append(" or ".join(CACHE_NAMES))
    if missing:
        raise ValueError(
            f"{type(module).__name__} of transformers {transformers.__version__} takes no argument named"
            f" {', '.join(missing)}; accepted: transformers {OLDEST_TESTED} to {NEWEST_TESTED}"
        )


def generate_arguments(frame: types.FrameType | None, model: nn.Module) -> dict[str, Any]:
    """Arguments of generate() that it does not pass to a callable, read from the frame where they stand.

    A streamer that is passed over would never end, and its reader would wait for ever.

    Parameters
    ----------
    frame : frame or None
        Of the caller of the callable; anything but generate() gives no arguments.
    """
    if frame is None or frame.f_code.co_name != "generate" or frame.f_locals.get("self") is not model:
        return {}
    return {name: frame.f_locals[name] for name in NOT_PASSED if frame.f_locals.get(name) is not None}


def sampling_loop(frame: types.FrameType | None) -> Mapping[str, Any] | None:
    """Variables of the decoding loop of generate() that has called, wrappers between them; None if none has."""
    for _ in range(6):
        if frame is None or frame.f_code.co_name == "_prefill":  # a prompt in pieces: before 5.23 called like a step
            return None
        if frame.f_code.co_name == "_sample" and "unfinished_sequences" in frame.f_code.co_varnames:
            return frame.f_locals
        frame = frame.f_back
    return None


def prefill_pieces(frame: types.FrameType | None) -> int | None:
    """The ``prefill_chunk_size`` of the generate() that feeds its prompt now; None without one.

    Parameters
    ----------
    frame : frame or None
        Of what generate() has called, or of its callees.
    """
    for _ in range(6):
        if frame is None or frame.f_code.co_name == "_prefill":
            break
        frame = frame.f_back
    return None if frame is None else getattr(frame.f_locals.get("generation_config"), "prefill_chunk_size", None)


def ended_rows(loop: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which rows have ended in a decoding loop: it fills them up with pads. Empty for one row, or if none can end."""
    unfinished = loop["unfinished_sequences"]
    if len(unfinished) == 1 or not loop.get("has_eos_stopping_criteria"):
        return ()
    return tuple(left == 0 for left in unfinished.tolist())


def is_callers_cache(cache: Any) -> bool:
    """Whether a cache among the arguments of a decoding loop was given to generate() by its caller."""
    return isinstance(cache, Cache) and getattr(cache, "_is_user_defined", False)


def pad_token(config: GenerationConfig) -> torch.Tensor | None:
    """The padding token that generate() has worked out, on its device."""
    return config._pad_token_tensor


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a model uses now."""
    return config._attn_implementation
