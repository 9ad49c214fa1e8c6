"""Requests made from the server's own OpenAPI schema: whatever comes, no 5xx, and only what the schema says."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import make_service, served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_generated_requests_meet_no_server_error(tmp_path):
    program = Path(sys.executable).with_name("schemathesis")
    with served(make_service(max_tokens=2, max_tokens_limit=4, spill=tmp_path / "spill", resident=2)) as address:
        command = [program, "run", f"{address}/openapi.json", "--checks", CHECKS, "--phases", "coverage,fuzzing"]
        run = subprocess.run(
            [*command, "--max-examples", "8", "--seed", "1"], capture_output=True, text=True, cwd=tmp_path
        )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "Tested: " in run.stdout
