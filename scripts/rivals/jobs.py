"""What ``run.py`` and ``recall.py`` share: options, the job of a rival, its process, and the origin of a record."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from catalogue import ENVIRONMENTS, RIVALS, Rival

from sinkstream.cli import options
from sinkstream.data import TokenStream
from sinkstream.evaluation.record import numeric_protocol
from sinkstream.measure.environment import environment, utc_now
from sinkstream.measure.metrics import token_nll
from sinkstream.measure.timing import WARMUP_TOKENS
from sinkstream.models import LoadedModel
from sinkstream.studies.rivals.record import Measured, check_same_prompt

HERE = Path(__file__).resolve().parent
SECONDS = 3600


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a model, of the rivals, their environments and where records go."""
    options.add_model_options(parser)
    parser.add_argument("--cap", type=int, required=True, help="most KV entries that a rival may hold")
    parser.add_argument(
        "--rivals", type=options.names_of(RIVALS, "rival"), default=list(RIVALS), help="names, comma-separated"
    )
    parser.add_argument("--environments", type=Path, default=Path(".rivals"), help="folder of environments.py")
    parser.add_argument(
        "--interpreter",
        action="append",
        type=_interpreter,
        default=[],
        metavar="ENVIRONMENT=COMMAND",
        help="an environment's Python",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of rival and reference (default: torch's own)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most seconds of one rival")
    parser.add_argument("--out", type=Path, default=Path("results/rivals"), help="folder of the records")


def _interpreter(text: str) -> tuple[str, list[str]]:
    name, _, command = text.partition("=")
    if name not in ENVIRONMENTS or not command:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ENVIRONMENT=COMMAND; environments: {', '.join(ENVIRONMENTS)}"
        )
    return name, command.split()


@contextmanager
def weights(loaded: LoadedModel) -> Iterator[str]:
    """A folder with the model's weights, for rivals on torch."""
    with tempfile.TemporaryDirectory(prefix="sinkstream-rivals-") as folder:
        loaded.model.save_pretrained(folder)
        yield folder


def job_of(
    rival: Rival, ids: torch.Tensor, folder: str, timed: int, loaded: LoadedModel, args: argparse.Namespace
) -> dict[str, Any]:
    """What a worker is told; `ids` (tokens,) are scored from index cap on, the first `timed` one by one."""
    return {
        "ids": ids.tolist(),
        "cap": args.cap,
        "first": args.cap,
        "timed_tokens": timed,
        "seed": args.seed,
        "threads": args.threads or torch.get_num_threads(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "folder": folder,
        "gguf": gguf_file(args.model),
        "method": rival.method,
        "options": rival.options,
    }


def interpreter(args: argparse.Namespace, rival: Rival) -> list[str]:
    """The command that starts Python in the rival's environment."""
    given = dict(args.interpreter)
    if rival.environment in given:
        return given[rival.environment]
    return [str(args.environments / rival.environment / "bin" / "python")]


def measure(rival: Rival, job: dict[str, Any], python: list[str], seconds: float) -> dict[str, Any]:
    """What the rival's worker says: figures, or an `error`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        try:
            done = subprocess.run(
                [*python, str(HERE / rival.worker), str(path)],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except FileNotFoundError:
            wanted = " ".join(ENVIRONMENTS[rival.environment])
            raise SystemExit(f"{python[0]} is missing; make it with environments.py ({wanted})") from None
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:g} s", "versions": {}}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": last, "versions": {}}


def origin(
    rival: Rival,
    found: dict[str, Any],
    measured: Measured | None,
    job: dict[str, Any],
    loaded: LoadedModel,
    stream: TokenStream,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The fields that say what ran where.

    Raises ValueError if the rival's loss of the prompt is not ours: another model, or other tokens.
    """
    checks: dict[str, Any] = {}
    if measured is not None:
        own = prompt_nll(loaded, stream.ids[: measured.prefill_tokens])
        check_same_prompt(measured.prefill_nll, own, "quantised" if rival.quantised else job["dtype"])
        checks = {"prompt_nll": measured.prefill_nll, "own_prompt_nll": own, **measured.more}
    here = environment(loaded.model.device)
    versions = {name: None for name in here["versions"]} | {"sinkstream": here["versions"]["sinkstream"]}
    here["versions"] = versions | found["versions"]
    here["cpu"]["torch_threads"] = job["threads"]
    return {
        "status": "complete" if measured else "failed",
        "status_reason": None if measured else found["error"],
        "created": utc_now(),
        "command": sys.argv,
        "arguments": vars(args),
        "environment": here,
        "model": loaded.record(),
        "data": stream.record(),
        "rival": {
            "name": rival.project,
            "method": rival.method,
            "label": rival.label,
            "options": rival.options,
            "version": found["versions"].get(rival.project),
            "positions": rival.positions,
        },
        "protocol": {
            **numeric_protocol(loaded),
            "dtype": "GGUF" if rival.quantised else job["dtype"],
            "device": job["device"],
            "seed": args.seed,
            "cap": args.cap,
            "prefill_tokens": measured.prefill_tokens if measured else None,
            "decode_tokens": len(measured.index) if measured else None,
            "warmup_tokens": WARMUP_TOKENS,
            "evaluate": "blocks" if rival.options.get("blocks") else "steps",
            "call": rival.call,
            "feed": "text" if rival.call == "forward" else "greedy",
            "peak_slots": max(measured.kv_length) if measured else None,
        },
        "checks": checks,
    }


@torch.inference_mode()
def prompt_nll(loaded: LoadedModel, ids: torch.Tensor) -> float:
    """Our own mean NLL, in nats a token, of a prompt (tokens,) that is forwarded at once."""
    ids = ids.to(loaded.model.device)
    logits = loaded.model(ids[None]).logits[0, :-1]
    return float(token_nll(logits, ids[1:]).mean())


def gguf_file(model: str) -> str | None:
    """The GGUF file of a model, or None."""
    if model == "builtin":
        from sinkstream.models.gguf_file import builtin_file

        return str(builtin_file())
    return model if model.endswith(".gguf") else None
