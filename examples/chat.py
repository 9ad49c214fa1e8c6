"""A chat in the terminal that never overflows: the KV cache stays at `--cap` slots however long the chat lasts.

    python examples/chat.py                                                 the built-in model, offline
    python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct --cap 4096   any chat model of a supported family

Every turn appends its own tokens to one StreamingCache. The system prompt is the sink, so the system prompt is never
evicted; the oldest turns leave the window first. End the chat with Ctrl-D.
"""

import argparse
import sys

from transformers import TextStreamer

from sinkstream import StreamingCache
from sinkstream.models import load_model, resolve_device, resolve_dtype

REPLY = "@reply@"  # stands for the reply that is in the cache already


def turn(tokenizer, system: list[dict], text: str, *, first: bool) -> str:
    """The text of one user turn as the chat template writes it, from the end of the previous reply on."""
    before = system if first else [*system, {"role": "user", "content": "-"}, {"role": "assistant", "content": REPLY}]
    messages = [*before, {"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return whole if first else whole.partition(REPLY)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat that never overflows.")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--cap", type=int, default=1024, help="KV slots, the system prompt included")
    parser.add_argument("--system", default="You are a helpful assistant. Answer briefly.", help="the system prompt")
    parser.add_argument("--reply-tokens", type=int, default=256, help="the most tokens of one reply")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        parser.error(f"--model {args.model} has no chat template; accepted: a model that was trained to chat")
    system = [{"role": "system", "content": args.system}]
    sink = len(tokenizer(tokenizer.apply_chat_template(system, tokenize=False), add_special_tokens=False)["input_ids"])
    cache = StreamingCache.for_model(model, cap=args.cap, sink=sink)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)

    print("> ", end="", flush=True)
    for line in sys.stdin:
        text = turn(tokenizer, system, line.strip(), first=cache.seen_tokens == 0)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
        logits = cache.prefill(model, ids)
        for _ in range(args.reply_tokens):
            token = logits.argmax(dim=-1, keepdim=True)
            if token.item() == tokenizer.eos_token_id:  # the template writes it, at the beginning of the next turn
                break
            streamer.put(token[0].cpu())
            logits = cache.prefill(model, token)
        streamer.end()
        print(
            f"[{cache.seen_tokens} tokens seen, {cache.kept_tokens} of {args.cap} slots in use]\n> ", end="", flush=True
        )
    print()


if __name__ == "__main__":
    main()
