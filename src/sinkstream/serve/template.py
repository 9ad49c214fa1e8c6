"""Chat templates: what of a conversation is pinned, where its turns begin, and which text is new."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from sinkstream.serve.errors import APIError, invalid

Message = dict[str, Any]
SYSTEM_ROLES = ("system", "developer")
PROBE = "x"  # content of messages that are rendered to see what the template puts around them
MARK = "--message--"  # the same, where it is looked for


@dataclass(frozen=True)
class Piece:
    """A part of the text of a conversation; `turn`: whether a turn begins with it."""

    text: str
    turn: bool


class ChatTemplate:
    """The chat template of a tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @property
    def exists(self) -> bool:
        """Whether there is a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes the tools that it is given; others leave them out without a word."""
        return "tools" in json.dumps(getattr(self.tokenizer, "chat_template", None) or "")

    def check_tools(self, tools: list | None) -> None:
        """Raise APIError if there are tools and the template writes none."""
        if tools and not self.takes_tools:
            raise invalid(
                "tools are not served: this model's chat template does not write them; accepted: none, tool_choice none"
                ", or a model whose template does",
                "tools",
                "unsupported_value",
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are written out."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def render(self, messages: Sequence[Message], tools: list | None = None, *, reply: bool = False) -> str:
        """Text of a conversation; with `reply`, up to where the reply begins. Raises APIError if it is refused."""
        if not self.exists:
            raise invalid("this model has no chat template; accepted: /v1/completions", code="no_chat_template")
        self.check_tools(tools)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, add_generation_prompt=reply
            )
        except TemplateError as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise invalid(f"the model's chat template fails on these messages: {error}", "messages") from None

    def pinned(self, head: Sequence[Message], tools: list | None) -> str:
        """The text before the first turn: system prompt and tools, or what the template writes in their place."""
        user, reply = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
        first = self.render([*head, user], tools)
        alone = self._tried(head, tools) if head else ""
        if alone and first.startswith(alone) and all(m["content"].strip() in alone for m in head):
            return alone
        before, later = self._tried([*head, user, reply], tools), self._tried([*head, user, reply, user], tools)
        turn = later[len(before) :] if before and later.startswith(before) else ""
        if turn and first.endswith(turn):
            return first[: -len(turn)]
        if not head and not tools:
            return ""
        return first[: first.rfind(PROBE)]  # the system prompt is a part of the first user message

    def lead(self, head: Sequence[Message], tools: list | None) -> str:
        """The text between the pinned part and the words of the first user message."""
        text = self.render([*head, {"role": "user", "content": MARK}], tools)
        return text.removeprefix(self.pinned(head, tools)).partition(MARK)[0]

    def _tried(self, messages: Sequence[Message], tools: list | None) -> str:
        """The text of messages; empty if the template refuses them."""
        try:
            return self.render(messages, tools)
        except APIError:
            return ""

    def opening(
        self, head: Sequence[Message], tools: list | None, new: Sequence[Message], *, reply: bool
    ) -> tuple[str, list[Piece]]:
        """The whole text of a conversation that begins: the pinned part, which may be empty, and turn by turn."""
        text, pinned = self.render([*head, *new], tools, reply=reply), self.pinned(head, tools)
        if not text.startswith(pinned):
            pinned = ""
        return pinned, self._turns(text, len(pinned), list(head), tools, new, opening=True)

    def resuming(
        self,
        head: Sequence[Message],
        turn: Sequence[Message],
        tools: list | None,
        new: Sequence[Message],
        *,
        reply: bool,
    ) -> list[Piece]:
        """New text of a conversation that goes on with a new turn, after the last one was written to its end.

        Parameters
        ----------
        turn : sequence of Message
            The last turn; empty if there is none.
        """
        before = [*head, *turn]
        prefix = self.render(before, tools) if turn else self.pinned(head, tools)
        text = self.render([*before, *new], tools, reply=reply)
        if not text.startswith(prefix):
            return self.opening(head, tools, new, reply=reply)[1]
        return self._turns(text, len(prefix), before, tools, new, opening=True)

    def continuing(
        self, before: Sequence[Message], tools: list | None, held: str, new: Sequence[Message], *, reply: bool
    ) -> list[Piece] | None:
        """New text of a conversation that goes on.

        Parameters
        ----------
        before : sequence of Message
            System prompt and the last turn: what the stream holds last.
        held : str
            The text of `before` as the stream holds it, the generated reply as it was generated.

        Returns
        -------
        list of Piece or None
            None if the template writes the earlier messages in another way now.
        """
        text = self.render([*before, *new], tools, reply=reply)
        if not text.startswith(held):
            return None
        return self._turns(text, len(held), list(before), tools, new, opening=False)

    def _turns(
        self, text: str, start: int, before: list[Message], tools: list | None, new: Sequence[Message], *, opening: bool
    ) -> list[Piece]:
        """Cut the text from `start` on where user messages of `new` begin; an opening begins with a turn."""
        turns = {start} if opening else set()
        for i, message in enumerate(new):
            if message["role"] != "user" or (opening and i == 0):
                continue
            prefix = self.render([*before, *new[:i]], tools)
            if text.startswith(prefix) and len(prefix) >= start:
                turns.add(len(prefix))
        edges = [*sorted(turns | {start}), len(text)]
        return [Piece(text[a:b], a in turns) for a, b in pairwise(edges) if b > a]
