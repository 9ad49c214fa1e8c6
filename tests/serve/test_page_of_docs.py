"""docs/serve.md against the application and the command."""

import re
from pathlib import Path

from serving import make_service

from sinkstream.cli import build_parser
from sinkstream.serve.app import create_app
from sinkstream.serve.terminal import HELP

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_table_of_endpoints_is_that_of_the_application():
    schema = create_app(make_service()).openapi()
    served = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    assert set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", PAGE)) == served


def test_options_and_commands_of_the_page_exist(capsys):
    found = ""
    for command in ("serve", "chat", "bench"):
        try:
            build_parser().parse_args([command, "--help"])
        except SystemExit:
            found += capsys.readouterr().out
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert named and not [option for option in named if option not in found]
    commands = {name.split()[0] for name in HELP}
    assert set(re.findall(r"`(/[a-z]+)(?: [A-Z ]+)?`", PAGE)) <= commands | {"/tokenize", "/health", "/metrics"}
    assert {f"`{name.split()[0]}" for name in HELP if name != "/quit"} <= set(re.findall(r"`/[a-z]+", PAGE))
