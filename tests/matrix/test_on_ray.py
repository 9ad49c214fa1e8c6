"""Points as Ray tasks: a real local Ray of two workers, one of them killed; nothing of Ray without the option."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny_model

import sinkstream
from sinkstream.cli import main
from sinkstream.matrix.record import load_points

TOKENS, CAP = 240, 40
FILE = f"""
name = "trial"
[models]
tiny = "tiny"
[texts]
text = {{ source = "text.txt", tokens = {TOKENS} }}
[defaults]
cap = {CAP}
speed_backend = "none"
[[grid]]
policy = ["recompute", "strict", {{ name = "lazy", compress_every = 4 }}, {{ name = "lazy", compress_every = 8 }}]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_model(tmp_path / "tiny")
    tiny_model.write_text(tmp_path / "text.txt", 2 * TOKENS)
    (tmp_path / "m.toml").write_text(FILE)
    return tmp_path


def workers() -> list[psutil.Process]:
    """Processes of this one's Ray that measure a point."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            found += [child] if child.cmdline()[:1] and "_measure" in child.cmdline()[0] else []
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_two_workers_give_the_same_records_and_a_dead_ones_point_is_measured_again(here, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(sinkstream.__file__).parents[1]), *sys.path]))
    init, killed = ray.init, []
    monkeypatch.setattr(ray, "init", lambda **more: init(num_cpus=2, include_dashboard=False, **more))

    def kill_one() -> None:
        for _ in range(3000):
            for worker in workers():
                worker.kill()
                killed.append(worker.pid)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert main(["matrix", "m.toml", "--ray", "--device", "cpu", "--out", "ray"]) == 0, capsys.readouterr()
    killer.join()
    assert killed, "control: a worker was killed"
    assert main(["matrix", "m.toml", "--device", "cpu", "--out", "alone"]) == 0
    ours, theirs = ({p.id: p for p in load_points(folder)} for folder in ("ray", "alone"))
    assert len(ours) == 4 and ours.keys() == theirs.keys()
    for name, point in ours.items():
        assert point.status == "complete" and point.baselines == theirs[name].baselines
        assert point.quality["blocks"] == theirs[name].quality["blocks"]
        assert (point.spike is None) == (theirs[name].spike is None)


def test_an_address_that_does_not_answer_is_said_in_seconds(here, capsys):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["matrix", "m.toml", "--ray", f"127.0.0.1:{port}", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert f"--ray 127.0.0.1:{port}: no Ray answers there" in told and "accepted: HOST:PORT" in told


def test_without_the_package_the_option_says_what_to_install(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["matrix", "m.toml", "--ray", "--device", "cpu"]) == 2
    assert "pip install 'sinkstream[ray]'" in capsys.readouterr().err


def test_without_the_option_nothing_of_ray_is_imported():
    modules = "sinkstream.cli.matrix, sinkstream.matrix.run, sinkstream.cli.serve, sinkstream.serve.app"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(sinkstream.__file__).parents[1]), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
