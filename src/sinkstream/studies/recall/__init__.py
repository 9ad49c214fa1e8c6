"""Recall: how much a model still knows of a passage that it read before, by distance and policy."""
