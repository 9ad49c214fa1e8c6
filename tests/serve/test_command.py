"""`sinkstream serve`: what it refuses before it loads anything."""

import builtins
import socket

import pytest

from sinkstream.cli import main
from sinkstream.cli.serve import default_backend, listen
from sinkstream.serve.settings import ServeSettings


def refused(capsys, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    return capsys.readouterr().err


def test_a_taken_port_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused(capsys, "--port", str(port))
    assert "cannot listen" in refused(capsys, "--port", "99999")
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_other_machines_need_a_key(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SINKSTREAM_API_KEY", raising=False)
    assert "--no-api-key" in refused(capsys, "--host", "0.0.0.0")
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert "is empty" in refused(capsys, "--api-key-file", str(empty))
    assert "cannot be read" in refused(capsys, "--api-key-file", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cap", "8"], "cap=8 is not accepted; accepted: a whole number of at least 16"),
        (["--resident", "0"], "resident=0"),
        (["--model", "random:llama-tiny"], "accepted"),
        (["--model", "no-such-model.gguf"], "no-such-model.gguf"),
    ],
)
def test_wrong_options_are_refused(capsys, arguments, words):
    assert words in refused(capsys, "--port", "0", "--no-spill", *arguments)


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *more, **options):
        if name == "uvicorn":
            raise ImportError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs uvicorn: pip install 'sinkstream[serve]'" in refused(capsys)


def test_the_backend_of_a_cpu():
    assert default_backend("cpu") == "ring"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="evict='pages'"):
        ServeSettings(evict="pages")
    with pytest.raises(ValueError, match=r"max_tokens=9 with max_tokens_limit=8 .* accepted: max_tokens of at most 8"):
        ServeSettings(max_tokens=9, max_tokens_limit=8)
    assert ServeSettings(max_tokens=8, max_tokens_limit=8).default_max_tokens == 8
    assert ServeSettings(max_tokens_limit=100).default_max_tokens == 100, "a lower limit alone is accepted"
    assert ServeSettings().default_max_tokens == 1024
    assert ServeSettings.of({"cap": 64, "colour": "red", "queue": None}).cap == 64
