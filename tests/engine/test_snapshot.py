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


def test_another_format_or_another_file_is_refused(tmp_path):
    path, e = tmp_path / "stream.safetensors", engine()
    e.prefill(token_ids(60))
    e.snapshot(path)
    rewrite(path, lambda header: header.update(format=99, sinkstream="9.9"))
    with pytest.raises(ValueError, match=r"format 99 \(written by sinkstream 9\.9\); accepted: format 1"):
        e.restore(path)
    whole = path.read_bytes()
    for damage, words in [
        (lambda h: h.update(format=1) or h.pop("schedule"), "damaged: its header lacks 'schedule'"),
        (lambda h: h.update(schedule=None, counters={"seen": 3}), "damaged: it counts seen"),
    ]:
        rewrite(path, damage)
        with pytest.raises(ValueError, match=words):
            e.restore(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a safetensors file"):
        e.restore(path)
    assert e.stats()["seen"] == 60
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a snapshot"):
        e.restore(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        e.restore(path)
    with pytest.raises(ValueError, match="there is no snapshot"):
        e.restore(tmp_path / "nowhere")


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
