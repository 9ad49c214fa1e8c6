"""Diagnosis records on disk: one JSON file with every figure of a diagnosis and where it came from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.measure.files import write_atomically
from sinkstream.measure.records import Record, new_record_id, plain_json, scrub_paths
from sinkstream.measure.schema import check_environment

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
    environment,
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
    arguments, command, environment, created
        As in a run record; of the diagnosis, not of the runs.
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
        "environment": environment,
        "model": first.model,
        "data": first.data,
        "protocol": {**protocol, "resampling_seed": seed, "confidence": 0.95},
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
    return write_atomically(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def load_diagnosis(path: Path | str) -> Diagnosis:
    """Read and check a diagnosis record. Raises ValueError, naming file and field, if it is anything else."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such record") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    _check(content, str(path))
    return Diagnosis(path=path, **{field: content[field] for field in FIELDS})


def load_diagnoses(directory: Path | str) -> list[Diagnosis]:
    """All diagnosis records below a folder, oldest first; other JSON files are passed over."""
    found = [load_diagnosis(path) for path in sorted(Path(directory).rglob("*.json")) if _says_diagnosis(path)]
    return sorted(found, key=lambda diagnosis: (diagnosis.created, diagnosis.id))


def _says_diagnosis(path: Path) -> bool:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["schema"]).startswith("sinkstream.diagnosis/")
    except (ValueError, KeyError, TypeError):
        return False


def _check(content: Any, where: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: not a diagnosis record: expected a JSON object, got {type(content).__name__}")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{where}: field 'schema' is {content.get('schema')!r}; this version reads {SCHEMA!r}")
    for field in FIELDS:
        if content.get(field) is None:
            raise ValueError(f"{where}: required field {field!r} is missing")
    for key in PROTOCOL_KEYS:
        if key not in content["protocol"]:
            raise ValueError(f"{where}: required field 'protocol.{key}' is missing")
    if not content["policies"]:
        raise ValueError(f"{where}: field 'policies' is empty")
    for number, policy in enumerate(content["policies"]):
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
