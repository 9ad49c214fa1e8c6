"""The demo: all kinds of policy on a small real model, in minutes, offline."""

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

    All methods have `cap` KV slots. Every run times its first `timed_tokens` (default: `TIMED_TOKENS`) one by one and
    scores the others in blocks. Recompute, which forwards the whole window for each token, scores every k-th only.
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
