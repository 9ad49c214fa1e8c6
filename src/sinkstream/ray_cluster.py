"""Ray for commands with ``--ray``: the package, a cluster that answers, a connection. Nothing is imported before."""

import socket
from typing import Any

CONNECT_SEC = 5.0
DEFAULT_PORT = 6379


def ray_package() -> Any:
    """The module `ray`. Raises ValueError if it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ValueError(f"--ray needs the package ray ({error}); pip install 'sinkstream[ray]'") from error
    return ray


def check_address(address: str) -> None:
    """Raise ValueError unless something answers at HOST:PORT: Ray itself would go on trying for minutes."""
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].partition(":")
    try:
        socket.create_connection((host, int(port or DEFAULT_PORT)), timeout=CONNECT_SEC).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ray {address}: no Ray answers there ({error}); accepted: HOST:PORT of a running cluster, auto, or no"
            " address for this machine"
        ) from error


def connect(ray: Any, address: str) -> None:
    """Connect to the cluster at an address, as for ``ray.init``; empty: a Ray of this machine's own.

    Raises ValueError: nothing can be connected to.
    """
    try:
        ray.init(
            address=address or "local", ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR",
            configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--ray {address or 'local'}: cannot connect: {error}") from error
