"""Command-line options that several commands share; policy options come from the registries."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkstream.archive import CHOOSERS, PREFIX, RecallSettings
from sinkstream.archive.choosers.heads import known_heads
from sinkstream.cache import POSITIONS
from sinkstream.cli import NUMBERS, read_number
from sinkstream.data import TokenStream, load_text, random_tokens, tokenize
from sinkstream.evaluation.backends import BACKENDS, evaluation_backends
from sinkstream.evaluation.runner import Request, check_writable
from sinkstream.evaluation.settings import BASELINES, BLOCK_TOKENS, FIXED, RunSettings, method_names, method_summary
from sinkstream.measure.numerics import set_numerics
from sinkstream.models import LoadedModel, load_model, resolve_device, resolve_dtype, source_name
from sinkstream.models.placement import DTYPES
from sinkstream.models.shapes import PREFIX as RANDOM_MODEL
from sinkstream.models.shapes import shape_config
from sinkstream.policies import CAP_ACCOUNTING, SCORERS, option_specs
from sinkstream.policies.options import OptionSpec, option_fields
from sinkstream.registry import did_you_mean

RANDOM_TEXT = "random"
HEADS = PREFIX + "heads"


def recall_option_specs() -> Iterator[OptionSpec]:
    """Every setting of recall and every option of a chooser once, with their prefix."""
    seen = set[str]()
    for cls in (RecallSettings, *(c for _, c in CHOOSERS.items())):
        for spec in (OptionSpec.of(f) for f in option_fields(cls)):
            if spec.name not in seen:
                seen.add(spec.name)
                yield replace(spec, name=PREFIX + spec.name)
    yield OptionSpec(HEADS, str, None, "retrieval heads: LAYER.KV_HEAD[+LAYER.KV_HEAD], or a file of probe-heads", None)


def add_recall_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--recall`` and one flag for every setting of recall; options of a chooser are given with the policy."""
    group = parser.add_argument_group("recall")
    group.add_argument(
        "--recall",
        choices=CHOOSERS.names(),
        default=argparse.SUPPRESS,
        help="who says which evicted tokens come back; for one policy only: strict:recall=lexical:recall_level=3",
    )
    own = {PREFIX + f.name for f in option_fields(RecallSettings)}
    for spec in recall_option_specs():
        if spec.name in own:
            _add_flag(group, spec)


def add_policy_options(parser: argparse.ArgumentParser, *, caps: Callable[[str], Any] = int) -> None:
    """Add ``--policy``, ``--cap`` (read by `caps`) and one flag for every registered policy option."""
    group = parser.add_argument_group("policy", "a named policy may have other defaults")
    listed = "\n".join(f"- {name}: {method_summary(name)}" for name in method_names()).replace("%", "%%")
    group.add_argument(
        "--policy",
        type=_policies,
        default="strict",
        metavar="NAME[:OPTION=VALUE…][,NAME…]",
        help=f"one or several, each with options of its own (lazy:compress_every=64:sink=8):\n{listed}\n",
    )
    group.add_argument("--cap", type=caps, help="KV slots, growth included; the window is the cap less all other parts")
    group.add_argument("--cap-accounting", default="peak", choices=CAP_ACCOUNTING.names(), help="whether growth counts")
    group.add_argument(
        "--positions",
        default="cache",
        choices=POSITIONS,
        help="places in the cache, or indices in the stream (gaps kept)",
    )
    group.add_argument("--scorer", choices=SCORERS.names(), help="what chooses the pinned tokens; needs --refresh")
    group.add_argument(
        "--allow-untrained-positions", action="store_true", help="accept a cap above the model's trained positions"
    )
    for spec in option_specs():
        _add_flag(group, spec)


def _add_flag(group: argparse._ArgumentGroup, spec: OptionSpec) -> None:
    """Add the flag of a declared option, which leaves no attribute where it is not given."""
    told = "" if spec.default is None else f" (default: {spec.default})"
    group.add_argument(
        "--" + spec.name.replace("_", "-"),
        type=spec.type,
        choices=spec.choices,
        default=argparse.SUPPRESS,
        help=spec.help.replace("%", "%%") + told,
    )


def policy_options(args: argparse.Namespace) -> dict[str, Any]:
    """The policy options that were given."""
    names = [spec.name for spec in option_specs()]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return given | ({"scorer": args.scorer} if args.scorer else {})


def policy_settings(args: argparse.Namespace, **protocol: Any) -> list[RunSettings]:
    """Settings of every ``--policy``; `protocol` is passed to `RunSettings`. Raises ValueError if one is wrong.

    With several methods, an option that defines a method (``compress_every`` of strict) is not passed to that method,
    one of policies not to a baseline, and ``sample_every`` to recompute only.
    """
    shared, several, settings = policy_options(args), len(args.policy) > 1, []
    recalled = {n: v for n, v in vars(args).items() if n == "recall" or n.startswith(PREFIX)}
    names = ("cap", "cap_accounting", "positions", "allow_untrained_positions")
    common = {name: getattr(args, name) for name in names} | protocol
    for method, options in args.policy:
        fixed = shared if method in BASELINES else FIXED.get(method, ())
        passed = {name: value for name, value in shared.items() if not (several and name in fixed)}
        recall = {n: v for n, v in options.items() if n == "recall" or n.startswith(PREFIX)}
        own = {n: v for n, v in options.items() if n not in recall}
        recall = recall if several and method in BASELINES else recalled | recall
        sampled = {"sample_every": 1} if several and method != "recompute" else {}
        try:
            settings.append(RunSettings(method, options=passed | own, recall=recall, **(common | sampled)))
        except ValueError as error:
            message = _as_typed(str(error), recalled.keys() - options.keys() - {"recall"})
            raise ValueError(f"policy {method!r}: {message}" if several else message) from None
    return settings


def _as_typed(message: str, names: Iterable[str]) -> str:
    """A message in which options that were typed as flags are written so: ``--recall-lag -1`` for ``recall_lag=-1``."""
    for name in names:
        flag = "--" + name.replace("_", "-")
        message = re.sub(rf"\b{name}\b", flag, message).replace(flag + "=", flag + " ")
    return message


def _named_heads(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a policy with what a file of probe-heads says in its place, since a record names no path.

    Heads have one spelling, "17.1+18.2": in a list of policies another comma would begin the next one.
    """
    if not options.get(HEADS, "").endswith(".json"):
        return options | ({HEADS: options[HEADS].replace(",", "+")} if HEADS in options else {})
    try:
        found = known_heads(Path(options[HEADS]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    named = {HEADS: "+".join(f"{layer}.{head}" for layer, head in found.pop("heads"))}
    return {PREFIX + name: value for name, value in found.items()} | options | named


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and the options of its placement and precision."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="builtin", help="hub id, directory, .gguf file, builtin, or random:SHAPE")
    group.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on the CPU")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    group.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="transformers' implementation")
    group.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products")
    group.add_argument(
        "--cudnn-attention",
        action="store_true",
        help="allow cuDNN attention (cuDNN builds an execution plan for every new length)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of random weights and tokens")


def add_ray_option(group: argparse._ArgumentGroup, what: str) -> None:
    """Add ``--ray ADDRESS``: None without it, empty without an address."""
    group.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=f"{what} (default: this machine alone)")


def check_with_ray(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if options that say how Ray is used are given without ``--ray``."""
    given = next((name for name in names if getattr(args, name) is not None), None)
    if args.ray is None and given is not None:
        raise ValueError(f"--{given.replace('_', '-')} {getattr(args, given)} goes with --ray, which is not given")


def unused_option(args: argparse.Namespace, accepted: Sequence[str]) -> str | None:
    """The first option of the command line that is not among the accepted ones, with its value, as typed; else None."""
    return next((typed for option, typed in _typed_options(args) if option not in accepted), None)


def refuse_options(args: argparse.Namespace, refused: Sequence[str], why: str) -> None:
    """Raise ValueError if one of the refused options is on the command line, where it would change nothing."""
    given = next((typed for option, typed in _typed_options(args) if option in refused), None)
    if given is not None:
        raise ValueError(f"{given} {why}")


def _typed_options(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Every option of the command line, alone and with its value as typed."""
    for word, following in zip(args.argv, [*args.argv[1:], ""]):
        option, equals, _ = word.partition("=")
        if option.startswith("--"):
            switch = isinstance(getattr(args, option[2:].replace("-", "_"), None), bool)
            yield option, word if equals or switch else f"{word} {following}"


def add_text(group: argparse._ArgumentGroup, *, random: bool = False, tokens: bool = True) -> None:
    """Add ``--text``, with `tokens` also ``--tokens``; with `random`, random tokens are accepted as a text."""
    kinds = "pg19, wikitext, builtin, random" if random else "pg19, wikitext, builtin"
    group.add_argument("--text", default="builtin", help=f"{kinds}, or a text file, FILE.jsonl:FIELD or directory")
    if tokens:
        group.add_argument("--tokens", type=int, help="tokens of the text (default: the text's own protocol length)")


def add_output(group: argparse._ActionsContainer, out: str, what: str = "the records and the picture") -> None:
    """Add ``--out`` and ``--resume``, for commands that write run records."""
    group.add_argument("--out", type=Path, default=Path(out), help=f"folder of {what}")
    group.add_argument("--resume", action="store_true", help="use complete records of the same runs in --out")


def add_backend(group: argparse._ArgumentGroup) -> None:
    """Add ``--backend``, of an evaluation."""
    backends = evaluation_backends()
    listed = "; ".join(f"{name}: {BACKENDS.summary(name)}" for name in backends)
    group.add_argument("--backend", default="hf", choices=backends, help=f"what runs the model; {listed}")


def add_block_tokens(group: argparse._ArgumentGroup) -> None:
    """Add ``--block-tokens``; `block_tokens` gives its value."""
    sizes = ", ".join(f"{device} {size:,}" for device, size in BLOCK_TOKENS.items())
    group.add_argument(
        "--block-tokens", type=int, help=f"most tokens of one forward; bounds peak memory (default: {sizes})"
    )


def block_tokens(args: argparse.Namespace) -> int:
    """The block size that was given, or the default of the device."""
    if args.block_tokens is None:
        return BLOCK_TOKENS.get(resolve_device(args.device).type, RunSettings.block_tokens)
    return args.block_tokens


def check_backends(args: argparse.Namespace, settings: Sequence[RunSettings]) -> None:
    """Raise ValueError if the backend of one of the runs does not serve the run or the device; no model is needed."""
    device = resolve_device(args.device)
    for one in settings:
        BACKENDS[one.backend].check_device(device)
        BACKENDS[one.backend].check_settings(one)


def check_tokenizer(model: str, what: str) -> None:
    """Raise ValueError if `model` names random weights, which have no tokenizer; `what` says for what."""
    if source_name(model) == "random":
        shape_config(model.removeprefix(RANDOM_MODEL))
        raise ValueError(f"{model} has no tokenizer {what}; accepted: a model with one")


def load_given_model(args: argparse.Namespace) -> LoadedModel:
    """Set the numeric switches and load the model named by the options of `add_model_options`."""
    device = resolve_device(args.device)
    set_numerics(tf32=args.tf32, cudnn_attention=args.cudnn_attention)
    return load_model(
        args.model,
        dtype=resolve_dtype(args.dtype, device),
        device=device,
        attn_implementation=args.attention,
        seed=args.seed,
    )


def load_model_and_text(
    args: argparse.Namespace, settings: Sequence[RunSettings] = (), *, random: bool = False
) -> tuple[LoadedModel, TokenStream]:
    """The given model, and the given text in its tokens; with `random`, random tokens are accepted as a text.

    Before the model is loaded, the text is read, and ValueError raised for whatever does not depend on the model: a
    folder that cannot be written to, `settings` that leave nothing to decode of so many tokens.
    """
    drawn = random and args.text == RANDOM_TEXT
    if not drawn:
        check_tokenizer(args.model, f"for --text {args.text}")
    text = None if drawn else load_text(args.text)
    tokens = text.default_tokens if args.tokens is None and text is not None else args.tokens
    if tokens is None and text is None:
        raise ValueError("--text random has no length of its own; give --tokens N")
    if tokens is not None:
        if tokens < 1:
            raise ValueError(f"tokens={tokens} is not accepted; accepted: a whole number of at least 1")
        for one in settings:
            one.prefill_tokens(tokens)
    check_writable(args.out, keep=False)
    loaded = load_given_model(args)
    if text is not None:
        return loaded, tokenize(text, loaded.tokenizer, args.tokens)
    return loaded, random_tokens(loaded.model.config.vocab_size, args.tokens, args.seed)


def request(args: argparse.Namespace) -> Request:
    """What the command was asked for, with every argument, given or default."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("run", "argv")}
    return Request(args.out, arguments, args.argv, getattr(args, "seed", 0), args.resume)


def names_of(registry: Iterable[str], kind: str) -> Callable[[str], list[str]]:
    """A parser of ``a,b`` that accepts the names of a registry."""

    def parse(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",")]
        for name in names:
            if name not in registry:
                raise argparse.ArgumentTypeError(f"{kind} {name!r} is not known; accepted: {', '.join(registry)}")
        return names

    return parse


class Pooled(argparse.Action):
    """The one list of an option with ``nargs="+"`` whose ``type`` gives a list: commas, spaces, or both separate."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, [value for part in values for value in part])


def texts(text: str) -> list[str]:
    """Texts separated by commas; the name of a file may hold commas."""
    found = any(Path(name).expanduser().exists() for name in (text, text.rpartition(":")[0] or text))
    return [text] if found else [part.strip() for part in text.split(",")]


def numbers(kind: type[int] | type[float]) -> Callable[[str], list]:
    """A parser of numbers separated by commas, for an option's ``type``."""

    def parse(text: str) -> list:
        try:
            return [read_number(kind, part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not accepted; accepted: {NUMBERS[kind]}, or several, separated by commas"
            ) from None

    return parse


def _policies(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse ``NAME:OPTION=VALUE…,NAME…`` into (name, options) pairs.

    No policy begins with a digit: what does goes on with a value (``recall_heads=17.1,18.2``).
    """
    parsed = [_one_policy(part.strip()) for part in re.split(r",(?!\s*\d)", text) if part.strip()]
    if not parsed:
        raise argparse.ArgumentTypeError(f"{text!r} names no policy; accepted: {', '.join(method_names())}")
    return parsed


def _one_policy(text: str) -> tuple[str, dict[str, Any]]:
    specs = (*option_specs(), *recall_option_specs())
    types = {spec.name: spec.type for spec in specs} | {"scorer": str, "recall": str}
    name, *given = text.split(":")
    if name not in method_names():
        meant = did_you_mean(name, method_names())
        raise argparse.ArgumentTypeError(f"policy {name!r} is not known{meant}; accepted: {', '.join(method_names())}")
    options = {}
    for part in given:
        option, equals, value = part.partition("=")
        option = option.replace("-", "_")
        if not equals or option not in types:
            meant = did_you_mean(option, types)
            raise argparse.ArgumentTypeError(
                f"{part!r} in {text!r}{meant}; accepted: OPTION=VALUE with {', '.join(types)}"
            )
        if option in options:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r}: {option} is given twice; accepted: once")
        try:
            kind = types[option]
            options[option] = read_number(kind, value) if kind in NUMBERS else kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} in {text!r}: {value!r} is not accepted; accepted: {NUMBERS[types[option]]}"
            ) from None
    return name, _named_heads(options)
