"""The public names: importable from the package, and nothing heavy is imported before their first use."""

import subprocess
import sys

import pytest

import sinkstream

HEAVY = "sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))"


def test_the_public_names_are_the_classes_of_their_folders():
    from sinkstream import Engine, EvictionPolicy, StreamingCache
    from sinkstream.cache import StreamingCache as CacheClass
    from sinkstream.engine import Engine as EngineClass
    from sinkstream.policies import EvictionPolicy as PolicyClass

    assert (Engine, EvictionPolicy, StreamingCache) == (EngineClass, PolicyClass, CacheClass)
    assert (
        {"Engine", "EvictionPolicy", "StreamingCache", "__version__"} == set(sinkstream.__all__) <= set(dir(sinkstream))
    )
    with pytest.raises(AttributeError, match="no attribute 'NoSuchClass'"):
        _ = sinkstream.NoSuchClass


@pytest.mark.parametrize(
    ("statement", "imported"), [("sinkstream.__version__", "[]"), ("sinkstream.EvictionPolicy", "['numpy', 'torch']")]
)
def test_importing_the_package_imports_nothing_heavy(statement, imported):
    program = f"import sys, sinkstream; {statement}; print({HEAVY})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip().startswith(imported.rstrip("]")), run.stderr
    assert (run.stdout.strip() == "[]") == (imported == "[]")
