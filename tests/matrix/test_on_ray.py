"""Points as Ray tasks: a real local Ray of two workers, one of them killed; nothing of Ray without the option."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_model

import sinkstream
from sinkstream.cli import main
from sinkstream.matrix import measure, on_ray
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


class WorkerEnded(Exception):
    """Of a worker that has ended itself; Ray then gives its task to another one."""


class OneWorkerAtATime:
    """In place of Ray: tasks run in this process when they are waited for, in workers that may end."""

    exceptions = SimpleNamespace(RayError=WorkerEnded)

    def __init__(self):
        self.workers, self.tasks = 1, []

    def remote(self, function):
        def begin(*work):
            self.tasks.append((function, work))
            return len(self.tasks) - 1

        return SimpleNamespace(options=lambda **more: SimpleNamespace(remote=begin))

    def wait(self, tasks):
        return tasks[:1], tasks[1:]

    def get(self, task):
        function, work = self.tasks[task]
        for _ in range(on_ray.RETRIES + 1):
            try:
                return function(*work)
            except WorkerEnded:
                self.new_worker()
        raise WorkerEnded

    def new_worker(self):
        """What a worker remembers is gone."""
        self.workers += 1
        on_ray._lost.clear()
        on_ray._benches.clear()

    def shutdown(self):
        self.new_worker()


@pytest.mark.parametrize("losing", ["once", "always"])
def test_a_worker_that_lost_its_device_ends_and_its_point_is_measured_elsewhere(here, monkeypatch, losing):
    """Control: a point that loses every device is recorded with its reason, and the others are complete."""
    ray, ended, lost = OneWorkerAtATime(), [], []
    score = measure.Workbench._score

    def exit_worker(code):
        ended.append(code)
        raise WorkerEnded

    def lose(self, point, *more):
        if point.settings.method == "recompute" and (losing == "always" or not lost):
            lost.append(point)
            raise RuntimeError("an illegal memory access was encountered")
        return score(self, point, *more)

    monkeypatch.setattr(measure.Workbench, "_score", lose)
    monkeypatch.setattr(measure, "device_works", lambda device: False)
    monkeypatch.setattr(on_ray, "ray_package", lambda: ray)
    monkeypatch.setattr(on_ray, "connect", lambda *more: None)
    monkeypatch.setattr(on_ray.os, "_exit", exit_worker)
    monkeypatch.setattr(on_ray.threading, "Timer", lambda *more: SimpleNamespace(start=lambda: None))
    code = main(["matrix", "m.toml", "--ray", "--device", "cpu", "--out", "ray"])
    statuses = {point.label: point.status for point in load_points("ray")}
    assert ended and ray.workers > 2, "the worker ended itself before it took another point"
    if losing == "always":
        (failed,) = (point for point in load_points("ray") if point.status == "failed")
        assert code == 1 and failed.label == "recompute" and len(lost) == on_ray.RETRIES + 1
        assert failed.status_reason == "RuntimeError: an illegal memory access was encountered"
    else:
        assert code == 0 and set(statuses.values()) == {"complete"}


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
