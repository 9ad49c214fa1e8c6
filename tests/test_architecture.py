"""The folders are a true picture: imports point one way, functions stay short, importing changes nothing."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from arrows import ARROWS
from fast import FAST

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "sinkstream"
MODULES = sorted(SOURCE.rglob("*.py"))
ABOUT_ITSELF = ("__version__", "__file__", "__path__")  # of the package; whoever likes may read these
MAX_FUNCTION_LINES = 90
MAX_CLASS_LINES = 250
MAX_MODULE_LINES = 450
MAX_PARAMETERS = 12
FORBIDDEN_WORDS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")


def imported_names(tree: ast.Module, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import of `tree`, wherever it stands; `module` is the importer's name.

    After a bare `import sinkstream`, what counts is the attribute that is used.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name != "sinkstream" or alias.asname]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sinkstream":
            found.append((node.lineno, f"sinkstream.{node.attr}"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join(parents + ([base] if base else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def wrong_imports(relative_path: str, source: str) -> list[str]:
    """Imports of a package file that point upwards or sideways, as messages; `relative_path` is inside the package."""
    path = Path(relative_path)
    is_package = path.name == "__init__.py"
    parts = path.parent.parts if is_package else (*path.parent.parts, path.stem)
    unit = parts[0] if parts else "__init__"
    if unit not in ARROWS:
        return [f"{relative_path}: give {unit!r} a line in ARROWS of tests/support/arrows.py"]
    wrong = []
    for line, name in imported_names(ast.parse(source), ".".join(("sinkstream", *parts)), is_package):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package != "sinkstream" or target in (unit, *ABOUT_ITSELF):
            continue
        if target not in ARROWS[unit]:
            wrong.append(f"{relative_path}:{line}: {unit} may not import {name}")
    return wrong


def too_large(relative_path: str, source: str) -> list[str]:
    """Modules, classes, functions and parameter lists above their limit, as messages.

    Docstring and signature count as lines. Kernels may be longer and take more.
    """
    tree, kernels = ast.parse(source), "kernels" in Path(relative_path).with_suffix("").parts
    sizes = [("module", relative_path, 1, len(source.splitlines()), MAX_MODULE_LINES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            sizes.append(("class", node.name, node.lineno, node.end_lineno - node.lineno + 1, MAX_CLASS_LINES))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not kernels:
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            lines = node.end_lineno - node.lineno + 1
            sizes.append(("function", node.name, node.lineno, lines, MAX_FUNCTION_LINES))
            sizes.append(("parameters of", node.name, node.lineno, len(given), MAX_PARAMETERS))
    return [
        f"{relative_path}:{line}: {kind} {name}: {size}, at most {limit}"
        for kind, name, line, size, limit in sizes
        if size > limit
    ]


def over_modules(check) -> list[str]:
    """Messages of `check(relative_path, source)` over every module of the package."""
    return [m for p in MODULES for m in check(str(p.relative_to(SOURCE)), p.read_text(encoding="utf-8"))]


def test_imports_point_one_way():
    assert len(MODULES) > 1, f"no modules under {SOURCE}"
    assert not over_modules(wrong_imports)


def test_the_table_of_arrows_is_a_true_picture():
    units = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in MODULES}
    assert set(ARROWS) == units, "a line for every folder that exists, and for no other"
    assert list(TopologicalSorter(ARROWS).static_order()), "no circle"


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("policies/strict.py", "from sinkstream.cache import StreamingCache"),
        ("policies/strict.py", "from ..cache import ring"),
        ("policies/triggers/lazy.py", "from ... import engine"),
        ("policies/__init__.py", "from ..engine import step"),
        ("cache/ring.py", "def f():\n    import sinkstream.engine.step"),
        ("models/gguf.py", "from sinkstream.data import texts"),
        ("data/texts.py", "import sinkstream.models"),
        ("measure/clock.py", "from sinkstream import StreamingCache"),
        ("measure/clock.py", "import sinkstream\nsinkstream.StreamingCache"),
        ("measure/clock.py", "import sinkstream as s"),
        ("registry.py", "from sinkstream.measure import clock"),
        ("show/table.py", "from sinkstream.evaluation import protocol"),
        ("studies/cliff/run.py", "from sinkstream.bench import session"),
        ("studies/diagnosis/spikes.py", "from sinkstream.report import documents"),
        ("kernels/layout.py", "from sinkstream.engine import state"),
        ("novelty/x.py", "import os"),
    ],
)
def test_wrong_imports_are_seen(path, statement):
    assert wrong_imports(path, statement)


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("policies/strict.py", "from sinkstream.registry import Registry"),
        ("policies/triggers/lazy.py", "from ..base import Trigger"),
        ("policies/__init__.py", "from .base import Trigger"),
        ("cache/ring.py", "from ..policies.base import Trigger"),
        ("cli/run.py", "from sinkstream.evaluation import protocol"),
        ("show/table.py", "from sinkstream.statistics import delta"),
        ("report/documents.py", "from sinkstream.studies.diagnosis.record import Diagnosis"),
        ("studies/diagnosis/spikes.py", "from sinkstream.statistics import event_curve"),
        ("measure/clock.py", "from sinkstream import __version__"),
        ("measure/clock.py", "import sinkstream\nsinkstream.__version__, sinkstream.__file__"),
        ("__init__.py", "from sinkstream.cache import StreamingCache"),
        ("data/texts.py", "import sinkstreamlike, datasets"),
    ],
)
def test_right_imports_are_let_through(path, statement):
    assert not wrong_imports(path, statement)


def test_modules_classes_and_functions_stay_short():
    assert not over_modules(too_large)


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
        "class C:\n" + "    x = 1\n" * MAX_CLASS_LINES,
        "x = 1\n" * (MAX_MODULE_LINES + 1),
        f"def f({', '.join(f'x{i}' for i in range(MAX_PARAMETERS + 1))}):\n    x = 1\n",
    ],
)
def test_what_is_too_large_is_seen(source):
    assert too_large("cache/ring.py", source)
    assert bool(too_large("kernels/step.py", source)) == (not source.startswith("def"))


@pytest.mark.parametrize("kind", ["triggers", "scorers"])
def test_every_policy_file_is_imported_and_registers_something(kind):
    policies = importlib.import_module(f"sinkstream.policies.{kind}")
    registered = {cls.__module__ for _, cls in getattr(policies, kind.upper()).items()}
    files = {p.stem for p in (SOURCE / "policies" / kind).glob("*.py")} - {"__init__", "base"}
    assert files and {f"sinkstream.policies.{kind}.{name}" for name in files} == registered


def test_every_module_says_what_it_is_for():
    assert not over_modules(lambda path, source: [] if ast.get_docstring(ast.parse(source)) else [path])


def test_nothing_is_left_for_later():
    folders = ("src", "tests", "docs", "examples")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md"}]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    lines = ((p, n, line) for p in files for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1))
    assert not [f"{p.relative_to(ROOT)}:{n}: {line.strip()}" for p, n, line in lines if FORBIDDEN_WORDS.search(line)]
    assert FORBIDDEN_WORDS.search("# TO" + "DO: later"), "the control is not seen"


def test_the_quick_tests_that_are_named_exist():
    folder = Path(__file__).parent
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in FAST}
    wanted = [(name, word.partition("[")[0]) for name, words in FAST.items() for word in words]
    assert not [
        (name, word)
        for name, word in wanted
        if not re.search(rf"def test_\w*{word.removeprefix('test_')}", sources[name])
    ]


PATCH_PROBE = """
import importlib, pkgutil
from transformers import Cache, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

def snapshot():
    registries = [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS]
    tables = [{name: registry[name] for name in registry.keys()} for registry in registries]
    owners = [Cache, DynamicCache, modeling_gpt_neox, modeling_gpt_neox.GPTNeoXAttention]
    owners += [modeling_llama, modeling_llama.LlamaAttention]
    return [{name: id(value) for name, value in table.items()} for table in tables + [dict(vars(o)) for o in owners]]

before = snapshot()
import sinkstream
units = [m.name for m in pkgutil.iter_modules(sinkstream.__path__) if m.name != "__main__"]
for unit in units:
    importlib.import_module("sinkstream." + unit)
import sinkstream.evaluation.run
assert "registry" in units
print(snapshot() == before)
ALL_ATTENTION_FUNCTIONS.register("control", lambda: None)
print(snapshot() == before)
"""


def test_importing_patches_nothing():
    """Second line of the probe: the control."""
    run = subprocess.run([sys.executable, "-c", PATCH_PROBE], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["True", "False"], run.stderr
