"""What the steps of an engine would pass over is refused by name, and so is a model that changes under an engine."""

import copy

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, nll_of
from torch import nn
from torch.nn.utils import parametrizations

from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache
from sinkstream.engine import Engine

ids = token_ids(90)
OPTIONS = {"sink": 4, "window": 20}
PROJECTION = "model.layers.1.self_attn.q_proj"


class Lora(nn.Module):
    """A stand-in for a LoRA layer of PEFT, with its words and its merging."""

    def __init__(self, linear, seed: int = 3):
        super().__init__()
        self.base_layer, self.merged_adapters, self.disable_adapters = linear, [], False
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(n, 4, generator=generator) for n in (linear.out_features, linear.in_features))
        self.a, self.b = nn.Parameter(0.1 * a), nn.Parameter(0.3 * b)
        self.active_adapters = ["default"]

    @property
    def delta(self):
        return (self.a @ self.b.T).detach()

    def merge(self):
        self.base_layer.weight.data += self.delta
        self.merged_adapters.append("default")

    def unmerge(self):
        self.base_layer.weight.data -= self.delta
        self.merged_adapters.remove("default")

    def forward(self, x):
        out = self.base_layer(x)
        rests = self.merged_adapters or self.disable_adapters or "default" not in self.active_adapters
        return out if rests else out + x @ self.b @ self.a.T


def with_adapters(model) -> list[Lora]:
    """Put an adapter around a projection of every layer."""
    adapters = []
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        adapters.append(layer.self_attn.q_proj)
    return adapters


@torch.no_grad()
def by_cache(model, tokens=ids) -> torch.Tensor:
    """NLL of all but the first token by the drop-in cache, which calls the modules."""
    cache = StreamingCache.for_model(model, **OPTIONS)
    logits = model(tokens[None], **with_cache(model, cache)).logits
    cache.close()
    return nll_of(logits, tokens[None])[0]


def scored(e: Engine, tokens=ids) -> torch.Tensor:
    return e.score(tokens)[1:].double()


def assert_agrees(e: Engine, model) -> None:
    torch.testing.assert_close(scored(e), by_cache(model), rtol=0, atol=TOLERANCE)


class WholeNumbers(nn.Linear):
    """A subclass of Linear that computes something else, as those of quantisers do."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round())


class Quantised(torch.Tensor):
    """A tensor subclass."""


def change(kind: str, model) -> None:
    layer = model.model.layers[1]
    linear = layer.self_attn.q_proj
    if kind == "adapter":
        layer.self_attn.q_proj = Lora(linear)
    elif kind == "subclass":
        layer.self_attn.q_proj = WholeNumbers(*linear.weight.T.shape)
    elif kind == "tensor":
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    elif kind == "parametrization":
        parametrizations.weight_norm(linear)
    elif kind == "hook":
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: None)
    elif kind == "forward":
        linear.forward = lambda x: x
    elif kind == "class's forward":
        type(layer.mlp).forward = lambda self, x: x
    elif kind == "norm":
        layer.input_layernorm = nn.RMSNorm(model.config.hidden_size)
    elif kind == "activation":
        layer.mlp.act_fn = nn.ReLU()
    elif kind == "head":
        model.lm_head = WholeNumbers(*model.lm_head.weight.T.shape, bias=False)
    elif kind == "embedding":
        model.model.embed_tokens.max_norm = 1.0
    elif kind == "attention":
        layer.self_attn.forward = lambda *args, **kwargs: (None, None)


CHANGES = {
    "adapter": r"q_proj \(Lora of .* has an adapter that is not merged \(default\).*merge_and_unload\(\)",
    "subclass": r"q_proj \(WholeNumbers of .* computes something else .*a torch.nn.Linear for a projection",
    "tensor": r"q_proj .* holds its weight in a tensor of class Quantised .*dequantise",
    "parametrization": r"q_proj .* has parametrizations of weight.*remove_parametrizations",
    "hook": r"q_proj .* has a forward hook, .*change.*remove it",
    "pre-hook": r"model.layers.1 \(LlamaDecoderLayer .* has a forward pre-hook",
    "forward": r"q_proj .* has a forward of its own, .*change.*del module.forward",
    "class's forward": r"mlp \(LlamaMLP .* computes something else .*restore its class's forward",
    "norm": r"input_layernorm \(RMSNorm of torch.* computes something else",
    "activation": r"act_fn \(ReLU of .* computes something else",
    "head": r"lm_head \(WholeNumbers of .* computes something else",
    "embedding": r"embed_tokens .* computes something else",
    "attention": r"self_attn \(LlamaAttention .* has a forward of its own",
}


@pytest.fixture
def restored():
    """The class's forward that a case replaces."""
    kind = type(build("llama", layers=2).model.layers[1].mlp)
    forward = kind.forward
    yield
    kind.forward = forward


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_step_would_pass_over_is_refused_when_and_after_the_engine_is_made(kind, restored):
    model = build("llama", layers=2)
    e = Engine(model, **OPTIONS)
    e.prefill(ids[:40])
    change(kind, model)
    for call in (lambda: Engine(model, **OPTIONS), lambda: e.score(ids[40:50]), lambda: e.prefill(ids[:3])):
        with pytest.raises(ValueError, match=CHANGES[kind]):
            call()
    for call in (lambda: e.generate([], max_new_tokens=2), lambda: e.reset()):
        with pytest.raises(ValueError, match=CHANGES[kind]):
            call()
    assert e.stats()["seen"] == 40


def test_hooks_that_do_nothing_to_a_forward_are_accepted():
    model = build("llama", layers=2)
    e = Engine(model, **OPTIONS)
    cache = StreamingCache.for_model(model, **OPTIONS)
    with torch.no_grad():
        model(ids[None, :5], output_hidden_states=True)  # transformers leaves its own hooks behind
    e.score(ids[:5])
    cache.close()
    e.score(ids[5:9])
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match="global forward hook"):
        e.score(ids[9:10])
    handle.remove()
    e.score(ids[9:10])


def test_dropout_in_training_mode_is_refused():
    model = build("llama", layers=1)
    model.config.attention_dropout = 0.5
    e = Engine(model, **OPTIONS)
    model.train()
    with pytest.raises(ValueError, match=r"training mode and has dropout; call model.eval\(\)"):
        e.score(ids)
    model.eval()
    e.score(ids)


@pytest.mark.parametrize("way", ["merged", "disabled", "inactive"])
def test_adapters_that_do_not_work_are_accepted_and_noticed_when_they_do(way):
    model = build("llama", layers=2)
    adapters = with_adapters(model)

    def rest():
        for a in adapters:
            if way == "merged":
                a.merge()
            else:
                a.disable_adapters = way == "disabled"
                a.active_adapters = ["other"] if way == "inactive" else ["default"]
                a._get_available_adapters = lambda: {"default"}

    rest()
    e = Engine(model, **OPTIONS)
    assert_agrees(e, model)
    for a in adapters:
        if way == "merged":
            a.unmerge()
        a.disable_adapters, a.active_adapters = False, ["default"]
    for call in (lambda: e.score(ids), lambda: e.generate([], max_new_tokens=2), e.reset):
        with pytest.raises(ValueError, match="has an adapter that is not merged"):
            call()
    rest()
    e.reset()
    assert_agrees(e, model)


def test_an_adapter_that_is_merged_later_is_taken_by_reset():
    model = build("llama", layers=2)
    e = Engine(model, **OPTIONS)
    before = scored(e)
    adapters = with_adapters(model)
    for a in adapters:
        a.merge()
    with pytest.raises(ValueError, match=r"weights were changed .*q_proj.*engine.reset\(\)"):
        e.score(ids)
    e.reset()
    assert_agrees(e, model)
    e.reset()
    assert (scored(e) - before).abs().max() > 0.01


REPLACEMENTS = {
    "assign": lambda model, state: model.load_state_dict(state, assign=True),
    "load": lambda model, state: model.load_state_dict(state),
    "data": lambda model, state: [setattr(p, "data", state[n].clone()) for n, p in model.named_parameters()],
}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("how", ["assign", "load", "data"])
@torch.no_grad()
def test_replaced_weights_are_refused_and_taken_by_reset(how, family):
    model, other = build(family, layers=2), build(family, layers=2, seed=5)
    e, second = Engine(model, **OPTIONS), Engine(model, **OPTIONS)
    old = scored(e)
    second.prefill(ids[:30])
    hashed, address = e.model_hash, e.weights.head.data_ptr()
    REPLACEMENTS[how](model, {n: t.clone() for n, t in other.state_dict().items()})
    for call in (lambda: e.score(ids), lambda: e.prefill(ids), lambda: e.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"weights were changed after the engine was made \(.*engine.reset\(\)"):
            call()
    e.reset()
    found = scored(e)
    e.prefill(ids[:5])
    torch.testing.assert_close(found, by_cache(other), rtol=0, atol=TOLERANCE)
    assert (found - old).abs().max() > 0.01, "the new weights are others"
    assert e.weights.head.data_ptr() == address, "in the memory that a captured graph reads"
    assert e.model_hash != hashed
    with pytest.raises(ValueError, match="weights were changed"):
        second.score(ids)
    second.reset()
    torch.testing.assert_close(scored(second), found, rtol=0, atol=0)


@torch.no_grad()
def test_weights_that_change_before_the_first_token_are_taken_without_a_word():
    model, other = build("gpt_neox", layers=2), build("gpt_neox", layers=2, seed=5)
    e = Engine(model, **OPTIONS)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(scored(e), by_cache(other), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_weights_that_do_not_fit_are_refused():
    model = build("qwen3", layers=2)
    e = Engine(model, **OPTIONS)
    model.half()
    with pytest.raises(ValueError, match=r"does not fit the memory that the engine reads .*make the engine again"):
        e.score(ids)
    model = build("qwen3", layers=2)
    e = Engine(model, **OPTIONS)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"lm_head.weight does not fit .*no longer tied"):
        e.reset()


def test_a_step_asks_nothing(monkeypatch):
    e = Engine(build("llama", layers=1), **OPTIONS)
    calls = []
    watched = type(e._watch).check
    monkeypatch.setattr(type(e._watch), "check", lambda self: calls.append(1) or watched(self))
    e.generate(ids[:30], max_new_tokens=9, stop_tokens=())
    assert 0 < len(calls) <= 2
    e.step([3])
    assert len(calls) <= 2


# ---- the real libraries ----


def lora(model):
    """A PEFT model whose adapter changes the output."""
    peft = pytest.importorskip("peft")
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@torch.no_grad()
def test_a_peft_model_is_served_merged_and_refused_otherwise():
    wrapped = lora(build("llama", layers=2))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert_agrees(Engine(merged, **OPTIONS), merged)
    with pytest.raises(ValueError, match="has an adapter that is not merged"):
        Engine(wrapped, **OPTIONS)
    wrapped.merge_adapter()
    e = Engine(wrapped, **OPTIONS)
    assert_agrees(e, merged)
    out = wrapped.generate(
        input_ids=ids[None, :30], custom_generate=e.custom_generate, max_new_tokens=3, pad_token_id=0
    )
    assert out.shape == (1, 33)
    wrapped.unmerge_adapter()
    with pytest.raises(ValueError, match="has an adapter that is not merged"):
        e.generate([], max_new_tokens=2)
    with wrapped.disable_adapter():
        e.reset()
        assert_agrees(e, wrapped)
    with pytest.raises(ValueError, match="has an adapter that is not merged"):
        e.score(ids)


def test_a_model_quantised_by_torchao_is_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama", layers=2)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj .*tensor of class Int8Tensor of torchao"):
        Engine(model, **OPTIONS)
