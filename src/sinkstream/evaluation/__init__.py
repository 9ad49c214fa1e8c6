"""Evaluation: a text, a model and a policy become per-token figures and records.

`decoders` feed a model under a method, `backends` lists every way of decoding, `run` is the loop, `runner` does the
jobs of a command and records what they gave.
"""
