"""GPT-NeoX layers in one persistent kernel on the card: numerics first, then times. Run at the root of the worktree.

PYTHONPATH=src:tools python neoxk_gpu.py            # JSON in $OUT/neoxk.json
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

START = time.monotonic()
OUT = Path(os.environ.get("OUT", "."))
LIMIT = 165.0


def left() -> float:
    return LIMIT - (time.monotonic() - START)


def say(*words) -> None:
    print(f"[{time.monotonic() - START:5.1f}]", *words, flush=True)


def configs(config):
    default = config()
    found = [replace(default, early=1, lead=lead) for lead in (4, 2, 3, 1)]
    found += [replace(default, early=0, lead=lead) for lead in (4, 2)]
    found += [replace(default, lead=0)]
    found += [replace(default, early=2, lead=lead) for lead in (4, 2)]
    found += [replace(default, rows=32, early=0, lead=lead) for lead in (4, 2)]
    small = replace(default, warps=4, per_sm=2, rows=4, out_rows=4)
    found += [small, replace(small, lead=2), replace(default, warps=16), replace(default, slots=128)]
    return found


def perturb(model, torch) -> None:
    """Biases and norms off their defaults, so that a forgotten one shows."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(7)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            noise = torch.randn(p.shape, generator=generator, device=p.device) * 0.1
            p.data.copy_(noise if name.endswith("bias") else 1 + noise)


def tests(dry: bool) -> dict:
    """The project's own tests of the kernel, in processes of their own: a hang ends there."""
    env = os.environ | {"PYTHONPATH": "src"} | ({"TRITON_INTERPRET": "1"} if dry else {})
    chosen = {"kernels": ["tests/kernels/test_persistent_neox.py", "tests/kernels/test_persistent_llama.py"]}
    if not dry:
        chosen["engine"] = ["tests/engine/test_fused.py", "-k", "in_one_kernel and gpt_neox"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "5", "-p", "no:cacheprovider"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return {name: subprocess.Popen(command + files, env=env, **pipes) for name, files in chosen.items()}


def results(processes: dict, report: dict) -> None:
    """Wait for the tests and keep how they ended."""
    for name, process in processes.items():
        try:
            tail, rc = process.communicate(timeout=max(1.0, left() - 40))[0], process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            tail, rc = process.communicate()[0] or "", "timeout"
        report["tests"][name] = {"rc": rc, "tail": tail[-3000:]}
        say(f"tests of {name}: rc {rc}", tail.strip().splitlines()[-1:])
        if rc != 0:
            print(tail[-2500:], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true", help="on a CPU with the twins of a small shape")
    options = parser.parse_args()
    processes = tests(options.dry)
    import torch
    from tune_kernels.measure import Measurements, compile_one
    from tune_kernels.shapes import SHAPES

    from sinkstream.kernels.config import PersistentNeoxConfig
    from sinkstream.kernels.plans import LAYERS, MB, OpLaunch, measured_plan
    from sinkstream.measure.bandwidth import memory_bandwidth

    names = ["pythia-14m"] if options.dry else ["pythia-160m", "pythia-410m"]
    device = "cpu" if options.dry else "cuda"
    tried = configs(PersistentNeoxConfig)[:2] if options.dry else configs(PersistentNeoxConfig)
    report = {"torch": torch.__version__, "device": device if options.dry else torch.cuda.get_device_name()}
    report |= {"steps": [], "tests": {}, "engines": [], "problems": []}
    pool, futures = None, {}
    if not options.dry:
        pool = ProcessPoolExecutor(11, mp_context=get_context("spawn"))
        for config in tried:
            for name in names:
                futures[name, config] = pool.submit(compile_one, name, 1, LAYERS, OpLaunch(config, 6 * MB))
    results(processes, report)
    save(report)
    if report["tests"]["kernels"]["rc"] == "timeout":
        print("the kernel hangs: nothing else was run")
        return
    bandwidth = memory_bandwidth(device, **({"size": 1 << 22} if options.dry else {"size": 1 << 30}))
    report["copy_gbs"] = bandwidth.copy_gbs
    say(bandwidth)
    for name in names:
        best = steps_of(name, device, tried, futures, bandwidth, report, Measurements, measured_plan, SHAPES)
        save(report)
        torch.cuda.empty_cache()
        if left() > 12:
            try:
                engine_of(name, device, best or tried[0], bandwidth, report)
            except Exception as problem:
                report["problems"].append(f"{name}, engine: {type(problem).__name__}: {str(problem)[:600]}")
                say(report["problems"][-1])
        save(report)
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    table(report)


def steps_of(name, device, tried, futures, bandwidth, report, Measurements, measured_plan, SHAPES):
    """Every configuration: hidden state and logits against the twin, then a whole step as a CUDA graph."""
    from tune_kernels.step import Checks

    from sinkstream.kernels.plans import LAYERS, MB, OpLaunch

    kernels = "torch" if device == "cpu" else "triton"
    m = Measurements(SHAPES[name], device, None, float("inf"), bandwidth.copy_gbs, kernels=kernels)
    for layer in m.step.weights.layers:
        for tensor in (layer.bias_in, layer.bias_out, layer.attention_norm.bias, layer.mlp_norm.bias):
            tensor.normal_(0, 0.1)
        for norm in (layer.attention_norm, layer.mlp_norm):
            norm.weight.normal_(1, 0.1)
    m.checks = Checks(m.step, kernels)
    floor_ms = m.shape.step_bytes / bandwidth.copy_gbs / 1e6
    plan = measured_plan(True, m.step.sizes) if device != "cpu" else dict.fromkeys(m.shape.ops, OpLaunch())
    rows = [{"shape": name, "config": "ops", "error": m.checks.logits(plan), "ms": m.time_step(plan, "ops"),
             "floor_ms": floor_ms}]  # fmt: skip
    say(name, f"floor {floor_ms:.4f} ms, ops {rows[0]['ms']:.4f} ms, error of their logits {rows[0]['error']:.2g}")
    best = None
    for config in tried:
        if left() < (40 if name == "pythia-160m" else 16):
            break
        row = {"shape": name, "config": asdict(config), "floor_ms": floor_ms}
        rows.append(row)
        try:
            if (name, config) in futures:
                futures[name, config].result(timeout=15)
            trial = plan | {LAYERS: OpLaunch(config, 6 * MB)}
            m.step.use(trial)
            row["grid"] = asdict(m.step.persistent.grid) if m.step.persistent.grid else None
            row["error"] = m.checks.logits(trial)
            row["ms"] = m.time_step(trial, "persistent")
            if best is None or row["ms"] < best[0]:
                best = row["ms"], config
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem)[-300:]}"
            if "CUDA error" in str(problem):
                raise
        figures = (
            "" if "failed" in row else f"{row['ms']:.4f} ms, {row['ms'] / floor_ms:.3f} x, error {row['error']:.2g}"
        )
        say(" ", brief(config), row.get("failed", figures))
    rows.append({"shape": name, "config": "ops", "again": True, "ms": m.time_step(plan, "ops"), "floor_ms": floor_ms})
    if best is not None and left() > 25 and device != "cpu":
        for size in (0, 2 * MB, 16 * MB):
            ms = m.time_step(plan | {LAYERS: OpLaunch(best[1], size)}, "persistent")
            rows.append({"shape": name, "config": asdict(best[1]), "prefetch_mb": size // MB})
            rows[-1] |= {"ms": ms, "floor_ms": floor_ms}
    report["steps"] += rows
    del m
    return best[1] if best else None


def engine_of(name, device, config, bandwidth, report) -> None:
    """In an engine: against transformers on a short text, against the ring past evictions, then times in turns."""
    import torch

    from sinkstream.engine import Engine
    from sinkstream.kernels.plans import MB, PERSISTENT_NEOX_PLANS, OpLaunch
    from sinkstream.models.loaded import LoadRequest
    from sinkstream.models.shapes import empty_model, fill_random, shape_config
    from sinkstream.policies import EvictionPolicy

    cuda = device != "cpu"
    request = LoadRequest(torch.float16 if cuda else torch.float32, torch.device(device), "sdpa", 0)
    model = empty_model(shape_config(name), request)
    fill_random(model, 0)
    perturb(model, torch)
    model = model.eval().requires_grad_(False)
    wide = copy.deepcopy(model).float()
    ids = torch.randint(0, model.config.vocab_size, (2400,), generator=torch.Generator().manual_seed(3)).to(device)
    PERSISTENT_NEOX_PLANS[model.config.hidden_size] = OpLaunch(config, 6 * MB)
    one, ops = ("fused", "fused-ops") if cuda else ("kernels", "ring")
    row = {"shape": name, "config": asdict(config)}
    report["engines"].append(row)
    with torch.no_grad():
        expected = wide(ids[None, :160]).logits[0]
    strict = {"policy": EvictionPolicy.build(sink=4, cap=2052), "allow_untrained_positions": True}
    for label, backend in (("persistent", one), ("ops", ops)):
        engine = Engine(model, backend=backend, **strict)
        found = torch.stack([engine.step(ids[i : i + 1])[0].float().clone() for i in range(160)])
        row[f"{label}_over_transformers"] = float((found - expected).norm() / expected.norm())
        row[f"{label}_persistent_layers"] = engine.stats()["persistent_layers"]
        del engine
    with torch.no_grad():
        low = model(ids[None, :160]).logits[0].float()
    row["half_over_transformers"] = float((low - expected).norm() / expected.norm())
    row["control_other_tokens"] = float((expected.roll(1, 0) - expected).norm() / expected.norm())
    del wide
    say(f"  {name} logits against transformers in float32: persistent {row['persistent_over_transformers']:.2g}, ops"
        f" {row['ops_over_transformers']:.2g}, transformers in half {row['half_over_transformers']:.2g}, control"
        f" {row['control_other_tokens']:.2g}")  # fmt: skip
    lazy = {"policy": EvictionPolicy.build(sink=4, cap=320, compress_every=32, refresh=32, scorer="uniform")}
    text = ids[: 700 if cuda else 400]
    scored = {b: Engine(model, backend=b, **lazy).score(text)[1:] for b in (one, ops)}
    other = Engine(model, backend=ops, policy=EvictionPolicy.build(sink=0, cap=160)).score(text)[1:]
    row["nats_persistent_ops"] = float((scored[one] - scored[ops]).abs().mean())
    row["nats_control"] = float((scored[ops] - other).abs().mean())
    say(f"  {name} past evictions, nats a token between persistent and ops {row['nats_persistent_ops']:.2g}, control"
        f" {row['nats_control']:.2g}")  # fmt: skip
    engines = {label: Engine(model, backend=b, **strict) for label, b in (("persistent", one), ("ops", ops))}
    tokens, rounds = (300, 7) if cuda else (20, 3)
    times = {label: [] for label in engines}
    for engine in engines.values():
        engine.prefill(ids[: 2200 if cuda else 300])
        engine.generate([], max_new_tokens=64, stop_tokens=())
    for _ in range(rounds):
        for label, engine in engines.items():
            torch.cuda.synchronize() if cuda else None
            begin = time.perf_counter()
            engine.generate([], max_new_tokens=tokens, stop_tokens=())
            torch.cuda.synchronize() if cuda else None
            times[label].append(1e3 * (time.perf_counter() - begin) / tokens)
    size = engines["ops"].weights.step_bytes + engines["ops"].state.keys.nbytes + engines["ops"].state.values.nbytes
    row |= {"times_ms": times, "floor_ms": bandwidth.milliseconds(size)}
    row |= {f"{label}_ms": statistics.median(t) for label, t in times.items()}
    PERSISTENT_NEOX_PLANS.clear()


def brief(config) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(config).items())


def save(report) -> None:
    (OUT / "neoxk.json").write_text(json.dumps(report, indent=1))


def table(report) -> None:
    ended = ", ".join(f"{name} rc {t['rc']}" for name, t in report["tests"].items())
    print(f"\n{report['device']}, copy {report['copy_gbs']:.0f} GB/s; tests: {ended}")
    print(f"{'whole step as a CUDA graph':64} {'ms':>8} {'x floor':>8} {'error':>8}")
    for name in dict.fromkeys(row["shape"] for row in report["steps"]):
        rows = [r for r in report["steps"] if r["shape"] == name]
        timed = sorted((r for r in rows if "ms" in r), key=lambda r: r["ms"])
        for r in timed[:6] + [r for r in timed[6:] if r["config"] == "ops"]:
            config = r["config"] if r["config"] == "ops" else " ".join(f"{k}={v}" for k, v in r["config"].items())
            config += f" head {r['prefetch_mb']} MB" if "prefetch_mb" in r else ""
            figures = f"{r['ms']:8.4f} {r['ms'] / r['floor_ms']:8.3f} {r.get('error', 0):8.2g}"
            print(f"{name} {config:{63 - len(name)}} {figures}")
        for r in rows:
            if "failed" in r:
                print(f"{name} failed: {r['config']}: {r['failed'][:200]}")
    print(f"{'in an engine, median of 7 x 300 tokens':40} {'persistent':>18} {'ops':>18} {'ratio':>7}")
    for r in report["engines"]:
        if "ops_ms" in r:
            one, ops = (f"{r[k]:.4f} ({r[k] / r['floor_ms']:.3f} x)" for k in ("persistent_ms", "ops_ms"))
            print(f"{r['shape']:40} {one:>18} {ops:>18} {r['persistent_ms'] / r['ops_ms']:7.3f}")
    for problem in report["problems"]:
        print(problem)
    say("done")


if __name__ == "__main__":
    main()
