"""``bench --serve``: parts that are timed one after the other, a record each."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sinkstream.bench.serving.hosting import converse, hosted
from sinkstream.bench.serving.records import ServeRecord
from sinkstream.bench.serving.served import TRIALS, TURN_TEXT, ServedModel
from sinkstream.evaluation.record import find_complete, numeric_protocol
from sinkstream.evaluation.runner import Job, Report, Runner
from sinkstream.measure.environment import environment, package_versions, utc_now
from sinkstream.measure.timing import timed
from sinkstream.records.plain import new_record_id

Figures = dict[str, Any]
SESSIONS = (1, 8, 32)
EDGE_TURNS = 100  # first and last ones, whose tokens are compared
NEAR_TURNS = 10  # turns around one, whose times to the first token are its median
EARLY_TURN = 10
SERIES_TURNS = 10  # one figure of the series
ROUNDS = 7
SOAK_RAM_MB = 64  # of spilled sessions, so that some go to disk
RESTART_SESSIONS, RESTART_TURNS = 8, 5
NEXT_TOKENS = 256
FILLER = "w5 "


class ServingSession(ServedModel):
    """Times a server of one model in this process, with a client in another."""

    def run(self, parts: Sequence[str], console: Console) -> list[ServeRecord]:
        """Time the parts; one record each. Raises ValueError if the engine does not serve the model."""
        self._service(1)
        jobs = [Job(f"serve, {part}", partial(self._measure, part), partial(self._finished, part)) for part in parts]
        runner = Runner(self.request, ServeRecord.write, ServeRecord.read, self.loaded.model.device)
        return runner.run(jobs, console)

    # ---- parts ----

    def _turns(self, report: Report) -> Figures:
        """One session for many turns."""
        load, memory = self.load, []
        plan = self._plan(TURN_TEXT, sessions=1, turns=load.turns, tokens=load.reply, stream=True)

        def heard(turn: dict[str, Any]) -> None:
            report(turn["turn"] + 1, load.turns)
            if (turn["turn"] + 1) % SERIES_TURNS == 0:
                memory.append(self._memory())

        with self._hosted(1) as address:
            turns = converse(plan(address), heard)
        return turn_figures(turns, load.reply) | memory_figures(memory)

    def _overhead(self, report: Report) -> Figures:
        """A token of the server's stream over one of `Engine.generate`, in turns, on a full cache."""
        tokens = self.load.tokens
        times: dict[str, list[float]] = {"engine": [], "server": []}
        text = FILLER * self.load.cap
        engine = self._engine(1)
        plan = self._plan(text, sessions=1, turns=1, tokens=tokens, stream=True)
        ids = self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: self.load.cap]  # type: ignore[misc]
        try:
            with self._hosted(1) as address:
                for done in range(ROUNDS + 1):
                    engine.reset(stream=0)
                    engine.begin_turn()
                    engine.prefill(ids)
                    generate = partial(engine.generate, [], max_new_tokens=tokens, stop_tokens=())
                    seconds = timed(generate, device=self.loaded.model.device)[1]
                    (turn,) = converse(plan(address))
                    check_answered([turn])
                    if done:  # the first round warms up
                        times["engine"].append(1e3 * seconds / tokens)
                        times["server"].append(tpot_ms(turn))
                    report(done + 1, ROUNDS + 1)
        finally:
            engine.close()
        ratios = [server / alone for server, alone in zip(times["server"], times["engine"])]
        return {
            "tokens": tokens,
            "rounds": ROUNDS,
            "engine_ms": times["engine"],
            "server_ms": times["server"],
            "over_engine": statistics.median(ratios) - 1,
        }

    def _sessions(self, report: Report) -> Figures:
        """Tokens a second of one session and of several in their second turn, beside the engine's own streams."""
        tokens, rows = self.load.tokens, []
        for done, sessions in enumerate(SESSIONS):
            alone = self._engine_rate(sessions)
            with self._hosted(sessions) as address:
                for stream in (True, False):
                    plan = self._plan(TURN_TEXT, sessions=sessions, turns=2, tokens=tokens, stream=stream)
                    rates = [rate(converse(plan(address, warm_turns=1)), tokens) for _ in range(TRIALS)]
                    rows.append(
                        {
                            "sessions": sessions,
                            "streamed": stream,
                            "tokens_per_second": max(rates),
                            "engine_tokens_per_second": alone,
                        }
                    )
            report(done + 1, len(SESSIONS))
        ones = {row["streamed"]: row["tokens_per_second"] for row in rows if row["sessions"] == 1}
        for row in rows:
            row["over_one"] = row["tokens_per_second"] / ones[row["streamed"]]
            row["over_engine"] = row["tokens_per_second"] / row["engine_tokens_per_second"]
        return {"tokens": tokens, "rows": rows}

    def _soak(self, report: Report) -> Figures:
        """Locust's users on a server that spills; then every conversation alone."""
        from sinkstream.bench.serving import soak

        load, memory, name = self.load, [], self.loaded.name
        with tempfile.TemporaryDirectory(prefix="sinkstream-soak-") as temporary:
            folder, spill = Path(temporary) / "notes", Path(temporary) / "spill"
            folder.mkdir()
            more = {"spill": spill, "ram_mb": SOAK_RAM_MB, "body_mb": 1}
            service = self._service(max(2, load.users // 4), durable=True, **more)
            begin = time.monotonic()

            def tick() -> None:
                memory.append(self._memory())
                report(min(int(time.monotonic() - begin), int(load.seconds)), 2 * int(load.seconds))

            with hosted(service) as address:
                users = soak.generate(address, name, load.cap, load.users, load.seconds, folder, tick)
                left = soak.left_behind(address, [user[0]["session"] for user in users], spill)
        with self._hosted(1) as address:
            steps = 2 * len(users)
            compared, differing = soak.compare(
                address, name, users, lambda done: report(len(users) + done, steps), load.compare_seconds
            )
        return {
            "seconds": load.seconds,
            "users": len(users),
            "generator": soak.generator(),
            **soak.soak_figures(users),
            "compared": compared,
            "differing": differing,
            "leaked_sessions": left[0],
            "leaked_files": left[1],
            **memory_figures(memory),
        }

    def _restart(self, report: Report) -> Figures:
        """A server that is killed while all sessions talk, and started again."""
        from sinkstream.bench.serving import restart

        load, name = self.load, self.loaded.name
        conversations = [restart.Conversation(number, load.reply) for number in range(RESTART_SESSIONS)]
        with tempfile.TemporaryDirectory(prefix="sinkstream-restart-") as temporary:
            arguments = self._command(Path(temporary), max(2, RESTART_SESSIONS // 4))
            server = restart.Server(arguments)
            try:
                restart.loaded_until_killed(server, server.model, conversations, RESTART_TURNS)
            finally:
                server.end()
            server = restart.Server(arguments)
            try:
                with self._hosted(1) as alone:
                    steps = len(conversations)
                    models = server.model, name
                    return restart.gone_on(
                        server.address, alone, models, conversations, NEXT_TOKENS, lambda done: report(done, steps)
                    )
            finally:
                server.end()

    def _recall(self, report: Report) -> Figures:
        """Facts are told, evicted and asked for: with recall, without it, and with nothing evicted."""
        from sinkstream.bench.serving import recalling

        load = self.load
        return recalling.measured(self._hosted, self.loaded.name, load.cap, load.talks, self.request.seed, report)

    # ---- records ----

    def _measure(self, part: str, report: Report) -> list[Callable[[], dict[str, Any]]]:
        figures = getattr(self, f"_{part}")(report)
        return [partial(self._record, part, figures)]

    def _identity(self, part: str) -> dict[str, Any]:
        versions = package_versions()
        return {
            "versions": {name: versions[name] for name in ("sinkstream", "torch", "transformers")},
            "threads": torch.get_num_threads(),
            "model_hash": self.loaded.hash,
            **numeric_protocol(self.loaded),
            "part": part,
            "load": vars(self.load),
            "backend": self.backend,
        }

    def _finished(self, part: str) -> list[ServeRecord]:
        return find_complete(ServeRecord.below, self.request.out, self._identity(part))

    def _record(self, part: str, figures: Figures) -> dict[str, Any]:
        return {
            "id": new_record_id("serve", self.loaded.name, part),
            "status": "complete",
            "status_reason": None,
            "session": self.name,
            "created": utc_now(),
            "command": self.request.command,
            "arguments": {**self.request.arguments, "identity": self._identity(part)},
            "environment": environment(self.loaded.model.device),
            "model": self.loaded.record(),
            "protocol": {
                **numeric_protocol(self.loaded),
                "seed": self.request.seed,
                "cap": self.load.cap,
                "pinned": self.load.pinned,
                "evict": "turns",
                "backend": self.backend,
                "client": "processes of their own, over HTTP on this machine, greedy, end tokens end no reply",
            },
            "part": part,
            "figures": figures,
        }


# ---- figures ----


def check_answered(turns: Sequence[dict[str, Any]]) -> None:
    """Raise OSError if a turn was not answered."""
    wrong = [turn for turn in turns if not answered(turn)]
    if wrong:
        raise OSError(f"a turn was not answered: {wrong[0].get('body') or wrong[0].get('error')}")


def answered(turn: dict[str, Any]) -> bool:
    """Whether a turn has a whole reply."""
    return turn["status"] == 200 and turn.get("usage") is not None


def rate(turns: Sequence[dict[str, Any]], tokens: int) -> float:
    """Tokens a second of the second turns, from the first request to the end of the last reply."""
    check_answered(turns)
    last = [turn for turn in turns if turn["turn"] == 1]
    return len(last) * tokens / (max(turn["last"] for turn in last) - min(turn["begin"] for turn in last))


def tpot_ms(turn: dict[str, Any]) -> float:
    """Milliseconds a token after the first one."""
    return 1e3 * (turn["last"] - turn["first"]) / (turn["usage"]["completion_tokens"] - 1)


def turn_figures(turns: Sequence[dict[str, Any]], reply: int) -> Figures:
    """What the turns of one conversation say of early and late ones. Raises OSError if fewer than two were answered."""
    good = [turn for turn in turns if answered(turn) and turn["first"] is not None]
    if len(good) < 2:
        check_answered(turns)
        raise OSError(f"{len(good)} of {len(turns)} turns had a reply with text; early and late ones need two")
    tpots, ttfts = [tpot_ms(turn) for turn in good], [1e3 * (turn["first"] - turn["begin"]) for turn in good]
    edge = min(EDGE_TURNS, len(good) // 2)
    near = min(NEAR_TURNS, len(good) // 2)
    early = min(EARLY_TURN, max(0, len(good) - near))
    median = statistics.median
    first, last = median(tpots[:edge]), median(tpots[-edge:])
    begin = max(0, early - near // 2)
    soon, late = median(ttfts[begin : begin + near]), median(ttfts[-near:])
    context = good[-1]["usage"]["context"]
    series = {
        name: [median(values[i : i + SERIES_TURNS]) for i in range(0, len(values), SERIES_TURNS)]
        for name, values in (("tpot_ms", tpots), ("ttft_ms", ttfts))
    }
    return {
        "turns": len(turns),
        "reply_tokens": reply,
        "sent_tokens": context["sent"],
        "length_errors": sum(turn["status"] in (400, 413) for turn in turns),
        "errors": len(turns) - len(good),
        "tpot_ms": {"turns": edge, "first": first, "last": last, "ratio": last / first},
        "ttft_ms": {"turn": early, "turns": near, "early": soon, "late": late, "ratio": late / soon},
        "context": {name: context[name] for name in ("pinned", "kept", "cap", "evicted", "evicted_turns")},
        "series": {"turns": SERIES_TURNS, **series},
    }


def memory_figures(memory: Sequence[tuple[float, float | None]]) -> Figures:
    """RSS of the server's process and memory of its GPU after a tenth of the turns, at the end and at most."""
    figures: Figures = {}
    for name, values in (("rss_mb", [rss for rss, _ in memory]), ("gpu_mb", [gpu for _, gpu in memory])):
        known = [value for value in values if value is not None]
        early = known[len(known) // 10] if known else None
        figures[name] = {"early": early, "last": known[-1], "max": max(known)} if known else None
    return figures
