"""The documents hold: links lead somewhere, `make` targets exist, nothing names a path of the author's machine."""

import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import processes
import pytest
from arrows import ARROWS

from sinkstream.cli import build_parser, main
from sinkstream.compat import NEWEST_TESTED, OLDEST_TESTED
from sinkstream.models.gguf_file import BUILTIN_INSTALL
from sinkstream.records.selection import DIAGNOSED_MODELS, DIAGNOSED_TEXTS
from sinkstream.report.docs import generated_names

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(?:work|home|root|Users|mnt|opt|scratch)/|\b[A-Z]:\\Users\\")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
MAKE_TARGET = re.compile(r"(?:`|^\s*)make ([a-z][a-z-]*)", re.MULTILINE)


def machine_paths(text: str) -> list[str]:
    """Lines of `text` that name an absolute path of somebody's machine."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def dead_links(document: Path, text: str) -> list[str]:
    """Relative link targets of `text` that do not exist beside `document`; web addresses and anchors are left out."""
    targets = (t.partition("#")[0] for t in LINK.findall(text) if not re.match(r"[a-z]+:", t))
    return [t for t in targets if t and not (document.parent / t).exists()]


def anchors(text: str) -> set[str]:
    """What a link may name behind ``#``: the headings of a page, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}


def dead_anchors(document: Path, text: str) -> list[str]:
    """Links of `text` to headings that the page, this one or another in the tree, does not have."""
    found = (link.partition("#") for link in LINK.findall(text) if not re.match(r"[a-z]+:", link))
    pages = [(document.parent / page if page else document, anchor) for page, _, anchor in found if anchor]
    return [anchor for page, anchor in pages if anchor not in anchors(page.read_text(encoding="utf-8"))]


def unknown_targets(text: str) -> set[str]:
    """Names after `make` in commands of `text` that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(MAKE_TARGET.findall(text)) - set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The words of every ``sinkstream`` command in the code blocks of a page."""
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line.strip() for line in lines if re.match(r"(?: {4})?sinkstream ", line)]
    return [shlex.split(line.removesuffix(" &"), comments=True)[1:] for line in typed]


def unknown_commands(text: str) -> list[str]:
    """The commands of `text` that the command line does not take."""
    wrong = []
    for words in commands(text):
        try:
            build_parser().parse_args(words)
        except SystemExit as end:
            wrong += [] if end.code in (0, None) else [shlex.join(words)]
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_document_holds(document):
    text = document.read_text(encoding="utf-8")
    assert not machine_paths(text)
    assert not dead_links(document, text)
    assert not dead_anchors(document, text)
    assert not unknown_targets(text)


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name not in ("LOG.md", "CHANGELOG.md")], ids=lambda p: p.name
)
def test_the_command_line_takes_the_commands_of_a_document(document, capsys):
    assert not unknown_commands(document.read_text(encoding="utf-8")), capsys.readouterr().err


def test_the_readme_leads_to_every_document():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(readme)}
    assert set((ROOT / "docs").glob("*.md")) <= named


def test_the_readme_is_one_page_with_the_rival_on_its_best_day():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 125
    assert {"readme-quality", "readme-speed"} <= set(generated_names(ROOT / "README.md"))
    static = next(line for line in readme.splitlines() if "static cache" in line)
    assert "4.76" in static and "3.3 ×" not in readme


def test_the_readme_names_the_releases_that_are_accepted():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch_bound = next(bound for bound in project["dependencies"] if bound.startswith("torch>="))
    python, torch = project["requires-python"].removeprefix(">="), torch_bound.removeprefix("torch>=")
    named = f"Python {python} or newer, torch {torch} or newer, transformers {OLDEST_TESTED} to {NEWEST_TESTED}."
    assert named in readme and BUILTIN_INSTALL in readme
    extras = set(re.findall(r"`(\w+)`", readme.partition("The extras: ")[2].partition("\n\n")[0]))
    assert set(project["optional-dependencies"]) <= extras


def paths_of_the_picture(page: str) -> list[str]:
    """Files of the package in the code blocks of a page, as in ``engine/state.py`` or ``kernels/attention_*.py``."""
    blocks = "\n".join(line for line in page.splitlines() if line.startswith("    "))
    return re.findall(r"(?<![\w/])(?:[a-z]+/)+[\w*]+\.py", blocks)


def test_the_architecture_page_names_files_that_exist_and_the_arrows_that_are_tested():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = paths_of_the_picture(page)
    assert len(named) > 10 and not [path for path in named if not list((ROOT / "src" / "sinkstream").glob(path))]
    table = page.partition("<!-- arrows -->")[2].partition("<!-- /arrows -->")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    shown = {folder.strip(" `"): frozenset(re.findall(r"`(\w+)`", imports)) for folder, imports in rows}
    assert shown == ARROWS, "write into docs/architecture.md what ARROWS says"


def test_the_diagnosis_is_two_pages_and_its_tables_have_a_section_for_every_record():
    page, tables = (ROOT / "docs" / name for name in ("diagnosis.md", "diagnosis-tables.md"))
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 2 * 66, "two pages of 66 lines, tables and all"
    assert {"diagnosis-overview", "cliff-overview", "recall-overview"} <= set(generated_names(page))
    models = DIAGNOSED_MODELS.values()
    wanted = {f"diagnosis-{text.lower()}-{model}" for text in DIAGNOSED_TEXTS for model in models}
    wanted |= {name for model in models for name in (f"cliff-{model}", f"recall-{model}-512")}
    assert wanted <= set(generated_names(tables))


def test_no_source_names_a_machine_path():
    sources = [p for folder in ("src", "examples", ".ci") for p in (ROOT / folder).rglob("*") if p.is_file()]
    sources = [p for p in sources if p.suffix in {".py", ".sh", ""}]
    texts = ((p, p.read_text(encoding="utf-8")) for p in [*sources, ROOT / "Makefile", ROOT / "pyproject.toml"])
    assert not {str(p.relative_to(ROOT)): machine_paths(text) for p, text in texts if machine_paths(text)}


def test_generated_tables_and_headlines_are_those_of_the_records(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    generated = [d for d in DOCUMENTS if "<!-- generated:" in d.read_text(encoding="utf-8")]
    assert main(["report", "--check", "--docs", *map(str, generated)]) == 0, capsys.readouterr().out
    stale = tmp_path / "stale.md"
    stale.write_text("<!-- generated:policies -->\nnothing\n<!-- /generated -->\n", encoding="utf-8")
    assert main(["report", "--check", "--docs", str(stale)]) == 1, "a stale table must be noticed"


def test_the_ledger_is_that_of_the_records(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["verdict", "--check"]) == 0, capsys.readouterr().out
    page = (ROOT / "docs" / "LEDGER.md").read_text(encoding="utf-8")
    (tmp_path / "typed.md").write_text(page.replace("**no-go**", "**go**", 1), encoding="utf-8")
    assert main(["verdict", "--check", "--ledger", str(tmp_path / "typed.md")]) == 1, "a typed verdict must be noticed"


def test_faults_are_seen():
    assert machine_paths("run `/home/ann/sinkstream/x`") and machine_paths("cd /scratch/main")
    assert not machine_paths("see https://example.org/home/page and ./work/notes")
    assert dead_links(ROOT / "README.md", "[a](docs/no_such_page.md#x)") and not dead_links(ROOT / "x", "[a](LICENSE)")
    assert dead_anchors(ROOT / "README.md", "[a](docs/cache.md#no-such-heading)") == ["no-such-heading"]
    assert not dead_anchors(ROOT / "README.md", "[a](docs/cache.md#what-is-accepted)")
    assert unknown_commands("    sinkstream eval --capp 3 # x\n") and not unknown_commands("a sinkstream runs\n")
    assert unknown_targets("`make coffee`") == {"coffee"} and not unknown_targets("make test\nthey make sense")


def test_the_policy_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    check = """
from sinkstream.policies.scorers import select
candidates = Candidates(position=torch.arange(40).view(1, 1, 1, 40))
scores = SCORERS["stride"](stride=16).score(candidates)
assert select(scores, 3).flatten().tolist() == [0, 16, 32], scores
"""
    program = textwrap.dedent(blocks[0]) + check
    run = processes.run("-c", program, cwd=ROOT)
    assert run.returncode == 0, run.stderr
