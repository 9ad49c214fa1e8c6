"""Diagnosis records on disk: one JSON file with every figure of a diagnosis and where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sinkstream.records.base import BaseRecord
from sinkstream.records.plain import new_record_id
from sinkstream.records.records import Record
from sinkstream.records.schema import check_keys

FIELDS = ("id", "created", "command", "arguments", "environment", "model", "data", "protocol", "policies")
POLICY_KEYS = (
    *("label", "run", "tokens_sha256", "commit", "policy", "cap", "ppl", "controls", "strict", "period", "delta_ppl"),
    *("resolution", "spike", "plain", "drift", "latency", "extreme", "long_run", "attribution", "verdict"),
)
PROTOCOL_KEYS = ("backend", "dtype", "device", "tf32", "cap", "prefill_tokens", "decode_tokens")
_DIGITS = 7


@dataclass(frozen=True)
class Diagnosis(BaseRecord):
    """One diagnosis: the fields of its JSON file; `policies` holds what `diagnose` returned for each policy.

    In the file, what is equal in the entries of all policies stands once, in `shared`; floats have 7 digits.
    """

    SCHEMA, KIND, NOT_NULL = "sinkstream.diagnosis/1", "diagnosis", FIELDS
    REQUIRED: ClassVar = {**dict.fromkeys(FIELDS), "protocol": dict.fromkeys(PROTOCOL_KEYS)}

    data: dict[str, Any]
    policies: list[dict[str, Any]]

    @classmethod
    def device_of(cls, content: Mapping[str, Any]) -> str:
        return str(content["environment"].get("device"))

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        if not content["policies"]:
            raise ValueError(f"{where}: field 'policies' is empty")
        for number, policy in enumerate(_policies(content)):
            check_keys(policy, dict.fromkeys(POLICY_KEYS), where, f"policies[{number}].")

    @classmethod
    def build(cls, record: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return _without_repetition(_rounded(super().build(record, **more)))

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(content) | {"policies": _policies(content)}


def build_diagnosis(
    runs: Sequence[Record],
    policies: Sequence[Mapping[str, Any]],
    *,
    arguments: dict[str, Any],
    command: list[str],
    git: dict[str, Any],
    created: str,
    seed: int,
) -> dict[str, Any]:
    """Assemble the record of a diagnosis.

    `policies` holds what `diagnose` returned for each of `runs`. Model, text, protocol and environment are those of the
    first run, whose figures may come from another machine; arguments, command, `created`, git revision and seed (of
    the resampling) are those of the diagnosis.
    """
    first = runs[0]
    protocol = {key: first.protocol[key] for key in PROTOCOL_KEYS}
    return {
        "id": new_record_id("diagnosis", first.model["name"], first.data["name"]),
        "created": created,
        "command": command,
        "arguments": arguments,
        "environment": first.environment,
        "model": first.model,
        "data": first.data,
        "protocol": {**protocol, "resampling_seed": seed, "confidence": 0.95, "diagnosis_git": git},
        "policies": list(policies),
    }


def _policies(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each policy's entry holds, with what `shared` holds for all of them."""
    return [{**content.get("shared", {}), **entry} for entry in content["policies"]]


def _without_repetition(content: dict[str, Any]) -> dict[str, Any]:
    """What is equal in the entries of all policies stands once, in `shared`."""
    first, *others = content["policies"] or [{}]
    shared = {key: value for key, value in first.items() if others and all(e.get(key) == value for e in others)}
    policies = [{key: value for key, value in entry.items() if key not in shared} for entry in content["policies"]]
    return {**content, "shared": shared, "policies": policies}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
