"""Whether a server can answer, and its replicas: what a load balancer asks, and what a monitor asks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sinkstream import __version__
from sinkstream.serve.heartbeats import Heartbeat, Heartbeats

ENDING = "health"
SERVES, FAILED, GONE = "serves", "failed", "gone"  # of one replica


@dataclass(frozen=True)
class Health:
    """The answer to /health.

    Attributes
    ----------
    status : {"ok", "degraded", "failed"}
        Degraded: requests are answered, by fewer replicas than there should be.
    """

    status: str
    about: dict[str, Any]

    def code(self, require: str) -> int:
        """The HTTP status, where a replica, "any", or "all" of them are required."""
        return 200 if self.status == "ok" or (self.status == "degraded" and require == "any") else 503

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"status": self.status, "version": __version__, **self.about}


def told(alive: bool, counts: dict[str, int]) -> str:
    """What a server tells the others of its folder."""
    return json.dumps({"state": SERVES if alive else FAILED, **counts})


def health_of_one(alive: bool, counts: dict[str, int]) -> Health:
    """The health of a server that has no replicas."""
    return Health("ok" if alive else "failed", counts)


def health_of_all(beats: Heartbeats, expected: int) -> Health:
    """The health of all servers of a folder, of which there should be so many."""
    replicas = [_replica(beat) for beat in beats.read(ENDING)]
    serving = [replica for replica in replicas if replica["state"] == SERVES]
    about = {
        "running": _sum(serving, "running"),
        "waiting": _sum(serving, "waiting"),
        "expected": expected,
        "serving": len(serving),
        "replicas": replicas,
    }
    status = "ok" if len(serving) >= expected else "degraded" if serving else "failed"
    return Health(status, about)


def _replica(beat: Heartbeat) -> dict[str, Any]:
    try:
        told_by_it = json.loads(beat.text)
        found = {name: told_by_it[name] for name in ("state", "running", "waiting")}
    except (ValueError, TypeError, KeyError):  # another release's
        found = {"state": FAILED}
    state = GONE if beat.gone else found["state"]
    return {"replica": beat.name, **found, "state": state, "heard_seconds": round(beat.seconds, 1)}


def _sum(replicas: Sequence[dict[str, Any]], name: str) -> int:
    return sum(replica[name] for replica in replicas)
