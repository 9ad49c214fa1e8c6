"""Evaluation: turning a text, a model and a policy into per-token figures, and those into statistics."""
