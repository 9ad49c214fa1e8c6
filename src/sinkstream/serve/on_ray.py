"""A server's application on Ray Serve: replicas that share one folder of sessions.

Ray Serve's own router hashes the header ``x-session-id``: the requests of a session go to one replica while it lives.
Wherever a request goes, its session is found in the folder, so any replica goes on with the sessions of one that died.
"""

import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from sinkstream.ray_cluster import check_address, connect, ray_package

NAME = "sinkstream"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
RAISED = re.compile(r"[\w.]*(Error|Exception): .")
SPILL_SECONDS = 60.0  # a replica that is asked to end has so long for its sessions


@dataclass(frozen=True)
class RayOptions:
    """Where replicas run.

    Attributes
    ----------
    address : str
        Of a cluster, as for ``ray.init``; empty: a Ray of this machine's own.
    replicas : int or None
        None: as many as the cluster has GPUs for, at least 1.
    gpus, cpus : float
        Of one replica; fractions share one.
    """

    address: str
    replicas: int | None
    gpus: float
    cpus: float

    def __post_init__(self) -> None:
        if self.replicas is not None and self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas} is not accepted; accepted: a whole number of at least 1")
        for name, value in (("gpus", self.gpus), ("cpus", self.cpus)):
            if not (value >= 0 and (value <= 1 or value.is_integer())):
                raise ValueError(
                    f"--{name}-per-replica {value} is not accepted; accepted: 0 to 1, or a whole number above"
                )

    def count(self, there: dict[str, float]) -> int:
        """How many replicas the resources of a cluster are asked for. Raises ValueError if they have no place."""
        room = min(
            (int(there.get(name, 0) / share) for name, share in (("GPU", self.gpus), ("CPU", self.cpus)) if share),
            default=self.replicas or 1,
        )
        wanted = self.replicas or (max(1, room) if self.gpus else 1)
        if wanted > room:
            raise ValueError(
                f"{wanted} replicas of {self.gpus:g} GPUs and {self.cpus:g} CPUs do not fit into the cluster, which has"
                f" {there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPUs; accepted: fewer --replicas, or less"
                " --gpus-per-replica or --cpus-per-replica"
            )
        return wanted


def serve_on_ray(
    build: Callable[[int], FastAPI],
    options: RayOptions,
    *,
    host: str,
    port: int,
    most: int,
    ready: Callable[[int], None],
) -> None:
    """Serve until interrupted; then every replica spills its sessions.

    Parameters
    ----------
    build : callable
        ``build(replicas)`` makes the application of one of so many replicas, in the replica's process.
    most : int
        Requests of one replica at once; what comes on top waits.
    ready : callable
        Told the number of replicas once all of them serve.

    Raises
    ------
    ValueError
        If Ray is not installed, its address does not answer, the replicas have no place, or they cannot be started.
    """
    ray = ray_package()
    check_address(options.address)
    connect(ray, options.address)
    try:
        _serve(ray, build, options, {"host": host, "port": port, "request_timeout_s": None}, most, ready)
    finally:
        ray.shutdown()


def _serve(
    ray: Any,
    build: Callable[[int], FastAPI],
    options: RayOptions,
    http: dict[str, Any],
    most: int,
    ready: Callable[[int], None],
) -> None:
    serve, config = _ray_serve()
    if serve.status().proxies:
        raise ValueError(
            f"--ray {options.address}: Ray Serve already runs on this cluster; accepted: a cluster without it, or after"
            " `serve shutdown`"
        )
    replicas = options.count(ray.cluster_resources())

    def build_one() -> FastAPI:
        return build(replicas)

    application = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=most,
        max_constructor_retry_count=replicas,  # what a model or an option lacks, it lacks the second time too
        graceful_shutdown_timeout_s=SPILL_SECONDS,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        request_router_config=config.RequestRouterConfig(request_router_class=ROUTER),
    )(serve.ingress(build_one)()).bind()
    ends = threading.Event()
    before = {number: signal.signal(number, lambda *_: ends.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.start(proxy_location="HeadOnly", http_options=http)
        try:
            serve.run(application, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise ValueError(f"--ray: no replica could be started: {_reason(serve) or error}") from error
        ready(replicas)
        ends.wait()
    finally:
        serve.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(serve: Any) -> str:
    """What the constructor of a replica raised, as far as Ray Serve tells; empty if it does not."""
    found = serve.status().applications.get(NAME)
    told = "\n".join(one.message for one in found.deployments.values()) if found else ""
    raised = [line.strip() for line in told.splitlines() if RAISED.match(line.strip())]
    return raised[-1].partition(": ")[2] if raised else ""


def _ray_serve() -> tuple[Any, Any]:
    try:
        from ray import serve
        from ray.serve import config
    except ImportError as error:
        raise ValueError(f"--ray needs Ray Serve ({error}); pip install 'sinkstream[ray]'") from error
    return serve, config
