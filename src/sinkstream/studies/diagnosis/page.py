"""The page of a diagnosis: one self-contained HTML file with tables and pictures."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from sinkstream.records.files import write_atomically
from sinkstream.show.table import EMPTY, Table, figures_text
from sinkstream.studies.diagnosis.attribution import PARTS
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.diagnosis.tables import NOTES, Entry, diagnosis_tables, interval, origin

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 75rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.87rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.5rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #111; }
.wide { overflow-x: auto; }
.whole { white-space: nowrap; }
.verdict { border-left: 4px solid #0072B2; padding-left: 0.7rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
img { max-width: 100%; height: auto; }
details { border-top: 1px solid #ccc; padding: 0.6rem 0; }
summary { font-size: 1.1rem; cursor: pointer; }
code { background: #f2f2f2; padding: 0 0.2rem; overflow-wrap: anywhere; }
"""


def write_page(
    diagnosis: Diagnosis, pictures: Sequence[Mapping[str, Path]], attribution: Path | None, path: Path | str
) -> Path:
    """Write the page, which refers to no other file.

    `pictures` are the PNG files of each policy, by name, in the order of the policies; `attribution` is the picture of
    all policies.
    """
    title = escape(f"Diagnosis: {diagnosis.model['name']} on {diagnosis.data['name']}")
    anchors = [f"policy-{number}" for number in range(len(diagnosis.policies))]
    sections = [_section(*one) for one in zip(diagnosis.policies, pictures, anchors)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    verdicts = [
        f'<li><a href="#{anchor}">{escape(entry["label"])}</a>: {escape(entry["verdict"]["line"])}</li>'
        for entry, anchor in zip(diagnosis.policies, anchors)
    ]
    overview = "".join(table.html() for table in diagnosis_tables(diagnosis))
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{escape(origin(diagnosis)).replace("`", "")}</p>
<h2>Verdicts</h2><ul>{"".join(verdicts)}</ul>
<h2>All policies</h2><div class="wide">{overview}</div><ul>{notes}</ul>
{_picture(attribution, "parts of the difference from strict streaming") if attribution else ""}
{"".join(sections)}
<p>Record <code>{escape(diagnosis.id)}</code>, made by <code>{escape(" ".join(diagnosis.command))}</code>.</p>
</body></html>
"""
    return write_atomically(path, body)


def _section(entry: Entry, pictures: Mapping[str, Path], anchor: str) -> str:
    tables = [_differences(entry), _spikes(entry), _parts(entry), _plain(entry), _lengths(entry), _latency(entry)]
    shown = [_picture(path, f"{entry['label']}: {name}") for name, path in pictures.items()]
    return (
        f'<details open id="{anchor}"><summary>{escape(entry["label"])}</summary>'
        f'<p class="verdict">{escape(entry["verdict"]["line"])}</p>'
        f'<div class="figures">{"".join(f"<div>{table}</div>" for table in tables)}</div>{"".join(shown)}</details>'
    )


def _differences(entry: Entry) -> str:
    rows = [[f"ΔPPL % against {n}", interval(d, 2, "delta_percent")] for n, d in entry["delta_ppl"].items()]
    rows += [
        ["error outside the 32 tokens after events (nats)", interval(entry["long_run"]["outside_events"], 4)],
        ["second half minus first half of the text (nats)", interval(entry["long_run"]["growth"], 4)],
    ]
    seen = entry["resolution"]
    if seen and seen["effect_size"] is not None:
        needed = [f"{size}: {tokens:,}" for size, tokens in seen["tokens_needed"].items()]
        effect = f"{seen['effect_size']:+.4f} a token, z = {seen['z']:+.1f} over {seen['tokens']:,} tokens"
        rows += [["effect size against noise", effect], ["tokens needed to resolve a ΔPPL of", " · ".join(needed)]]
    return Table(["Difference", "figure [95 %]"], rows).html()


def _spikes(entry: Entry) -> str:
    names = {"level": "level before (nats)", "peak": "peak (nats)", "width": "width (tokens)", "area": "area (nats)"}
    rows = [[text, *(interval(curve[n], 3) for curve in entry["spike"].values())] for n, text in names.items()]
    events = entry["period"]
    median = EMPTY if events["median"] is None else f"{events['median']:.0f}"
    rows.append(
        ["events; median period (tokens)", f"{events['events']:,}; {median}"] + [""] * (len(entry["spike"]) - 1)
    )
    return Table(["Spike, paired", *(f"against {name}" for name in entry["spike"])], rows).html()


def _parts(entry: Entry) -> str:
    whole = entry["attribution"]
    shares = {name: EMPTY if share is None else f"{100 * share:.0f}" for name, share in whole["shares"].items()}
    rows = [[text, interval(whole["parts"][name], 2, scale=100), shares[name]] for name, text in PARTS.items()]
    rows.append(["all", interval(whole["total"], 2, scale=100), EMPTY if shares["elsewhere"] == EMPTY else "100"])
    return Table(["Attribution against strict", "100 × nats [95 %]", "share %"], rows).html()


def _plain(entry: Entry) -> str:
    names = {"max": "maximum NLL (nats)", "width": "width (tokens)", "area": "area above the median (nats)"}
    rows = [
        [text, *(figures_text(entry["plain"][run][name], ("mean", "p90", "max"), 2) for run in ("policy", "strict"))]
        for name, text in names.items()
    ]
    return Table(
        ["Plain, unpaired, 32 tokens after events: mean / P90 / max", "policy", "strict, same tokens"], rows
    ).html()


def _lengths(entry: Entry) -> str:
    kv, extreme = entry["drift"]["kv_length"], entry["extreme"]
    past = EMPTY if kv["share_past_trained"] is None else f"{100 * kv['share_past_trained']:.1f} %"
    sizes = figures_text(entry["drift"]["drop_size"], ("mean", "p50", "p90", "p99", "max"), 1)
    rate = extreme["extreme_per_1000_tokens"]
    rows = [
        ["visible KV min / mean / max (tokens)", figures_text(kv, ("min", "mean", "max"), 1)],
        ["share above the trained length", past],
        ["drop size mean / P50 / P90 / P99 / max (tokens)", sizes],
        [f"events above {extreme['threshold_nats']} nats per token, per 1,000 tokens", f"{rate:.2f}"],
        ["mean difference after an event: P99 / max (nats)", figures_text(extreme["mean_nats"], ("p99", "max"), 3)],
    ]
    return Table(["Drift", "figure"], rows).html()


def _latency(entry: Entry) -> str:
    figures = {"policy": entry["latency"], "strict": entry["strict"]["latency"]}
    keys = ("mean", "p50", "p90", "p99")
    names = {"all": "all steps", "event_steps": "steps with an event", "other_steps": "other steps"}
    rows = [[text, *(figures_text(one[name], keys, 2) for one in figures.values())] for name, text in names.items()]
    rows.append(["timed tokens", *(f"{one['tokens']:,}" for one in figures.values())])
    return Table(["Latency mean / P50 / P90 / P99 (ms)", *figures], rows).html()


def _picture(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(description, quote=True)}" src="data:image/png;base64,{data}"></p>'
