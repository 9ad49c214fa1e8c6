"""The demo: every idea of the project on a small real model, in minutes, offline."""

from sinkstream.evaluation.settings import RunSettings

CAP = 256
TOKENS = 2048
TIMED_TOKENS = 128
SAMPLE_EVERY = 16
TITLE = "SmolLM2-135M over the built-in text"


def demo_settings(cap: int = CAP, sample_every: int = SAMPLE_EVERY) -> list[RunSettings]:
    """The demo's runs, the control of the table first.

    Parameters
    ----------
    cap : int
        KV slots of every method.
    sample_every : int
        Recompute scores every k-th token only: it forwards the whole window for each.
    """
    shared = {"cap": cap, "timed_tokens": TIMED_TOKENS}
    lazy = {"compress_every": 32}
    return [
        RunSettings("full", **shared),
        RunSettings("recompute", **shared, sample_every=sample_every),
        RunSettings("window-only", **shared),
        RunSettings("strict", **shared),
        RunSettings("lazy", **shared, options=lazy),
        RunSettings("max-drop", **shared, options=lazy | {"max_drop": 8}),
        RunSettings("overlap", **shared, options=lazy | {"overlap": 32}),
        RunSettings("refresh-window-attention", **shared, options=lazy | {"refresh": 32}),
        RunSettings("adaptive-entropy", **shared),
    ]
