"""From a request's fields to how a reply is written."""

import secrets
from typing import Any

from sinkstream.engine.sampling import Sampler
from sinkstream.serve.errors import invalid
from sinkstream.serve.reply import ReplyOptions
from sinkstream.serve.schemas import ResponseRequest, Sampling
from sinkstream.serve.settings import ServeSettings

DIGITS = 18  # of a token id, at most: Python refuses to read very long numbers
API_TEMPERATURE = 1.0  # what OpenAI's API draws with where a request does not say


def sampler_of(fields: dict[str, Any], vocab: int) -> Sampler:
    """The sampler of a request; options that change nothing at temperature 0 are left out there. Raises APIError."""
    temperature = API_TEMPERATURE if fields.get("temperature") is None else fields["temperature"]
    given: dict[str, Any] = {"temperature": float(temperature)}
    if temperature > 0:
        top_k, top_p, min_p = (fields.get(name) for name in ("top_k", "top_p", "min_p"))
        given |= {"top_k": top_k} if top_k is not None and top_k > 0 else {}
        given |= {"top_p": max(top_p, 1e-9)} if top_p is not None and top_p < 1 else {}
        given |= {"min_p": min_p} if min_p else {}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if fields.get(name) is not None:
            given[name] = float(fields[name])
    if fields.get("logit_bias"):
        given["logit_bias"] = _bias(fields["logit_bias"], vocab)
    try:
        return Sampler(**given)
    except ValueError as error:
        raise invalid(str(error), str(error).split("=")[0]) from None


def reply_options(request: Sampling, settings: ServeSettings, vocab: int, logprobs: int | None) -> ReplyOptions:
    """How the reply to a chat or completion is written."""
    fields = request.model_dump()
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    most = fields.get("max_completion_tokens") or request.max_tokens or settings.default_max_tokens
    return ReplyOptions(
        sampler=sampler_of(fields, vocab),
        max_tokens=most,
        stop=tuple(stop),
        seed=_seed(request.seed),
        choices=request.n or 1,
        logprobs=logprobs,
        ignore_end=request.ignore_eos,
    )


def response_options(request: ResponseRequest, settings: ServeSettings, vocab: int) -> ReplyOptions:
    """How a response is written."""
    fields = {"temperature": request.temperature, "top_p": request.top_p}
    most = request.max_output_tokens or settings.default_max_tokens
    return ReplyOptions(sampler=sampler_of(fields, vocab), max_tokens=most, seed=_seed(None))


def _seed(given: int | None) -> int:
    """A seed that leaves room for one of every choice."""
    return secrets.randbits(62) if given is None else given % 2**62


def _bias(given: dict[str, float], vocab: int) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= DIGITS) or int(token) >= vocab:
            raise invalid(f"logit_bias for {token!r} is not accepted; accepted: token ids below {vocab}", "logit_bias")
        bias[int(token)] = float(value)
    return bias
