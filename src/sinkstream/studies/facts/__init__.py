"""Planted facts: statements, the questions about them, and answers that are chosen among alternatives."""
