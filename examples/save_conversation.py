"""Put a conversation on disk and go on with it another day: its KV cache, so that nothing is computed again.

    echo "My name is Ann." | python examples/save_conversation.py talk.safetensors
    echo "What is my name?" | python examples/save_conversation.py talk.safetensors

The file is made by the first call and loaded by every later one. It holds the keys and values of the window, and says
which model and policy wrote them: another model is refused.
"""

import argparse
import sys
from pathlib import Path

from sinkstream import Engine
from sinkstream.models import load_model, resolve_device, resolve_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation that is kept in a file.")
    parser.add_argument("file", type=Path, help="where the conversation is kept")
    parser.add_argument("--model", default="builtin", help="builtin, a directory, a .gguf file or a hub id")
    parser.add_argument("--cap", type=int, default=1024, help="KV slots")
    parser.add_argument("--reply-tokens", type=int, default=64, help="the most tokens of one reply")
    args = parser.parse_args()

    device = resolve_device(None)
    loaded = load_model(args.model, dtype=resolve_dtype(None, device), device=device)
    tokenizer = loaded.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        parser.error(f"--model {args.model} has no chat template; accepted: a model that was trained to chat")
    engine = Engine(loaded.model, cap=args.cap, sink=4, evict="turns", tokenizer=tokenizer)
    if args.file.exists():
        engine.restore(args.file)
        print(f"[{engine.stats()['seen']} tokens seen before]")
    for line in sys.stdin:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": line.strip()}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        engine.begin_turn()
        reply = engine.generate(ids, max_new_tokens=args.reply_tokens)
        print(reply.text)
    engine.snapshot(args.file)
    print(f"[{engine.stats()['seen']} tokens seen, {engine.stats()['kept']} kept in {args.file}]")


if __name__ == "__main__":
    main()
