"""The chat in the terminal: commands, a line of figures and a bar after every reply."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.text import Text

from sinkstream.serve.talk import OPTIONS, Talk, TalkError

BAR_WIDTH = 40
HELP: dict[str, str] = {
    "/help": "show the commands",
    "/stats": "show what the conversation holds",
    "/system TEXT": "begin anew with another system prompt, which stays pinned",
    "/pin TEXT": "add a text to the system prompt, where it is never evicted",
    "/undo": "take back the last turn",
    "/regen": "write the last reply anew, with another seed; a greedy one comes out the same",
    "/save NAME": "save the conversation",
    "/load NAME": "continue a saved conversation",
    "/reset": "begin anew",
    "/set NAME VALUE": f"set an option: {', '.join(OPTIONS)}; without VALUE its default",
    "/quit": "end (so does Ctrl-D); Ctrl-C ends a reply",
}


class Terminal:
    """A person's side of a talk.

    Parameters
    ----------
    talk : Talk
    console : Console
    """

    def __init__(self, talk: Talk, console: Console):
        self.talk, self.console, self._forgets = talk, console, False
        self._anew = 0  # how often the latest reply was written anew
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "stats": self._stats,
            "system": lambda rest: self._begin(rest or None),
            "pin": lambda rest: self._tell(self.talk.pin(rest)),
            "undo": self._undo,
            "regen": self._regen,
            "save": lambda rest: self._tell(self.talk.save(rest)),
            "load": lambda rest: self._tell(self.talk.load(rest)),
            "reset": lambda rest: self._begin(self.talk.system),
            "set": self._set,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line until they end, or one is /quit."""
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text:
                self.answer(text)

    def answer(self, text: str) -> None:
        """Carry out a command, or send a message."""
        try:
            if not text.startswith("/"):
                self._anew = 0
                self._say(text)
                return
            name, _, rest = text[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                raise TalkError(f"/{name} is no command; see /help")
            command(rest.strip())
        except TalkError as error:
            self.console.print(f"error: {error}", style="red", markup=False, highlight=False)

    # ---- commands ----

    def _say(self, text: str) -> None:
        begin, first = time.perf_counter(), None
        try:
            for piece in self.talk.say(text):
                first = first or time.perf_counter()
                self.console.file.write(piece)
                self.console.file.flush()
        except KeyboardInterrupt:
            self.console.print()
            self._tell("stopped; what was written stays a part of the conversation")
            return
        self.console.print()
        if first is not None:
            self._figures(first - begin, time.perf_counter() - first)

    def _help(self, rest: str) -> None:
        for name, what in HELP.items():
            self.console.print(f"  {name:16} {what}", markup=False, highlight=False)

    def _stats(self, rest: str) -> None:
        for name, value in self.talk.stats().items():
            self.console.print(f"  {name:16} {value}", markup=False, highlight=False)

    def _begin(self, system: str | None) -> None:
        self.talk.reset(system)
        self._tell("a new conversation")

    def _undo(self, rest: str) -> None:
        self.talk.undo()
        self._tell("the last turn is taken back")

    def _regen(self, rest: str) -> None:
        text = self.talk.last
        if text is None:
            raise TalkError("there is no reply yet that could be written anew")
        self.talk.undo()
        options, given = self.talk.options, self.talk.options.get("seed")
        self._anew += 1
        options["seed"] = (given or 0) + self._anew  # an earlier seed would write an earlier reply
        try:
            self._say(text)
        finally:
            del options["seed"]
            if given is not None:
                options["seed"] = given

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            for option in OPTIONS:
                self.console.print(f"  {option:20} {self.talk.options.get(option, 'default')}", highlight=False)
            return
        if name not in OPTIONS:
            raise TalkError(f"option {name!r} is not known; accepted: {', '.join(OPTIONS)}")
        if not value:
            self.talk.options.pop(name, None)
            return
        try:
            self.talk.options[name] = OPTIONS[name](value)
        except ValueError:
            kind = "a whole number" if OPTIONS[name] is int else "a number"
            raise TalkError(f"{name}={value!r} is not accepted; accepted: {kind}") from None

    # ---- figures ----

    def _figures(self, ttft: float, seconds: float) -> None:
        parts, context = [f"TTFT {ttft:.2f} s"], self.talk.context
        if self.talk.tokens > 1 and seconds > 0:
            parts.append(f"{(self.talk.tokens - 1) / seconds:.1f} tok/s")
        if context:
            self.console.print(bar(context["pinned"], context["kept"], context["cap"]), end=" ")
            parts.insert(0, f"{context['kept']}/{context['cap']}")
            if context["evicted"]:
                parts.insert(1, f"evicted {context['evicted']} tokens (turns: {context['evicted_turns']})")
            if context["evicted"] and not self._forgets:
                parts.append("the oldest turns are being forgotten from now on")
            self._forgets = bool(context["evicted"])
        self._tell(" · ".join(parts))
        for turn in (context or {}).get("recalled", ()):
            self._tell(f"recalled turn {turn['turn']}: {turn['text']}")

    def _tell(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def bar(pinned: int, kept: int, cap: int, width: int = BAR_WIDTH) -> Text:
    """The slots of a session: [pinned | kept, free]."""
    pinned_cells = round(width * pinned / cap) or (1 if pinned else 0)
    kept_cells = max(0, round(width * kept / cap) - pinned_cells)
    free = width - pinned_cells - kept_cells
    parts = [("[", ""), ("█" * pinned_cells, "magenta"), ("|", ""), ("█" * kept_cells, "cyan"), ("·" * free, "dim")]
    return Text.assemble(*parts, ("]", ""))


def typed_lines() -> Iterator[str]:
    """What a person types, with history and editing; the lines of a pipe otherwise."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ")
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
