"""The speed benchmark: rungs of decoding, timed against the bytes that they must read.

`settings` says what is timed, `rungs` what the benchmark asks of a rung (an entry of `evaluation.backends`), `decoding`
times rungs in turn, `session` goes through a list of configurations, and the runner of the evaluation records them.
"""
