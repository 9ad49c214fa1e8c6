"""What rivals recall of passages that occur twice: the streams of `sinkstream recall` with the same options.

    python scripts/rivals/recall.py --text pg19 --cap 512 --passages 12 --rivals llamacpp-half

A rival streams over two texts: one with every passage twice, and its control with the second occurrences only. The
record holds the loss of every passage in both, as those of `sinkstream recall` do.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
from catalogue import RIVALS, Rival
from jobs import add_options, interpreter, job_of, measure, origin, weights

from sinkstream.cli import HelpFormatter, options
from sinkstream.data import TokenStream, load_text, tokenize
from sinkstream.models import LoadedModel
from sinkstream.records.plain import new_record_id
from sinkstream.studies.recall.record import ScoredPassage, passage_columns
from sinkstream.studies.recall.run import PASSAGE_TOKENS, PASSAGES, RATIOS, RecallDesign, RecallStreams
from sinkstream.studies.rivals.recall import RivalRecallRecord
from sinkstream.studies.rivals.record import Measured


def main() -> int:
    """Run all rivals that are asked for; returns the exit code."""
    args = arguments()
    try:
        design = RecallDesign(args.cap, tuple(args.distances), args.passages, args.passage_tokens, args.seed)
        text = load_text(args.text)
        loaded = options.load_given_model(args)
        streams = design.streams(partial(tokenize, text, loaded.tokenizer))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    with weights(loaded) as folder:
        for name in args.rivals:
            record = recall_of(RIVALS[name], streams, folder, loaded, args)
            path = RivalRecallRecord.write(record, args.out)
            print(": ".join(filter(None, (name, record["status"], record["status_reason"], str(path)))), flush=True)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add_options(parser)
    options.add_text(parser)
    parser.add_argument(
        "--distances", type=options.numbers(float), default=list(RATIOS), help="in multiples of the cap"
    )
    parser.add_argument("--passages", type=int, default=PASSAGES, help="passages at each distance")
    parser.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS, help="tokens of a passage")
    return parser.parse_args()


def recall_of(
    rival: Rival, streams: RecallStreams, folder: str, loaded: LoadedModel, args: argparse.Namespace
) -> dict[str, Any]:
    """The content of a rival's record."""

    def run(stream: TokenStream) -> tuple[dict[str, Any], Measured | None, dict[str, Any]]:
        job = job_of(rival, stream.ids, folder, 0, loaded, args)
        if "blocks" in rival.options:
            job["options"] = rival.options | {"blocks": True}
        found = measure(rival, job, interpreter(args, rival), args.seconds)
        if "error" not in found and None in found["nll"]:
            found = {"error": "this way of decoding cannot score a given text", "versions": found["versions"]}
        return found, None if "error" in found else Measured.read(found), job

    found, again, job = run(streams.repeated)
    unseen = None
    if again is not None:
        found, unseen, job = run(streams.control)
    measured = again if unseen is not None else None
    design = streams.design
    content = origin(rival, found, measured, job, loaded, streams.repeated, args)
    content["rival"]["options"] = job["options"]
    content["protocol"] |= {
        "evaluate": "blocks" if job["options"].get("blocks") else "steps",
        "ratios": list(design.ratios),
        "passages": design.passages,
        "passage_tokens": design.passage_tokens,
        "control_sha256": streams.control.sha256,
    }
    passages = scored(streams, again, unseen) if again is not None and unseen is not None else []
    identity = new_record_id("rival-recall", loaded.name, streams.repeated.name, rival.label)
    return {"id": identity, **content, "passages": passage_columns(passages)}


def scored(streams: RecallStreams, again: Measured, unseen: Measured) -> list[ScoredPassage]:
    """Every passage with its loss in both streams, but for its first token."""
    size = streams.design.passage_tokens

    def nll(measured: Measured, start: int) -> np.ndarray:
        index = np.array(measured.index)
        return np.array(measured.nll, dtype=np.float64)[(index > start) & (index < start + size)]

    found = []
    for place in streams.placements:
        both = nll(again, place.second), nll(unseen, place.second)
        found.append(ScoredPassage(place, float(both[0].mean()), float(both[1].mean()), both[1] - both[0], None))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
