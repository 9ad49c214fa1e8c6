"""``sinkstream serve``."""

import argparse
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from sinkstream.cli.options import (
    add_model_options,
    add_ray_option,
    check_tokenizer,
    check_with_ray,
    load_given_model,
    refuse_options,
)
from sinkstream.engine.steps import STEPS
from sinkstream.evaluation.backends import BACKENDS
from sinkstream.measure.memory import old_objects_aside
from sinkstream.models import resolve_device
from sinkstream.models.gguf_file import cache_dir
from sinkstream.policies.options import OptionSpec, option_fields
from sinkstream.serve import ServeSettings, Service
from sinkstream.serve.files import SessionFiles

INSTALL = "sinkstream serve needs {}: pip install 'sinkstream[serve]'"
KEY_VARIABLE = "SINKSTREAM_API_KEY"
SHUTDOWN_SECONDS = 10


def default_backend(device: str | None) -> str:
    """The backend of the engine where none is named: kernels under a graph on a GPU, plain PyTorch on a CPU."""
    return "fused" if resolve_device(device).type == "cuda" else "ring"


def add_serve_settings(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> None:
    """Add the options of `ServeSettings`, or those of these names, and the backend."""
    group = parser.add_argument_group("sessions and limits")
    for field in option_fields(ServeSettings):
        if names and field.name not in names:
            continue
        spec, flag = OptionSpec.of(field), "--" + field.name.replace("_", "-")
        if spec.type is bool:
            group.add_argument(flag, action="store_true", help=spec.help)
        else:
            group.add_argument(flag, type=spec.type, default=spec.default, choices=spec.choices, help=spec.help)
    group.add_argument("--backend", choices=STEPS.names(), help="engine backend (default: fused on a GPU, else ring)")
    group.add_argument(
        "--allow-untrained-positions", action="store_true", help="accept a cap above the model's trained positions"
    )


def check_recall(args: argparse.Namespace) -> None:
    """Raise ValueError if options of recall are given beside ``--recall none``."""
    if args.recall == "none":
        refuse_options(args, ("--recall-slots", "--recall-tokens"), "goes with --recall lexical, not with none")


def make_service(args: argparse.Namespace, spill: Path | None, *, durable: bool = True, **more: Any) -> Service:
    """The service that the options of `add_model_options` and `add_serve_settings` ask for, and `more` settings."""
    check_recall(args)
    settings = ServeSettings.of(vars(args) | {"spill": spill} | more)
    backend = args.backend or default_backend(args.device)
    BACKENDS[backend].check_device(resolve_device(args.device))
    check_tokenizer(args.model, "to read and write text with")
    loaded = load_given_model(args)
    return Service(
        loaded,
        settings,
        backend=backend,
        allow_untrained_positions=args.allow_untrained_positions,
        durable=durable,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    add_serve_settings(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    group.add_argument("--api-key-file", type=Path, help=f"file with one API key a line; or one key in ${KEY_VARIABLE}")
    group.add_argument("--no-api-key", action="store_true", help="listen beyond this machine without any key")
    group.add_argument(
        "--spill", type=Path, help="folder of spilled and saved sessions (default: sessions/ in the cache folder)"
    )
    group.add_argument("--no-spill", action="store_true", help="write no session to disk")
    group = parser.add_argument_group("Ray Serve")
    add_ray_option(group, "serve with replicas on the Ray cluster at ADDRESS, which share the --spill folder")
    group.add_argument("--replicas", type=int, help="with --ray: replicas (default: one for each GPU, or 1)")
    group.add_argument(
        "--gpus-per-replica", type=float, help="with --ray: fractions share a GPU (default: 1 on a GPU, else 0)"
    )
    group.add_argument("--cpus-per-replica", type=float, help="with --ray: fractions share a CPU (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; then spill every session."""
    try:
        import uvicorn

        from sinkstream.serve.app import LOOPBACK, create_app
    except ImportError as error:
        raise ImportError(INSTALL.format(error.name)) from None
    check_with_ray(args, "replicas", "gpus_per_replica", "cpus_per_replica")
    if args.no_spill and args.spill is not None:
        raise ValueError(f"--spill {args.spill} and --no-spill exclude each other; accepted: one of them")
    keys = api_keys(args.api_key_file)
    check_exposure(args.host, keys, args.no_api_key)
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    where = f"{address} (OpenAI API: {address}/v1), {'API key' if keys else 'no API key'}"
    hosts = LOOPBACK if is_loopback(args.host) else None
    spill = None if args.no_spill else args.spill or cache_dir() / "sessions"
    if args.ray is not None:
        listening.close()  # Ray's proxy takes the port
        return _run_on_ray(args, spill, keys, hosts, host, port, where)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    service = make_service(args, spill)
    service.store.spill.files.lock()
    settings, kept = service.settings, len(service.store.sessions)
    listening.listen()  # who reads the address may connect at once
    print(
        f"{service.loaded.name}, {service.backend} backend, {settings.cap} slots a session: {where},"
        f" {kept} spilled sessions found",
        flush=True,
    )
    config = uvicorn.Config(
        create_app(service, keys, hosts), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    with old_objects_aside():  # no stream waits for a full collection
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _run_on_ray(
    args: argparse.Namespace,
    spill: Path | None,
    keys: list[str],
    hosts: tuple[str, ...] | None,
    host: str,
    port: int,
    where: str,
) -> int:
    from sinkstream.serve.on_ray import RayOptions, serve_on_ray  # which imports Ray

    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {args.device} with --ray is not accepted; accepted: cpu, cuda: Ray gives the GPU")
    spill = spill and spill.resolve()
    if Path(args.model).exists():  # replicas have a working directory of their own
        args.model = str(Path(args.model).resolve())
    check_recall(args)
    settings = ServeSettings.of(vars(args) | {"spill": spill, "shared": True})
    gpus = args.gpus_per_replica
    if gpus is None:
        gpus = 0.0 if resolve_device(args.device).type == "cpu" else 1.0
    cpus = 1.0 if args.cpus_per_replica is None else args.cpus_per_replica
    options = RayOptions(args.ray, args.replicas, gpus, cpus)
    files = SessionFiles(spill, settings.disk_mb)
    files.lock()
    given = {name: value for name, value in vars(args).items() if name != "run"}

    def build(replicas: int):
        from argparse import Namespace

        from sinkstream.cli.serve import make_service
        from sinkstream.measure.memory import set_old_objects_aside
        from sinkstream.serve.app import create_app

        app = create_app(make_service(Namespace(**given), spill, shared=True, replicas=replicas), keys, hosts)
        set_old_objects_aside()
        return app

    def ready(replicas: int) -> None:
        count = len(files.sessions())
        print(f"{replicas} replicas on Ray, {settings.cap} slots a session: {where}, {count} spilled sessions found")
        sys.stdout.flush()

    serve_on_ray(build, options, host=host, port=port, most=2 * settings.queue, ready=ready)
    return 0


def api_keys(path: Path | None) -> list[str]:
    """The API keys of a file, or the one of the environment. Raises ValueError for a file without any."""
    if path is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return [key] if key else []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path} cannot be read: {error}") from None
    if not keys:
        raise ValueError(f"--api-key-file {path} is empty; accepted: one key a line")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, keys: list[str], no_key: bool) -> None:
    """Refuse to listen beyond this machine without a key, unless asked for by name. Raises ValueError."""
    if not (is_loopback(host) or keys or no_key):
        raise ValueError(
            f"--host {host} can be reached by other machines; accepted: with --api-key-file FILE or {KEY_VARIABLE},"
            " or with --no-api-key"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError if the address or port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error}; accepted: a free --port (0 takes one), an address of this"
            " machine"
        ) from None
    return found
