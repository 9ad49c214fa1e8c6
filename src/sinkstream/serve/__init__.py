"""A conversation that cannot overflow, behind the OpenAI API: sessions, each with its own stream, and a scheduler.

`Service` is the whole of it without HTTP; `app.create_app` puts it behind HTTP. Only the modules of HTTP need the
packages of the `serve` extra.
"""

from sinkstream.serve.service import Service
from sinkstream.serve.settings import ServeSettings

__all__ = ["ServeSettings", "Service"]
