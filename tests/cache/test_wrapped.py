"""Models inside wrappers, with hooks, quantised or compiled: a cache is as right there as for the plain model."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from oracle.models import build, token_ids
from streams import PAD, TOLERANCE, feed, make_cache, prompt_of, small_policy
from torch import nn

from sinkstream.cache import inner_model
from sinkstream.compat import with_cache

ids = token_ids(120)[None]
SIZES = (40, 7, 30)


class FakePeft(nn.Module):
    """As PEFT wraps: a model in a tuner in a model, of which only the inner one is transformers'."""

    class Tuner(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.peft_config = model, {}

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    def __init__(self, model):
        super().__init__()
        self.base_model = FakePeft.Tuner(model)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args, **kwargs):
        return self.get_base_model().generate(*args, **kwargs)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    torch._dynamo.reset()
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WRAPPERS = {
    "peft": FakePeft,
    "peft twice": lambda model: FakePeft(model).base_model,
    "data parallel": lambda model: nn.DataParallel(model, device_ids=[]),
    "compiled": compiled,
    "compiled peft": lambda model: compiled(FakePeft(model)),
    "compiled in place": compiled_in_place,
    "compiled forward": compiled_forward,
}
POLICIES = ["strict", "lazy", "refresh-window-attention", "refresh-accumulated-attention", "refresh-uncertainty"]
CASES = [(w, p) for w in WRAPPERS for p in POLICIES if "compiled" not in w]
CASES += [("compiled", "lazy"), ("compiled in place", "refresh-window-attention"), ("compiled peft", "strict")]
CASES += [("compiled forward", "refresh-uncertainty")]  # compiling takes seconds


@pytest.mark.parametrize(("wrapper", "policy"), CASES)
@torch.no_grad()
def test_a_wrapped_model_is_as_right_as_the_plain_one(wrapper, policy):
    options = small_policy(policy)
    plain = build("llama", layers=1)
    reference = make_cache(plain, options)
    sizes = SIZES if reference.policy.plan_known else (6,)
    wanted = feed(plain, reference, ids, sizes)
    wrapped = WRAPPERS[wrapper](build("llama", layers=1))
    cache = make_cache(wrapped, options)
    found = feed(wrapped, cache, ids, sizes)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert cache.stats() == reference.stats() and cache.stats()["events"] > 0


@pytest.mark.parametrize(
    ("wrapper", "policy"),
    [
        ("peft", "strict"),
        ("peft", "refresh-uncertainty"),
        ("compiled", "refresh-uncertainty"),
        ("compiled in place", "strict"),
    ],
)
def test_generate_of_a_wrapper_takes_prompts_of_any_length(wrapper, policy):
    options = small_policy(policy)
    plain, long = build("llama", layers=1), prompt_of(700)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    wanted = plain.generate(input_ids=long, **with_cache(plain, make_cache(plain, options)), **given)
    wrapped = WRAPPERS[wrapper](build("llama", layers=1))
    cache = make_cache(wrapped, options)
    assert wrapped.generate(input_ids=long, **with_cache(plain, cache), **given).equal(wanted)


@torch.no_grad()
def test_wrapping_after_the_cache_was_made_changes_nothing():
    options, model = small_policy("strict"), build("llama", layers=2)
    wanted = feed(model, make_cache(model, options), ids, SIZES)
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :60], (40, 20))
    for wrapper in (FakePeft, lambda m: nn.DataParallel(m, device_ids=[])):
        more = ids[:, cache.seen_tokens : cache.seen_tokens + 10]
        start = torch.cat([start, feed(wrapper(model), cache, more)], 1)
    torch.testing.assert_close(start, wanted[:, : start.shape[1]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention"])
@torch.no_grad()
def test_compiling_after_the_cache_was_made_is_right(policy):
    """Nothing is compiled again when another model, whose cache is older, dies."""
    from torch._dynamo.utils import counters

    options, other, model = small_policy(policy), build("llama", layers=1), build("llama", layers=2)
    others = [other, make_cache(other, options)]
    wanted = feed(model, make_cache(model, options), ids[:, :51], (6,))
    cache, dead = make_cache(model, options), weakref.ref(other)
    wrapped = compiled(model)
    found = feed(wrapped, cache, ids[:, :50], (6,))
    del other
    others.clear()
    gc.collect()
    counters.clear()
    found = torch.cat([found, feed(wrapped, cache, ids[:, 50:51])], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert dead() is None and not counters["frames"]["total"]


@torch.no_grad()
def test_a_compiled_model_has_no_break_inside_a_layer_and_compiles_no_more():
    """The graphs of a prompt and of a step, each cut at the hooks; then nothing is compiled again."""
    from torch._dynamo.utils import counters

    model = compiled(build("llama", layers=2))
    cache = make_cache(model, small_policy("lazy"))
    counters.clear()
    for i, piece in enumerate(token_ids(430).split([30, *[1] * 400])):
        model(piece[None].clone(), **with_cache(model, cache))  # a view's offset of 0 or 1 is compiled for itself
        if i == 1:
            graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
            assert graphs == 4 and breaks and all("torch.compiler.disable" in why for why in breaks), breaks
    assert counters["stats"]["unique_graphs"] == graphs and cache.stats()["events"] > 20
    pickle.loads(pickle.dumps(model._orig_mod))
    cache.close()
    assert model._orig_mod.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_compiled_forward_without_its_cache_is_an_ordinary_one():
    model = build("llama", layers=2)
    wanted = model(ids).logits
    wrapped = compiled(model)
    cache = make_cache(wrapped, small_policy("strict"))
    torch.testing.assert_close(wrapped(ids).logits, wanted, rtol=0, atol=TOLERANCE)
    assert cache.seen_tokens == 0


@torch.no_grad()
def test_hooks_on_layers_run_once_a_forward_and_act():
    options, model = small_policy("strict"), build("llama", layers=2)
    seen = []

    def halve(module, args, output):
        seen.append(output.shape[1])
        return output * 0.5

    hooked = copy.deepcopy(model)
    hooked.model.layers[1].mlp.register_forward_hook(halve)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    wanted = feed(model, make_cache(model, options), ids, SIZES)
    found = feed(hooked, make_cache(hooked, options), ids, SIZES)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert len(seen) == len(SIZES) + ids.shape[1] - sum(SIZES) and sum(seen) == ids.shape[1]


class Int8Linear(nn.Module):
    """A stand-in for a quantised projection: whole numbers and a scale."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("whole", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.whole.to(x.dtype) * self.scale)


@torch.no_grad()
def test_a_quantised_model_agrees_with_the_same_weights_dequantised():
    options, model = small_policy("lazy"), build("llama", layers=2)
    plain = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, plain.model.layers):
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
        other.mlp.up_proj.weight.copy_(layer.mlp.up_proj.whole * layer.mlp.up_proj.scale)
    wanted = feed(plain, make_cache(plain, options), ids, SIZES)
    found = feed(model, make_cache(model, options), ids, SIZES)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def test_what_holds_no_model_is_refused():
    with pytest.raises(ValueError, match=r"model=Linear is not accepted; accepted: a transformers model, alone or"):
        make_cache(nn.Linear(2, 2), small_policy("strict"))
    several = nn.DataParallel(build("llama", layers=1), device_ids=[])
    several.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel over 2 devices .*accepted: one device"):
        make_cache(several, small_policy("strict"))


# ---- the real libraries ----


def lora(model, **options):
    """A PEFT model whose adapter changes the output."""
    peft = pytest.importorskip("peft")
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("disabled", [False, True])
@torch.no_grad()
def test_a_peft_model_agrees_with_its_merged_weights(disabled):
    options = small_policy("lazy")
    wrapped = lora(build("llama", layers=2))
    merged = build("llama", layers=2) if disabled else copy.deepcopy(wrapped).merge_and_unload()
    wanted = feed(merged, make_cache(merged, options), ids, SIZES)
    for model in (wrapped, wrapped.get_base_model()):
        with wrapped.disable_adapter() if disabled else contextlib.nullcontext():
            found = feed(wrapped, make_cache(model, options), ids, SIZES)
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_cache_goes_on_when_its_model_gets_an_adapter():
    """The keys that are held stay those of the weights before; the tokens that follow are of the adapter."""
    options, model = small_policy("strict"), build("llama", layers=2)
    cache = make_cache(model, options)
    feed(model, cache, ids[:, :60], (40, 20))
    wrapped = lora(model)
    before = feed(wrapped, cache, ids[:, 60:])
    with wrapped.disable_adapter():
        assert inner_model(wrapped) is model
        cache.reset()
        wanted = feed(model, cache, ids, SIZES)
    assert (before - wanted[:, 60:]).abs().mean() > 0.01


def test_prompt_tuning_is_refused_by_name():
    peft = pytest.importorskip("peft")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    wrapped = peft.get_peft_model(build("llama", layers=1), peft.PromptTuningConfig(**options))
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        make_cache(wrapped, small_policy("strict"))


@torch.no_grad()
def test_a_model_quantised_by_torchao_agrees_with_the_dequantised_one():
    quantization = pytest.importorskip("torchao.quantization")
    options, model = small_policy("lazy"), build("llama", layers=2)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    plain = build("llama", layers=2)
    plain.load_state_dict(
        {n: t.dequantize() if hasattr(t, "dequantize") and t.dtype.is_floating_point and type(t) is not torch.Tensor
         else t for n, t in model.state_dict().items()}
    )  # fmt: skip
    wanted = feed(plain, make_cache(plain, options), ids, SIZES)
    found = feed(model, make_cache(model, options), ids, SIZES)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
