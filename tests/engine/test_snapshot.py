"""Snapshots: a restored stream goes on bit for bit; what does not fit is refused and changes nothing."""

import json

import pytest
import torch
from oracle.models import build, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streams import FakeTokenizer, small_policy

from sinkstream.cache import POSITIONS
from sinkstream.engine import Engine
from sinkstream.policies import PRESETS


def engine(policy: str | dict = "lazy", model=None, **more) -> Engine:
    options = small_policy(policy) if isinstance(policy, str) else policy
    return Engine(model or build("llama", layers=2), tokenizer=FakeTokenizer(), rebase_at=60, **options, **more)


@pytest.mark.parametrize(("policy", "positions"), [(name, POSITIONS[i % 2]) for i, name in enumerate(PRESETS)])
def test_a_restored_stream_goes_on_bit_for_bit(policy, positions, tmp_path):
    ids, path = token_ids(260), tmp_path / "stream.safetensors"
    first = engine(policy, positions=positions)
    first.score(ids[:137])
    first.snapshot(path)
    expected = first.score(ids[137:])
    second = engine(policy, positions=positions)
    second.score(token_ids(50, seed=3))  # something else was in the stream
    second.restore(path)
    assert torch.equal(second.score(ids[137:]), expected)
    assert second.stats() == first.stats()


def test_a_stream_may_go_on_in_another_place(tmp_path):
    ids, path = token_ids(120), tmp_path / "stream.safetensors"
    one = engine("refresh-uncertainty")
    one.prefill(ids[:70])
    one.snapshot(path)
    two = engine("refresh-uncertainty", streams=2)
    two.prefill(ids[:33], stream=0)
    two.restore(path, stream=1)
    assert (two.score(ids[70:], stream=1) - one.score(ids[70:])).abs().max() < 1e-5
    assert two.stats(stream=0)["seen"] == 33


def rewrite(path, change) -> None:
    """Write a snapshot anew with a changed header."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["sinkstream"])
    change(header)
    save_file(load_file(path), path, metadata={"sinkstream": json.dumps(header)})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: engine(model=build("llama", layers=2, seed=1)), "another model"),
        (lambda: engine(model=build("llama", layers=2).half()), "another model"),
        (lambda: engine(small_policy("lazy", window=21)), "another policy: .*accepted: "),
        (lambda: engine("refresh-uniform"), "another policy"),
        (lambda: engine(positions="original"), "positions='cache'; accepted: positions='original'"),
    ],
)
def test_another_model_policy_or_frame_is_refused(other, words, tmp_path):
    path = tmp_path / "stream.safetensors"
    e = engine()
    e.prefill(token_ids(60))
    e.snapshot(path)
    target = other()
    target.prefill(token_ids(20))
    with pytest.raises(ValueError, match=words):
        target.restore(path)
    assert target.stats()["seen"] == 20


def test_what_cannot_be_read_changes_nothing(tmp_path):
    """What else is damaged, truncated or of another format: tests/cache/test_saving.py."""
    path, e = tmp_path / "stream.safetensors", engine()
    e.prefill(token_ids(60))
    e.snapshot(path)
    whole = path.read_bytes()
    for damaged, words in (
        (whole[: len(whole) // 2], "not a safetensors file, or is truncated"),
        (whole[:-3] + b"abc", "damaged: .* is not what was written"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            e.restore(path)
    rewrite(path, lambda header: header.update(format=1))
    with pytest.raises(ValueError, match=r"format 1 .*; accepted: format 2"):
        e.restore(path)
    with pytest.raises(ValueError, match="there is no file"):
        e.restore(tmp_path / "nowhere")
    assert e.stats()["seen"] == 60


def test_a_step_that_failed_after_its_tokens_were_pinned(tmp_path, monkeypatch):
    ids, path = token_ids(200), tmp_path / "stream.safetensors"
    one, two = engine("refresh-key-norm"), engine("refresh-key-norm")
    fed = 0
    while fed < 60 or not one.state.schedules[0].plan(1)[0].drop:
        one.step(ids[fed : fed + 1])
        fed += 1
    monkeypatch.setattr(one, "_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.step(ids[fed : fed + 1])
    monkeypatch.undo()
    one.snapshot(path)
    two.restore(path)
    assert two.stats() == one.stats()
    assert torch.equal(two.score(ids[fed:]), one.score(ids[fed:]))


def test_a_snapshot_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    path, e = tmp_path / "folder" / "stream.safetensors", engine()
    e.prefill(token_ids(60))
    e.snapshot(path)
    older = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    e.score(token_ids(3))
    with pytest.raises(OSError, match="could not write"):
        e.snapshot(path)
    assert path.read_bytes() == older and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.gpu
def test_a_snapshot_goes_from_one_backend_to_another(tmp_path):
    ids, path, model = token_ids(200).cuda(), tmp_path / "stream.safetensors", build("llama", layers=2).cuda()
    ring, graph = engine(model=model), engine(model=model, backend="graph")
    ring.score(ids[:90])
    ring.snapshot(path)
    graph.restore(path)
    assert (graph.score(ids[90:]) - ring.score(ids[90:])).abs().max() < 1e-5


def test_one_weight_changes_the_hash():
    model = build("gpt_neox", layers=2)
    before = Engine(model, window=20).model_hash
    assert before == Engine(build("gpt_neox", layers=2), window=20).model_hash
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[3, 5] += 1e-3
    assert Engine(model, window=20).model_hash != before
