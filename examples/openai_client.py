"""A conversation of any length through the OpenAI API: the official client on a session of ``sinkstream serve``.

    sinkstream serve --model builtin --cap 1024 &
    python examples/openai_client.py --url http://127.0.0.1:8000/v1 < questions.txt

One line of the input is one message. The session is opened once, each request sends its new message alone, and the
usage of each reply tells what the session has evicted. Needs: pip install openai
"""

import argparse
import sys

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation on a session of a server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server")
    parser.add_argument("--key", default="none", help="API key of the server")
    parser.add_argument(
        "--system", default="You are a helpful assistant. Answer briefly.", help="pinned, never evicted"
    )
    parser.add_argument("--reply-tokens", type=int, default=256, help="the most tokens of one reply")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.key)
    model = client.models.list().data[0].id
    head = [{"role": "system", "content": args.system}]
    session = client.post("/sessions", body={"messages": head}, cast_to=object)["id"]
    for line in sys.stdin:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": line.strip()}],
            max_tokens=args.reply_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"session_id": session},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage:
                context = chunk.usage.context
                print(
                    f"\n[{context['sent']} sent, {context['reused']} reused, {context['evicted_turns']} turns evicted]"
                )
    client.delete(f"/sessions/{session}", cast_to=object)


if __name__ == "__main__":
    main()
