"""``sinkstream bench``."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from sinkstream.bench.draw_tables import draw_table
from sinkstream.bench.draws import DrawSession
from sinkstream.bench.estimate import check_fits, long_run
from sinkstream.bench.generate import GenerateSession
from sinkstream.bench.generate_records import generate_table
from sinkstream.bench.late import LateSession
from sinkstream.bench.late_records import late_table
from sinkstream.bench.policy_session import PolicySession
from sinkstream.bench.prompt_tables import append_table, prompt_table
from sinkstream.bench.prompts import PromptSession
from sinkstream.bench.rungs import default_rung, rung_runs
from sinkstream.bench.session import BenchSession, Outcome
from sinkstream.bench.settings import CAP, LEAST_PROMPT, STEADY_TOKENS, WARMUP_TOKENS, BenchConfig, Protocol
from sinkstream.bench.snapshot_records import snapshot_table
from sinkstream.bench.snapshots import SnapshotSession
from sinkstream.bench.tables import profile_table, ratio_table, slope_lines, speed_table
from sinkstream.cli import EXIT_FAILED, EXIT_INTERRUPTED, bench_serve, options
from sinkstream.cli.options import RANDOM_TEXT
from sinkstream.cli.show import wide_console
from sinkstream.data import Text, TokenStream, load_text, random_tokens, repeating_tokens, tokenize
from sinkstream.data.tokens import PASSAGE
from sinkstream.engine import STEPS
from sinkstream.evaluation.backends import BACKENDS
from sinkstream.evaluation.runner import check_writable
from sinkstream.evaluation.settings import BASELINES, RunSettings
from sinkstream.measure.bandwidth import memory_bandwidth
from sinkstream.measure.matmul import matmul_rate
from sinkstream.measure.numerics import set_numerics
from sinkstream.measure.timing import timed
from sinkstream.models import (
    SHAPES,
    LoadedModel,
    load_model,
    resolve_device,
    resolve_dtype,
    shape_config,
    source_name,
    weight_bytes,
)
from sinkstream.models.shapes import PREFIX
from sinkstream.records.plain import new_record_id
from sinkstream.show.progress import say
from sinkstream.show.table import Table

SHAPE = "pythia-2.8b"
POLICIES = "strict,lazy:compress_every=64"
REPEATS, PROMPT_CAPS = "repeats", 4  # a text; its prompt, in caps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    options.add_policy_options(parser, caps=options.numbers(int))
    options.add_recall_options(parser)
    parser.set_defaults(model=None, policy=POLICIES, cap=str(CAP))
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--shape",
        type=options.names_of(SHAPES, "shape"),
        help=f"random weights in published shapes A,B; short for --model random:SHAPE (default: {SHAPE})",
    )
    listed = "\n".join(f"- {name}: {BACKENDS.summary(name)}" for name in BACKENDS).replace("%", "%%")
    group.add_argument(
        "--backend",
        type=options.names_of(BACKENDS, "rung"),
        metavar="RUNG[,RUNG…]",
        help=f"what is timed (default: the engine's fastest rung on a GPU, its first on a CPU):\n{listed}\n",
    )
    group.add_argument("--ladder", action="store_true", help="time every rung; say which refuse, and why")
    group.add_argument("--tokens", type=int, default=STEADY_TOKENS, help="steady tokens of each configuration")
    group.add_argument("--warmup", type=int, default=WARMUP_TOKENS, help="tokens decoded before them")
    group.add_argument("--seconds", type=float, help="time limit of the steady tokens of one configuration")
    group.add_argument(
        "--streams", type=options.numbers(int), default="1", help="streams stepped together, as in 1,2,4,8"
    )
    group.add_argument(
        "--text",
        help="feed this text again and again and record its NLL: pg19, wikitext, builtin, random, a file, or repeats:"
        " random ids in which passages come again, for policies with recall, after a prompt of 4 caps",
    )
    group.add_argument(
        "--prefill",
        type=options.numbers(int),
        help="time prompts of these lengths instead, and a turn of 50 tokens, as in 512,2048,8192,32768",
    )
    group.add_argument(
        "--engine-only",
        action="store_true",
        help="with --prefill: leave generate() with the drop-in out, which feeds adaptive policies token by token",
    )
    group.add_argument(
        "--late",
        type=options.numbers(int),
        help="time tokens of generate() with a StreamingCache instead, after so many, as in 1000,200000",
    )
    group.add_argument(
        "--generate",
        action="store_true",
        help="time tokens of generate() instead, with a StreamingCache and a dynamic cache in turns",
    )
    group.add_argument(
        "--sampling",
        action="store_true",
        help="time ways of drawing a token instead, in turns, against the likeliest one",
    )
    group.add_argument(
        "--snapshot",
        action="store_true",
        help="time a full stream to its file and back instead, beside the disk itself",
    )
    bench_serve.add_arguments(parser)
    group.add_argument("--profile", action="store_true", help="say where a step's time goes, kernel by kernel")
    group.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the records")
    group.add_argument(
        "--resume", action="store_true", help="take records from --out, and go on with interrupted long runs"
    )


def run(args: argparse.Namespace) -> int:
    """Measure the ceiling, then every model; print the tables, write the records."""
    models, protocol, given = _checked(args)
    mode = _mode(args)
    if mode is not None:
        return MODES[mode](args, models, given)
    console, device, dtype = _prepared(args)
    rungs = BACKENDS.names() if args.ladder else args.backend or [default_rung(device)]
    configs = _served(args, rungs, device)
    slots = min(args.cap) * (min(args.streams) + 1) if args.ladder else _largest_turn(args)
    for model in models:
        check_fits(model, dtype, device, slots)
    check_writable(args.out)
    ceiling = memory_bandwidth(device)
    say(console, f"{'GPU' if device.type == 'cuda' else 'CPU'}: {ceiling}")
    for model in models:
        line = long_run(model, weight_bytes(model, dtype), ceiling, protocol, configs)
        if line is not None:
            say(console, line)
    name, outcomes = new_record_id("bench"), []
    for model in models:
        load = partial(load_model, model, dtype=dtype, device=device, seed=args.seed)
        loaded, seconds = timed(load, attn_implementation=args.attention, device=device)
        text = _text(args, loaded, given)
        session = BenchSession(
            loaded, text, protocol, ceiling, seconds, options.request(args), name, lenient=args.ladder
        )
        outcomes.append(session.run(_groups(args, rungs, untrained=loaded.source == "random"), console))
        show_outcome(outcomes[-1], console, loaded.name)
        del loaded, session
        if outcomes[-1].interrupted:
            break
    say(console, f"records: {args.out}")
    return _exit_code(outcomes)


def _time_prompts(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--prefill``: measure the rate of products, then every model; print the tables, write the records."""
    console, device, dtype = _prepared(args)
    backend = _engine_backend(args, models, dtype, device, _largest_turn(args) + max(args.prefill))
    check_writable(args.out)
    ceiling = matmul_rate(device, dtype)
    say(console, f"{'GPU' if device.type == 'cuda' else 'CPU'}: {ceiling}")

    def session(loaded: LoadedModel, text: TokenStream, name: str) -> PromptSession:
        request, drop_in = options.request(args), not args.engine_only
        return PromptSession(loaded, text, args.prefill, backend, ceiling, request, name, drop_in=drop_in)

    tables = {"prompts": prompt_table, "a turn on a full stream": append_table}
    return _time_policies(args, models, given, console, dtype, device, session, tables)


def _time_late_tokens(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--late``: time every model under every policy; print the tables, write the records."""
    console, device, dtype = _prepared(args)
    check_writable(args.out)

    def session(loaded: LoadedModel, text: TokenStream, name: str) -> LateSession:
        return LateSession(loaded, text, args.late, options.request(args), name)

    return _time_policies(args, models, given, console, dtype, device, session, {"tokens of generate()": late_table})


def _time_generate(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--generate``: time every model under every policy; print the tables, write the records."""
    console, device, dtype = _prepared(args)
    for model in models:
        check_fits(model, dtype, device, 2 * max(args.cap))
    check_writable(args.out)

    def session(loaded: LoadedModel, text: TokenStream, name: str) -> GenerateSession:
        return GenerateSession(loaded, text, args.tokens, args.warmup, options.request(args), name)

    tables = {"tokens of generate()": generate_table}
    return _time_policies(args, models, given, console, dtype, device, session, tables)


def _time_draws(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--sampling``: measure every model; print the tables, write the records."""
    console, device, dtype = _prepared(args)
    backend = _engine_backend(args, models, dtype, device, _largest_turn(args))
    check_writable(args.out)

    def session(loaded: LoadedModel, text: TokenStream, name: str) -> DrawSession:
        return DrawSession(loaded, text, args.tokens, args.warmup, backend, options.request(args), name)

    return _time_policies(args, models, given, console, dtype, device, session, {"ways of drawing a token": draw_table})


def _time_snapshots(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--snapshot``: time every model under every policy; print the tables, write the records."""
    console, device, dtype = _prepared(args)
    backend = _engine_backend(args, models, dtype, device, _largest_turn(args))
    check_writable(args.out)

    def session(loaded: LoadedModel, text: TokenStream, name: str) -> SnapshotSession:
        return SnapshotSession(loaded, text, backend, options.request(args), name)

    tables = {"a stream to its file": snapshot_table}
    return _time_policies(args, models, given, console, dtype, device, session, tables)


def _measure_server(args: argparse.Namespace, models: list[str], given: Text | None) -> int:
    """``--serve``: see `bench_serve`."""
    bench_serve.check(args)
    return bench_serve.measure(args, models, *_prepared(args))


#: Option -> what times something else than steps: one stream, one record a model and policy.
MODES: dict[str, Callable[[argparse.Namespace, list[str], Text | None], int]] = {
    "prefill": _time_prompts,
    "late": _time_late_tokens,
    "generate": _time_generate,
    "sampling": _time_draws,
    "snapshot": _time_snapshots,
    "serve": _measure_server,
}
OF_GENERATE = ("late", "generate")  # modes that time transformers' loop, which has no backend
LEAST = {"prefill": 1, "late": 2}  # tokens


def _mode(args: argparse.Namespace) -> str | None:
    return next((name for name in MODES if getattr(args, name) not in (None, False)), None)


def _prepared(args: argparse.Namespace) -> tuple[Console, torch.device, torch.dtype]:
    """Console, device and dtype of a command; numeric switches are set."""
    device = resolve_device(args.device)
    set_numerics(tf32=args.tf32, cudnn_attention=args.cudnn_attention)
    return wide_console(), device, resolve_dtype(args.dtype, device)


def _engine_backend(
    args: argparse.Namespace, models: list[str], dtype: torch.dtype, device: torch.device, slots: int
) -> str:
    """The one backend that is timed. Raises ValueError if the device does not serve it, or a model does not fit."""
    backend = (args.backend or [default_rung(device)])[0]
    BACKENDS[backend].check_device(device)
    for model in models:
        check_fits(model, dtype, device, slots)
    return backend


def _time_policies(
    args: argparse.Namespace,
    models: list[str],
    given: Text | None,
    console: Console,
    dtype: torch.dtype,
    device: torch.device,
    begin: Callable[[LoadedModel, TokenStream, str], PolicySession],
    tables: Mapping[str, Callable[[list, str], Table]],
) -> int:
    """Time every model under every policy, with a session from `begin`; `tables` are shown by their titles."""
    name = new_record_id("bench")
    for model in models:
        loaded = load_model(model, dtype=dtype, device=device, seed=args.seed, attn_implementation=args.attention)
        session = begin(loaded, _text(args, loaded, given), name)
        records = session.run(
            [run for cap in args.cap for run in _policies(args, cap, loaded.source == "random")], console
        )
        for title, table in tables.items():
            console.print(table(records, f"{loaded.name}: {title}"))
        del loaded, session
    say(console, f"records: {args.out}")
    return 0


def show_outcome(outcome: Outcome, console: Console, title: str) -> None:
    """Print the tables of one model, and what was refused or failed."""
    if outcome.records:
        console.print(speed_table(outcome.records, title))
        for table in (ratio_table(outcome.records), *map(profile_table, outcome.records)):
            if table is not None:
                console.print(table)
        for line in slope_lines(outcome.records):
            say(console, line)
    for record in outcome.records:
        if record.status != "complete":
            message = f"{record.rung['name']} {record.policy['label']}: {record.status}: {record.status_reason}"
            say(console, message, "bold red")
    for word, style, entries in (("refused", "yellow", outcome.refused), ("failed", "bold red", outcome.failed)):
        for what, why in entries:
            say(console, f"{what}: {word}: {why}", style)


def _checked(args: argparse.Namespace) -> tuple[list[str], Protocol, Text | None]:
    """The models, the protocol and the text that is given, once all that needs no model is found to be right."""
    if args.shape and args.model:
        raise ValueError("--shape and --model exclude each other; accepted: --shape NAME, or --model random:NAME")
    _check_mode(args)
    if args.ladder and args.backend:
        raise ValueError("--ladder times every rung; accepted: --ladder, or --backend RUNG,RUNG")
    models = [PREFIX + name for name in args.shape] if args.shape else [args.model or PREFIX + SHAPE]
    for model in models:
        if source_name(model) == "random":
            shape_config(model.removeprefix(PREFIX))
    baseline = next((name for name, _ in args.policy if name in BASELINES), None)
    if baseline:
        raise ValueError(
            f"policy {baseline!r} is a baseline, which has a rung of its own; accepted: an eviction policy, or"
            " --backend hf-full, hf-recompute-sdpa or hf-recompute-eager"
        )
    for name in ("streams", "cap"):
        _check_least(args, name, 1)
    reads = args.text not in (None, RANDOM_TEXT, REPEATS)
    for model in models if reads else ():
        options.check_tokenizer(model, f"for --text {args.text}")
    given = load_text(args.text) if reads else None  # once, as a pipe can be, and before a model is loaded
    if args.text == REPEATS:
        _check_repeats(args)
    for cap in args.cap:
        options.policy_settings(args, cap=cap)
    forced, caps = args.text is not None, PROMPT_CAPS if args.text == REPEATS else 1
    return models, Protocol(args.tokens, args.warmup, args.seconds, forced, args.profile, caps), given


def _check_mode(args: argparse.Namespace) -> None:
    """Raise ValueError if a mode is given values or options that it does not take."""
    given = [f"--{name}" for name in MODES if getattr(args, name) not in (None, False)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; accepted: one of {', --'.join(['', *MODES])[2:]}")
    mode = _mode(args)
    if args.engine_only and mode != "prefill":
        raise ValueError("--engine-only leaves a part of --prefill out; accepted: with --prefill LENGTH,LENGTH")
    if mode != "serve":
        bench_serve.check_unused(args)
    if mode is None:
        return
    if mode in LEAST:
        _check_least(args, mode, LEAST[mode])
    if hasattr(args, "recall") or any("recall" in given for _, given in args.policy):
        raise ValueError(f"--{mode} times policies without recall; accepted: no --recall, --policy without recall=")
    others = {"--ladder": args.ladder, "--profile": args.profile, "--seconds": args.seconds}
    others["--streams"] = args.streams != [1]
    if mode in OF_GENERATE:
        others["--backend"] = args.backend
    refused = next((option for option, value in others.items() if value), None)
    if refused is not None:
        listed = ", ".join(others)
        raise ValueError(f"--{mode} times one stream and does not take {refused}; accepted: --{mode} without {listed}")
    if args.backend and (len(args.backend) > 1 or args.backend[0] not in STEPS):
        raise ValueError(
            f"--backend {','.join(args.backend)} with --{mode}; accepted: one of the engine's: {', '.join(STEPS)}"
        )


def _check_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Raise ValueError unless an option has one or several numbers of at least so much."""
    values = getattr(args, name)
    if min(values, default=least - 1) < least:
        given = ",".join(map(str, values)) or "''"
        raise ValueError(f"--{name} {given} is not accepted; accepted: whole numbers of at least {least}")


def _groups(args: argparse.Namespace, rungs: list[str], *, untrained: bool) -> list[list[BenchConfig]]:
    """Configurations that take turns, in the order of the ladder: the transformers rungs see an unpacked model."""
    groups = []
    for name in sorted(set(rungs), key=BACKENDS.names().index):
        for cap in args.cap:
            runs = rung_runs(name, _policies(args, cap, untrained))
            groups += [[BenchConfig(name, run, streams) for run in runs] for streams in args.streams]
    return groups


def _served(args: argparse.Namespace, rungs: list[str], device: torch.device) -> list[BenchConfig]:
    """What no rung refuses whatever the model; without ``--ladder`` ValueError is raised for the first refusal."""
    served = []
    for config in (config for group in _groups(args, rungs, untrained=True) for config in group):
        try:
            BACKENDS[config.rung].check_device(device)
            BACKENDS[config.rung].check_settings(config.run, config.streams)
            served.append(config)
        except ValueError as error:
            if not args.ladder:
                raise ValueError(f"{config.label}: {error}") from None
    return served


def _policies(args: argparse.Namespace, cap: int, untrained: bool) -> list[RunSettings]:
    """Every ``--policy`` at one cap; random weights (`untrained`) were trained on no positions at all."""
    allowed = args.allow_untrained_positions or untrained
    return options.policy_settings(args, cap=cap, allow_untrained_positions=allowed)


def _largest_turn(args: argparse.Namespace) -> int:
    """Cached tokens of the largest turn: all its policies and streams, and the prompt's copy of one stream."""
    return max(args.cap) * (max(args.streams) + 1) * len(args.policy)


def _text(args: argparse.Namespace, loaded: LoadedModel, given: Text | None) -> TokenStream:
    """What is fed: the text that is given, or random ids for prompts."""
    if args.text == REPEATS:
        tokens = PROMPT_CAPS * max(args.cap) + args.warmup + args.tokens
        return repeating_tokens(loaded.model.config.vocab_size, tokens, back=_back(args), seed=args.seed)
    if given is None:
        return random_tokens(loaded.model.config.vocab_size, max(LEAST_PROMPT, *args.cap), args.seed)
    return tokenize(given, loaded.tokenizer)


def _check_repeats(args: argparse.Namespace) -> None:
    """Raise ValueError unless a passage fits between its two places."""
    if _back(args) < PASSAGE:
        raise ValueError(
            f"--text repeats with --cap {max(args.cap)}: passages of {PASSAGE} tokens do not fit; accepted: a --cap of"
            f" at least {-(-2 * PASSAGE // 3)}"
        )


def _back(args: argparse.Namespace) -> int:
    """After how many tokens a passage of ``--text repeats`` comes again: half a cap after it has left the cache."""
    return max(args.cap) * 3 // 2


def _exit_code(outcomes: list[Outcome]) -> int:
    if any(outcome.interrupted for outcome in outcomes):
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(outcome.failed for outcome in outcomes) else 0
