"""Measuring: time, memory, environment, and the run records that every table, plot and verdict is made from.

A leaf package: it knows nothing of models, policies or caches. Import from its modules, for instance
`from sinkstream.measure.timing import timed`.
"""
