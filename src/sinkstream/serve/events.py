"""What a request hears while it is served."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sinkstream.serve.errors import APIError
from sinkstream.serve.token_texts import TokenText


@dataclass(frozen=True)
class TokenLogprob:
    """One token and the likeliest ones in its place, with log probabilities in nats, the model's own.

    Attributes
    ----------
    offset : int
        Characters of the reply before the token.
    """

    token: TokenText
    logprob: float
    top: tuple[tuple[TokenText, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Started:
    """The request has its session, and is served from now on."""

    session: str


@dataclass(frozen=True)
class TextPiece:
    """New text of one choice, with the tokens whose text is complete with it, if they were asked for."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Context:
    """What the session's stream holds now; `recalled`: turns that were read again for this request."""

    session: str
    sent: int
    reused: int
    evicted: int
    evicted_turns: int
    pinned: int
    kept: int
    cap: int
    first_eviction: bool = False
    recalled: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Ended:
    """One choice is complete: "stop" or "length"."""

    index: int
    reason: str


@dataclass(frozen=True)
class Done:
    """The request is complete."""

    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    context: Context
    texts: dict[int, str] = field(default_factory=dict)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, and the context."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused_tokens},
            "context": vars(self.context),
        }


@dataclass(frozen=True)
class Failed:
    """The request ends with an error."""

    error: APIError


Event = Started | TextPiece | Context | Ended | Done | Failed
Emit = Callable[[Event], None]
