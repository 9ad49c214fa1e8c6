"""Packing: the module computes what it computed before, from one shared copy of the weights."""

import gc

import pytest
import torch
from oracle.models import ENGINE, build, token_ids

from sinkstream.engine import pack
from sinkstream.engine.packing import NeoxLayer

SERVED = [f for f in ENGINE if f != "gpt_neox_sequential"]


@pytest.mark.parametrize("family", SERVED)
def test_the_module_says_the_same_from_views_of_the_packed_weights(family):
    model, ids = build(family), token_ids(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        weights = pack(model)
        assert (model(ids).logits - before).abs().max() < 1e-5
        layer = weights.layers[0]
        packed = layer.weight_in if isinstance(layer, NeoxLayer) else layer.weight_qkv
        packed.zero_()
        assert (model(ids).logits - before).abs().max() > 0.1, "the module reads the packed weights"


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_no_weight_is_held_twice(family):
    model = build(family)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = pack(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    biases = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n.endswith("bias"))
    assert sum(storages.values()) <= plain + biases
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    embedding = model.get_input_embeddings().weight
    read = plain - (0 if weights.head.data_ptr() == embedding.data_ptr() else embedding.numel() * 4)
    assert read - biases <= weights.step_bytes <= read


def test_one_layer_at_most_is_held_twice(monkeypatch):
    """Old storage is freed as packing goes: no parameter's first storage outlives its layer."""
    model = build("gpt_neox", layers=3)
    first = [layer.attention.query_key_value.weight.untyped_storage() for layer in model.gpt_neox.layers]
    owners = [p.data_ptr() for p in model.parameters()]
    pack(model)
    gc.collect()
    moved = [p.data_ptr() for p in model.gpt_neox.layers.parameters()]
    big = {s.data_ptr() for s in first}
    assert not big & set(moved) and len(owners) == len(list(model.parameters()))


def test_packing_twice_finds_the_first_and_sees_moved_weights():
    model = build("llama")
    weights = pack(model)
    assert pack(model) is weights
    model.half()
    again = pack(model)
    assert again is not weights and again.head.dtype == torch.float16


def test_tied_embeddings_stay_tied():
    weights = pack(build("qwen3"))
    assert weights.head.data_ptr() == weights.embedding.data_ptr()


def _with(family: str, **config):
    model = build(family)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: build("gpt_neox_sequential"), "sequential residual"),
        (
            lambda: _with("llama", model_type="falcon"),
            "'falcon' is not served by the engine; accepted: gpt_neox",
        ),
        (lambda: _with("llama", hidden_act="relu"), "hidden_act='relu'"),
        (lambda: build("llama").to(torch.float64), "float64"),
        (lambda: build("llama").model, "no language-model head"),
    ],
)
def test_what_is_not_served_is_refused_by_name(model, words):
    with pytest.raises(ValueError, match=words):
        pack(model())


def test_mixed_dtypes_and_foreign_layers_are_refused():
    model = build("llama")
    model.model.norm.half()
    with pytest.raises(ValueError, match="all of one dtype"):
        pack(model)
    model = build("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="Bilinear"):
        pack(model)
