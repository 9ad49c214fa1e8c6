"""Diagnosis: why a policy's quality differs from strict streaming's, from run records and nothing else."""

from sinkstream.studies.diagnosis.attribution import PARTS, attribute
from sinkstream.studies.diagnosis.diagnose import Controls, diagnose
from sinkstream.studies.diagnosis.record import (
    Diagnosis,
    build_diagnosis,
    load_diagnoses,
    load_diagnosis,
    write_diagnosis,
)
from sinkstream.studies.diagnosis.tokens import write_event_table, write_token_table
from sinkstream.studies.diagnosis.verdict import VERDICTS, verdict

__all__ = [
    "PARTS",
    "VERDICTS",
    "Controls",
    "Diagnosis",
    "attribute",
    "build_diagnosis",
    "diagnose",
    "load_diagnoses",
    "load_diagnosis",
    "verdict",
    "write_diagnosis",
    "write_event_table",
    "write_token_table",
]
