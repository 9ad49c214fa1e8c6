"""Experiments: lists of runs that belong together."""
