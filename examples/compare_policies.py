"""Compare eviction policies from Python: perplexity at equal peak slots, each difference with its interval.

    python examples/compare_policies.py
    python examples/compare_policies.py --model DIRECTORY --text FILE.txt --tokens 4096 --cap 512

`sinkstream eval` does the same from the command line, and keeps a record of every run.
"""

import argparse

from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.run import run
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import load_model, resolve_device, resolve_dtype
from sinkstream.statistics import paired_delta_ppl, suitable_block_tokens

POLICIES = {
    "strict": {},
    "window-only": {},
    "lazy": {"compress_every": 32},
    "refresh-uniform": {"compress_every": 32, "refresh": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of eviction policies at equal peak slots.")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--text", default="builtin", help="builtin, pg19, wikitext, a .txt or a .json file")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text")
    parser.add_argument("--cap", type=int, default=256, help="the most KV slots in use, the same for every policy")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    stream = tokenize(load_text(args.text), loaded.tokenizer, args.tokens)
    results = {}
    for name, options in POLICIES.items():
        settings = RunSettings(name, cap=args.cap, options=options, evaluate="blocks")
        results[name] = run(loaded, stream.ids, settings)
    control = results["strict"].arrays["nll"]
    print(f"{loaded.name}, {stream.name}, {len(control)} tokens scored, {args.cap} KV slots")
    for name, result in results.items():
        delta = paired_delta_ppl(result.arrays["nll"], control, block_tokens=suitable_block_tokens(len(control)))
        interval = "no interval" if delta.low is None else f"{delta.low:+.2f} … {delta.high:+.2f}"
        told = "control" if name == "strict" else f"{delta.delta_percent:+.2f} % against strict [{interval}]"
        print(f"{name:16} PPL {result.summary['ppl']:8.2f}   {told}")


if __name__ == "__main__":
    main()
