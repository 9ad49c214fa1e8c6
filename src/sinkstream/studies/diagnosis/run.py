"""The diagnosis: the runs of the policies and of their controls, and the files that are written."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sinkstream.evaluation.runner import Request, check_writable, save_or_rescue, uninterrupted
from sinkstream.evaluation.settings import BASELINES, RunSettings
from sinkstream.measure.environment import git_revision, utc_now
from sinkstream.records.pairing import same_text_and_model
from sinkstream.records.records import Record
from sinkstream.records.selection import normalised
from sinkstream.studies.diagnosis.diagnose import Controls, diagnose
from sinkstream.studies.diagnosis.page import write_page
from sinkstream.studies.diagnosis.plots import draw_attribution, draw_policy
from sinkstream.studies.diagnosis.record import Diagnosis, build_diagnosis
from sinkstream.studies.diagnosis.tokens import write_event_table, write_token_table

NOT_STRICT = ("overlap", "refresh", "max_drop", "slack", "adaptive")  # options that make another policy of strict
TABLES, PICTURES, PAGE = "tables", "pictures", "diagnosis.html"

#: Strict runs at these fractions of the cap tell how NLL depends on the visible length (R = cap/16 … cap/2).
LENGTH_FRACTIONS = ((15, 16), (7, 8), (3, 4), (1, 2), (1, 4), (1, 8))


def diagnosis_settings(
    policies: Sequence[RunSettings],
    *,
    tokens: int,
    trained_positions: int | None,
    sink: int | None = None,
    sample_every: int = 64,
) -> list[RunSettings]:
    """All runs of a diagnosis: strict at the same and at other caps, full where it fits, recompute, then the policies.

    Parameters
    ----------
    policies : sequence of RunSettings
        All with one cap, positions and prefill.
    tokens : int
        Length of the text.
    trained_positions : int or None
        The full cache fits if the text is no longer, and recompute if the cap is not.
    sink : int or None
        Sinks of the strict controls; default: the policy's own.
    sample_every : int
        Recompute scores every k-th token.

    Raises ValueError: a policy without prune events or that is the control itself, no cap, or a text shorter than two
    prune periods.
    """
    policies = [one for one in policies if not _is_the_control(one)]
    if not policies:
        raise ValueError("policy 'strict' is the control of every diagnosis; accepted: another --policy, as in lazy")
    for one in policies:
        _check(one, tokens)
    first = policies[0]
    strict = RunSettings(
        "strict",
        cap=first.cap,
        options={} if sink is None else {"sink": sink},
        positions=first.positions,
        allow_untrained_positions=first.allow_untrained_positions,
        backend=first.backend,
        prefill=first.prefill_tokens(tokens),
        evaluate=first.evaluate,
        timed_tokens=first.timed_tokens,
        block_tokens=first.block_tokens,
        warmup_tokens=first.warmup_tokens,
    )
    untimed = replace(strict, evaluate="blocks", timed_tokens=None, backend=RunSettings.backend)
    controls = [strict, *(replace(untimed, cap=cap) for cap in length_caps(policies, trained_positions))]
    baseline = partial(replace, untimed, options={}, positions="cache")
    if trained_positions is None or tokens <= trained_positions:
        controls.append(baseline(method="full"))
    if trained_positions is None or first.given_cap <= trained_positions:
        controls.append(baseline(method="recompute", sample_every=sample_every))
    return [*controls, *policies]


def length_caps(policies: Sequence[RunSettings], trained_positions: int | None = None) -> list[int]:
    """Caps of the strict runs, other than the policies' own, that span every length the policies see."""
    cap, evictions = policies[0].given_cap, [one.eviction_policy for one in policies]
    shortest = min(one.target for one in evictions)
    longest = max(one.peak for one in evictions)
    if trained_positions is not None:
        longest = min(longest, max(cap, trained_positions))
    floor = max(one.sink for one in evictions) + 1
    grid = [cap * up // down for up, down in LENGTH_FRACTIONS if cap * up // down > floor]
    needed = [length for length in grid if length > shortest]
    needed += [max(length for length in [*grid, floor] if length <= max(shortest, floor))]
    needed = needed if shortest < cap else []
    return sorted({*needed, *([longest] if longest > cap else [])} - {cap})


def pair_runs(records: Sequence[Record]) -> list[tuple[Record, Controls]]:
    """Find the policies among run records, and the controls of each.

    A control has the same text, model, precision and positions; strict and recompute have the policy's cap as well.
    Of several the newest counts.

    Raises ValueError: runs of several texts or models, runs that are not complete, no policy with events, policies of
    several caps, prefills or precisions, or a policy without a strict run at its cap.
    """
    if not records:
        raise ValueError("no run records to diagnose")
    for record in records:
        if not same_text_and_model(record, records[0]):
            raise ValueError(
                f"record {record.id!r} ({record.model['name']} on {record.data['name']}) can not be paired with"
                f" {records[0].id!r} ({records[0].model['name']} on {records[0].data['name']}): another text or another"
                " model; accepted: runs of one text and one model"
            )
        if record.status != "complete":
            raise ValueError(
                f"record {record.id!r} is {record.status} ({record.status_reason}); accepted: complete runs"
            )
    evicting = [r for r in records if r.policy["name"] not in BASELINES]
    policies = [r for r in evicting if not _is_strict(r)]
    if not policies:
        names = ", ".join(sorted({r.policy["name"] for r in records}))
        raise ValueError(
            f"no policy to diagnose among the records ({names}): strict streaming is the control and baselines have no"
            " prune events; accepted: also the record of another policy, as in lazy"
        )
    for name in ("cap", "prefill_tokens", "dtype"):
        values = list(dict.fromkeys(str(record.protocol[name]) for record in policies))
        if len(values) > 1:
            raise ValueError(
                f"the policies' records have several values of {name} ({', '.join(values)}); a diagnosis"
                f" compares at one; accepted: policies of one {name}, with strict runs at any cap"
            )
    return [(record, _controls(record, records)) for record in policies]


def _controls(record: Record, records: Sequence[Record]) -> Controls:
    cap, longest = record.protocol["cap"], record.policy["options"].get("peak") or record.protocol["cap"]
    comparable = [r for r in records if r.protocol["dtype"] == record.protocol["dtype"]]
    positions = record.policy["options"].get("positions", "cache")
    strict = {}
    for run in comparable:
        if _is_strict(run) and run.policy["options"].get("positions", "cache") == positions:
            strict[run.protocol["cap"]] = run
    if cap not in strict:
        raise ValueError(
            f"policy {record.label!r} (cap={cap}, {record.protocol['dtype']}, positions={positions}) has no strict run"
            " beside it; accepted: also the record of a strict run at the same cap, precision and positions"
        )
    control = strict.pop(cap)
    named = {name: [r for r in comparable if r.policy["name"] == name] for name in BASELINES}
    recompute = [r for r in named["recompute"] if r.protocol["cap"] == cap]
    lengths = {other: run for other, run in strict.items() if other <= max(cap, longest)}
    return Controls(control, _newest(named["full"]), _newest(recompute), lengths)


def _newest(records: Sequence[Record]) -> Record | None:
    return records[-1] if records else None


def _is_strict(record: Record) -> bool:
    return record.policy["name"] == "strict" and not any(record.policy["options"].get(name) for name in NOT_STRICT)


def _is_the_control(settings: RunSettings) -> bool:
    return settings.method == "strict" and not any(settings.options.get(name) for name in (*NOT_STRICT, "window"))


def _check(settings: RunSettings, tokens: int) -> None:
    if settings.method in BASELINES:
        raise ValueError(
            f"policy {settings.method!r} has no prune events: it is run as a control where it fits;"
            " accepted: a policy that evicts"
        )
    if settings.cap is None:
        raise ValueError("a diagnosis compares at an equal cap; give --cap SLOTS")
    longest = settings.eviction_policy.growth + 1
    decoded = tokens - settings.prefill_tokens(tokens) - 1
    if decoded < 2 * longest:
        raise ValueError(
            f"the text leaves {decoded} tokens after the prefill, which is shorter than two prune periods of"
            f" {settings.label()} ({longest} tokens each); accepted: at least {2 * longest} more than the prefill"
        )


def write_diagnosis_files(
    pairs: Sequence[tuple[Record, Controls]], texts: Sequence[str] | None, request: Request
) -> tuple[Diagnosis, list[str]]:
    """Diagnose every policy and write record, tables, pictures and page below the folder of the request.

    `pairs` come from `pair_runs`; `texts` is the text of every token, for the per-token tables, or None; the seed of
    the request is that of the resampling. Returns the record, and lines that name the files.

    Raises ValueError as `diagnose` and `Diagnosis.write`, or if the folder cannot be written to; nothing is computed
    then. Raises WriteError if a file cannot be written; for the record the message says where a copy was kept instead.
    """
    check_writable(request.out)
    entries = [diagnose(record, controls, seed=request.seed) for record, controls in pairs]
    content = build_diagnosis(
        [record for record, _ in pairs],
        entries,
        arguments=request.arguments,
        command=request.command,
        git=git_revision(),
        created=utc_now(),
        seed=request.seed,
    )
    with uninterrupted():
        diagnosis = Diagnosis.read(save_or_rescue(partial(Diagnosis.write, content), request.out))
    slugs = [f"{number:02d}-{normalised(entry['label'])}" for number, entry in enumerate(entries, 1)]
    notes = [f"record: {diagnosis.path}, tables: {_write_tables(pairs, slugs, texts, request.out / TABLES)}"]
    if texts is None:
        notes.append("run records hold no text: the column 'token' of the tables is empty")
    try:
        page = _draw_page(pairs, slugs, diagnosis, request.out)
    except ImportError as error:
        return diagnosis, [*notes, f"no pictures: {error}"]
    return diagnosis, [*notes, f"pictures: {request.out / PICTURES}, page: {page}"]


def _write_tables(
    pairs: Sequence[tuple[Record, Controls]], slugs: Sequence[str], texts: Sequence[str] | None, folder: Path
) -> Path:
    """Write the tables of tokens and of events of every policy; returns their folder."""
    for (record, controls), slug in zip(pairs, slugs):
        write_token_table(record, controls.strict, texts, folder / f"{slug}-tokens.csv")
        write_event_table(record, controls.strict, folder / f"{slug}-events.csv")
    return folder


def _draw_page(pairs: Sequence[tuple[Record, Controls]], slugs: Sequence[str], diagnosis: Diagnosis, out: Path) -> Path:
    """Draw every picture and write the page that shows them; returns its path. ImportError without matplotlib."""
    drawn = [
        draw_policy(record, controls.strict, entry, out / PICTURES, slug)
        for (record, controls), entry, slug in zip(pairs, diagnosis.policies, slugs)
    ]
    overview = draw_attribution(diagnosis.policies, out / PICTURES / "attribution.png")
    return write_page(diagnosis, drawn, overview, out / PAGE)
