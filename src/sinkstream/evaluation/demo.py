"""The demo: every idea of the project on a small real model, in minutes, offline."""

from dataclasses import replace

from sinkstream.evaluation.settings import RunSettings

CAP = 256
TOKENS = 6_144
FULL_FITS = 8_192  # positions that the built-in model was trained on
TIMED_TOKENS = 96
SAMPLE_EVERY = 56
TITLE = "SmolLM2-135M over the built-in text"


def demo_settings(
    cap: int = CAP, sample_every: int = SAMPLE_EVERY, tokens: int = TOKENS, timed_tokens: int | None = None
) -> list[RunSettings]:
    """The demo's runs, the control of the table first: the full cache where it fits, else strict.

    Every run times its first tokens one by one and scores the others in blocks.

    Parameters
    ----------
    cap : int
        KV slots of every method.
    sample_every : int
        Recompute scores every k-th token only: it forwards the whole window for each.
    tokens : int
        Length of the text.
    timed_tokens : int, optional
        Tokens of each run that are timed; default: `TIMED_TOKENS`.
    """
    timed = TIMED_TOKENS if timed_tokens is None else timed_tokens

    def one(method: str, **options: int) -> RunSettings:
        return RunSettings(method, cap, options, timed_tokens=timed)

    return [
        *([one("full")] if tokens <= FULL_FITS else []),
        one("strict"),
        replace(one("recompute"), sample_every=sample_every),
        one("window-only"),
        one("lazy", compress_every=32),
        one("max-drop", compress_every=32, max_drop=8),
        one("overlap", compress_every=32, overlap=32),
        one("refresh-window-attention", compress_every=32, refresh=32),
        one("adaptive-entropy"),
    ]
