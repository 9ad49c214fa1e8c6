"""Prompt records on disk: how long prompts of several lengths take, one JSON file a model and policy."""

from dataclasses import dataclass
from typing import Any

from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import REQUIRED

#: Required keys, as in `schema.REQUIRED`. Milliseconds, TFLOP/s of 1e12, MB of 2**20 bytes.
PROMPT_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(
        (
            *("dtype", "device", "tf32", "seed", "cap", "backend", "lengths", "append_tokens", "repeats", "text"),
            *("text_sha256", "forward", "generate", "floor"),
        )
    ),
    "ceiling": dict.fromkeys(("tflops", "size", "dtype")),
    "prompts": None,
    "append": dict.fromkeys(("tokens", "ms", "step_ms", "over_step")),
    "memory": dict.fromkeys(("held_mb", "peak_mb")),
}

#: Milliseconds of each prompt; what the names mean is in `protocol`. None under ``drop_in``: it was left out.
PROMPT_TIMES = ("forward", "dynamic", "drop_in", "engine")


@dataclass(frozen=True)
class PromptRecord(StatusRecord):
    """Prompts of one model under one policy: the fields of its JSON file (see `PROMPT_REQUIRED`)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.prompt/1", "prompt", PROMPT_REQUIRED, ("complete",)

    session: str
    policy: dict[str, Any]
    ceiling: dict[str, Any]
    # one a length: ``tokens``, ``flops``, ``floor_ms``, and ``<name>_ms`` of every name in `PROMPT_TIMES`
    prompts: list[dict[str, Any]]
    append: dict[str, Any]
    memory: dict[str, Any]

    @property
    def hardware(self) -> str:
        """The GPU, or "CPU" and which."""
        gpu = self.environment["gpu"]["name"]
        return gpu if self.protocol["device"] == "cuda" else f"CPU ({self.environment['cpu']['model']})"

    @classmethod
    def check_own(cls, content, where: str) -> None:
        names = {"tokens", "flops", "floor_ms", *(f"{name}_ms" for name in PROMPT_TIMES)}
        for prompt in content["prompts"]:
            if missing := sorted(names - prompt.keys()):
                raise ValueError(f"{where}: field 'prompts' lacks {missing[0]!r}")

    def over(self, name: str, base: str, tokens: int) -> float | None:
        """Ratio of two times of the prompt of that many tokens; None if it was not timed."""
        found = next((prompt for prompt in self.prompts if prompt["tokens"] == tokens), None)
        if found is None or found[f"{name}_ms"] is None or found[f"{base}_ms"] is None:
            return None
        return found[f"{name}_ms"] / found[f"{base}_ms"]
