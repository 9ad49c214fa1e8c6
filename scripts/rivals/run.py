"""Run rivals on a text that `sinkstream eval` runs too, and write one record each.

    python scripts/rivals/environments.py
    python scripts/rivals/run.py --text pg19.json --tokens 4096 --cap 512 --rivals kvpress-snapkv-32,llamacpp-half

The model, the tokens, the cap and the first scored token are those of ``sinkstream eval`` with the same options. Each
rival runs in its own environment and process; a rival that cannot run has a record with the reason.
"""

import argparse

from catalogue import RIVALS
from jobs import add_options, interpreter, job_of, measure, origin, weights

from sinkstream.cli import HelpFormatter, options
from sinkstream.records.plain import new_record_id
from sinkstream.studies.rivals.record import Measured, RivalRecord, not_measured


def main() -> int:
    """Run all rivals that are asked for; returns the exit code."""
    args = arguments()
    try:
        loaded, stream = options.load_model_and_text(args, random=True)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if len(stream) < args.cap + 2:
        raise SystemExit(
            f"--cap {args.cap} leaves no token of {len(stream)} to score; accepted: at most {len(stream) - 2}"
        )
    with weights(loaded) as folder:
        for name in args.rivals:
            rival = RIVALS[name]
            job = job_of(rival, stream.ids, folder, args.timed_tokens, loaded, args)
            found = measure(rival, job, interpreter(args, rival), args.seconds)
            measured = None if "error" in found else Measured.read(found)
            record = {
                "id": new_record_id("rival", loaded.name, stream.name, rival.label),
                **origin(rival, found, measured, job, loaded, stream, args),
                "summary": measured.summary() if measured else not_measured(),
                "blocks": measured.blocks() if measured else None,
            }
            path = RivalRecord.write(record, args.out)
            summary = record["summary"]
            said = record["status_reason"] or f"PPL {summary['ppl']}, TPOT {summary['steady_tpot_ms']['p50']} ms (P50)"
            print(f"{name}: {record['status']}: {said}: {path}", flush=True)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add_options(parser)
    options.add_text(parser, random=True)
    parser.add_argument("--timed-tokens", type=int, default=192, help="tokens timed one by one before blocks")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
