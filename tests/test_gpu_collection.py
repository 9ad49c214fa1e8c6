"""`make test-gpu` runs in the Python that has a CUDA torch: it must not need what the other tests need."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
EXTRAS = ["fastapi", "uvicorn", "sse_starlette", "openai", "prometheus_client", "schemathesis"]
EXTRAS += ["locust", "playwright", "ray", "peft", "datasets", "gguf", "matplotlib", "altair", "vl_convert", "moocore"]
COLLECT = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS}, None)  # an import of one raises ImportError
import pytest
pytest.main(["-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "-q"])
"""


def test_the_cuda_tests_are_collected_without_the_packages_of_other_tests():
    texts = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    marked = {path for path, text in texts.items() if "mark.gpu" in text}
    assert len(marked) > 10 and all("pytest.mark.gpu" in texts[path] for path in marked)
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some of the packages are plugins too
    command = [sys.executable, "-c", COLLECT]
    found = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert "Error" not in found.stdout + found.stderr, found.stdout + found.stderr
    listed = {line.rpartition(": ")[0] for line in found.stdout.splitlines()}
    assert listed >= {path.relative_to(TESTS.parent).as_posix() for path in marked}
