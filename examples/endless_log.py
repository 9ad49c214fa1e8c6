"""Watch an endless log: lines in on stdin, how surprising each line is out on stdout, in memory that never grows.

    tail -f server.log | python examples/endless_log.py
    python examples/endless_log.py --cap 512 < server.log

Surprise is the mean NLL of a line's tokens given the lines before, in nats per token. The second column is its running
mean; a line far above the running mean is marked with an asterisk. With --digest LINES, a digest follows after so many
lines each: their mean surprise and the three most surprising ones.
"""

import argparse
import sys

import torch
from torch.nn.functional import cross_entropy

from sinkstream import StreamingCache
from sinkstream.models import load_model, resolve_device, resolve_dtype


@torch.no_grad()
def read(
    model, cache: StreamingCache, ids: torch.Tensor, logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append a line, (tokens,) int64, to the stream; returns the NLL of its tokens and the logits after the line."""
    nll, done = [], 0
    for size in cache.chunks(len(ids)):
        chunk = ids[done : done + size]
        out = model(chunk[None], cache=cache).logits[0].float()
        predicted = out[:-1] if logits is None else torch.cat([logits[None], out[:-1]])
        nll.append(cross_entropy(predicted, chunk[len(chunk) - len(predicted) :], reduction="none"))
        logits, done = out[-1], done + size
    return torch.cat(nll), logits


def digest(latest: list[tuple[float, str]]) -> str:
    """What the latest lines were like: surprise in nats per token, and text."""
    mean = sum(surprise for surprise, _ in latest) / len(latest)
    most = sorted(latest, reverse=True)[:3]
    rows = [f"#   {surprise:6.2f} {text}" for surprise, text in most]
    return "\n".join([f"# {len(latest)} lines, {mean:.2f} nats per token; the most surprising:", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description="The running surprise of an endless log.")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--cap", type=int, default=1024, help="KV slots")
    parser.add_argument("--memory", type=float, default=50, help="lines over which the running mean forgets")
    parser.add_argument("--digest", type=int, default=0, help="lines of one digest; 0: none")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    cache = StreamingCache.for_model(loaded.model, cap=args.cap, compress_every=max(1, args.cap // 16))
    logits, mean, spread = None, None, 0.0
    latest: list[tuple[float, str]] = []
    for line in sys.stdin:
        ids = loaded.tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(device)
        nll, logits = read(loaded.model, cache, ids, logits)
        if len(nll) == 0:  # a single token with nothing before it
            continue
        surprise = nll.mean().item()
        mean = surprise if mean is None else mean
        mark = "*" if surprise > mean + 3 * max(spread, 0.1) else " "
        mean += (surprise - mean) / args.memory
        spread += (abs(surprise - mean) - spread) / args.memory
        print(f"{surprise:6.2f} {mean:6.2f} {mark} {line.rstrip()}", flush=True)
        latest.append((surprise, line.rstrip()))
        if len(latest) == args.digest:
            print(digest(latest), flush=True)
            latest.clear()
    print(
        f"{cache.seen_tokens} tokens seen, {cache.kept_tokens} kept, {cache.stats()['bytes']:,} bytes", file=sys.stderr
    )


if __name__ == "__main__":
    main()
