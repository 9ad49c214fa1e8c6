"""Brute-force reference for the cache's tests: tiny models, naive prune rules and a float64 forward pass.

Nothing here imports `sinkstream` or transformers' modeling code (only `models` builds transformers models, to have
something to compare). Its value is that it shares no line with what it judges.
"""
