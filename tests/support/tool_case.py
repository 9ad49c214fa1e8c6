"""A template that writes tools and calls, a tool, a call of it, and replies that say what they are told to say."""

from typing import ClassVar

from sinkstream.serve.events import Ended, TextPiece
from sinkstream.serve.reply import Reply

TEMPLATE = (
    "{% if tools %}<t>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<tool_call>\n' }}"
    "{{ '{\"name\": \"' + c['function']['name'] + '\", \"arguments\": ' + c['function']['arguments'] | tojson + '}' }}"
    "{{ '\n</tool_call>' }}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "rain", "arguments": {"day": 3}}\n</tool_call>'


class Planned(Reply):
    """Writes what it is told to, up to a stop string."""

    said: ClassVar[list[str]] = []

    def run(self):
        for token in self.tokenizer(self.said.pop(0), add_special_tokens=False)["input_ids"]:
            self.lane.prefill([token])
            self._written.append(token)
            if piece := self.text.push(token):
                self.emit(TextPiece(self.index, piece))
            if self.text.stopped:
                break
            yield
        if piece := self.text.finish():
            self.emit(TextPiece(self.index, piece))
        self.emit(Ended(self.index, "stop"))
