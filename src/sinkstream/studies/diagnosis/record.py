"""Diagnosis records on disk: one JSON file with every figure of a diagnosis and where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.records.json_files import check_schema, load_family, read_json, write_json
from sinkstream.records.records import Record, new_record_id, plain_json, scrub_paths
from sinkstream.records.schema import check_environment

SCHEMA = "sinkstream.diagnosis/1"
FIELDS = ("id", "created", "command", "arguments", "environment", "model", "data", "protocol", "policies")
POLICY_KEYS = (
    *("label", "run", "tokens_sha256", "commit", "policy", "cap", "ppl", "controls", "strict", "period", "delta_ppl"),
    *("resolution", "spike", "plain", "drift", "latency", "extreme", "long_run", "attribution", "verdict"),
)
PROTOCOL_KEYS = ("backend", "dtype", "device", "tf32", "cap", "prefill_tokens", "decode_tokens")
_DIGITS = 7


@dataclass(frozen=True)
class Diagnosis:
    """One diagnosis: the fields of its JSON file; `policies` holds what `diagnose` returned for each policy."""

    path: Path
    id: str
    created: str
    command: list[str]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    protocol: dict[str, Any]
    policies: list[dict[str, Any]]


def build_diagnosis(
    runs: Sequence[Record],
    policies: Sequence[Mapping[str, Any]],
    *,
    arguments,
    command,
    git,
    created,
    seed: int,
) -> dict[str, Any]:
    """Assemble the record of a diagnosis.

    Parameters
    ----------
    runs : sequence of Record
        The diagnosed runs, in the order of `policies`; model, text and protocol are those of the first.
    policies : sequence of dict
        What `diagnose` returned for each.
    arguments, command, created
        As in a run record; of the diagnosis, not of the runs.
    git : dict
        Revision that the diagnosis was computed with, as `git_revision` tells it. The `environment` is that of the
        first run: where its figures were measured, which may be another machine than the one that reads its record.
    seed : int
        Of the resampling.
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


def write_diagnosis(content: Mapping[str, Any], directory: Path | str) -> Path:
    """Write a diagnosis record atomically as `<id>.json`; absolute paths are cut, floats kept to 7 digits.

    Raises
    ------
    ValueError
        A required field is missing, or a record of that id exists.
    WriteError
        The file could not be written.
    """
    content = {"schema": SCHEMA, **scrub_paths(_rounded(plain_json(content)))}
    _check(content, f"diagnosis {content.get('id')!r}")
    path = Path(directory) / f"{content['id']}.json"
    if path.exists():
        raise ValueError(f"{path} exists already; records are never overwritten")
    return write_json(path, _without_repetition(content))


def load_diagnosis(path: Path | str) -> Diagnosis:
    """Read and check a diagnosis record. Raises ValueError, naming file and field, if it is anything else."""
    path = Path(path)
    content = read_json(path)
    _check(content, str(path))
    fields = {field: content[field] for field in FIELDS}
    return Diagnosis(path=path, **fields | {"policies": _policies(content)})


def load_diagnoses(directory: Path | str) -> list[Diagnosis]:
    """All diagnosis records below a folder, oldest first; other JSON files are passed over."""
    return load_family(directory, SCHEMA, load_diagnosis)


def _policies(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each policy's entry holds, with what `shared` holds for all of them."""
    return [{**content.get("shared", {}), **entry} for entry in content["policies"]]


def _without_repetition(content: dict[str, Any]) -> dict[str, Any]:
    """What is equal in the entries of all policies, told once, in `shared`."""
    first, *others = content["policies"] or [{}]
    shared = {key: value for key, value in first.items() if others and all(e.get(key) == value for e in others)}
    policies = [{key: value for key, value in entry.items() if key not in shared} for entry in content["policies"]]
    return {**content, "shared": shared, "policies": policies}


def _check(content: Any, where: str) -> None:
    check_schema(content, SCHEMA, "diagnosis", where)
    for field in FIELDS:
        if content.get(field) is None:
            raise ValueError(f"{where}: required field {field!r} is missing")
    for key in PROTOCOL_KEYS:
        if key not in content["protocol"]:
            raise ValueError(f"{where}: required field 'protocol.{key}' is missing")
    if not content["policies"]:
        raise ValueError(f"{where}: field 'policies' is empty")
    for number, policy in enumerate(_policies(content)):
        for key in POLICY_KEYS:
            if key not in policy:
                raise ValueError(f"{where}: required field 'policies[{number}].{key}' is missing")
    check_environment(content["environment"], str(content["environment"].get("device")), where)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
