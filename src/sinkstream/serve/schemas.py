"""What requests may hold: the fields of OpenAI's API that are served, and those that change nothing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sinkstream.serve.json_values import check_value
from sinkstream.serve.tools import plain_calls

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A body whose unknown fields are refused by name, and so are texts that are no Unicode, and endless nesting.

    JSON can write half of a surrogate pair, and values in values without end.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def check_fields(cls, data: Any) -> Any:
        """Raise ValueError, naming the field, as `check_value`."""
        if isinstance(data, dict):
            for field, value in data.items():
                try:
                    check_value(value)
                except ValueError as error:
                    raise ValueError(f"{field} {error}") from None
        return data


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is a refusal."""

    error: ErrorDetail


class HealthBody(BaseModel):
    """Body of /health; `expected`, `serving` and `replicas` where servers share their sessions."""

    status: Literal["ok", "degraded", "failed"]
    version: str
    running: int
    waiting: int
    expected: int | None = None
    serving: int | None = None
    replicas: list[dict[str, Any]] | None = None


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(BaseModel):
    """A message; what else it holds is for the chat template."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message as templates take it; the same for all ways to write the same message."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        calls = plain_calls(self.tool_calls) if self.tool_calls else None
        more = {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": content} | {k: v for k, v in more.items() if v}


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Sampling(Strict):
    """How tokens are drawn and when a reply ends; shared by chat and completions."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    session_id: str | None = None
    # given by clients, and without influence on a reply
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    # given by clients, and without influence on a reply
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: str | list[Token] | list[str]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None


class InputItem(BaseModel):
    """An item of a response's input: a message, a call of a tool, or what a call gave."""

    model_config = ConfigDict(extra="ignore")
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[TextPart] | None = None


class ResponseRequest(Strict):
    """Body of /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    store: bool | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    # given by clients, and without influence on a reply
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class SessionRequest(Strict):
    """Body of POST /v1/sessions."""

    messages: list[ChatMessage] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class AppendRequest(Strict):
    """Body of POST /v1/sessions/{id}/append."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class PinRequest(Strict):
    """Body of POST /v1/sessions/{id}/pin."""

    text: Annotated[str, StringConstraints(min_length=1)]


class NameRequest(Strict):
    """Body of the requests that save and load a session."""

    name: str


class TokenizeRequest(Strict):
    """Body of /tokenize: a text or messages."""

    model: str | None = None
    text: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = False
