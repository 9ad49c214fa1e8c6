"""sinkstream: language models that stream for ever in a fixed amount of memory."""

__version__ = "0.1.0"
