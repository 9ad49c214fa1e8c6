"""The speed benchmark: rungs of decoding, timed against the bytes that they must read.

`settings` says what is timed, `rungs` knows the ways of decoding, `decoding` runs and times them in turn, `session`
goes through a list of configurations and writes their records.
"""
