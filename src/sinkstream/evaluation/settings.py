"""What one run is: model, text, method and the fixed protocol, as one checked dataclass."""

from dataclasses import asdict, dataclass, field
from typing import Any

from sinkstream.archive import PREFIX, RecallSettings
from sinkstream.cache import POSITIONS
from sinkstream.measure.timing import WARMUP_TOKENS
from sinkstream.policies import CAP_ACCOUNTING, PRESETS, EvictionPolicy, preset_options

BASELINES = {
    "full": "Full cache: nothing is evicted (the reference where it fits)",
    "recompute": "Sliding-window recompute: the last cap tokens are forwarded anew for every token",
}
EVALUATE = {
    "steps": "token by token, each timed (the first --timed-tokens of them; the rest in blocks)",
    "blocks": "--block-tokens tokens in one forward: the same NLL, quality only, many times faster",
}

BLOCK_TOKENS = {"cpu": 256, "cuda": 1024}  # a GPU needs more tokens at once than its launches take time

FIXED = {"strict": ("compress_every",), "window-only": ("compress_every", "sink")}  # what makes them what they are
LABELS = {"compress_every": "R", "max_drop": "max_drop", "slack": "slack", "overlap": "O", "refresh": "B"}
GIVEN_LABELS = {"sink": "S", "window": "W"}


def method_names() -> list[str]:
    """Every ``--policy`` choice: the baselines, then the registered policies."""
    return [*BASELINES, *PRESETS]


def method_summary(name: str) -> str:
    """One line on a method."""
    return BASELINES[name] if name in BASELINES else PRESETS.summary(name)


@dataclass(frozen=True)
class RunSettings:
    """One run of the protocol. Raises ValueError, naming the option, the value and what is accepted."""

    method: str  # one of `method_names`
    # KV slots; the window of recompute. Needed by every method but full
    cap: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # policy options that override those of the named policy
    recall: dict[str, Any] = field(default_factory=dict)  # ``recall``, the chooser, and options with the prefix recall_
    cap_accounting: str = "peak"
    positions: str = "cache"
    allow_untrained_positions: bool = False
    backend: str = "hf"
    # tokens fed before decoding starts; default: cap, so that every decoded token sees a full cache
    prefill: int | None = None
    # {"steps", "blocks"}: token by token, or many tokens in one forward (quality only; the NLL is the same)
    evaluate: str = "steps"
    # with ``evaluate="steps"``: how many tokens are decoded and timed one by one before the rest goes in blocks;
    # default: all
    timed_tokens: int | None = None
    # most tokens of one forward in prefill and blocks; bounds the peak memory of blocks
    block_tokens: int = BLOCK_TOKENS["cpu"]
    sample_every: int = 1  # recompute only: every k-th token is recomputed and scored
    repeats: int = 1  # runs of the step-by-step path; each token's time is the median over them
    warmup_tokens: int = WARMUP_TOKENS
    interleaved: int = 1  # how many runs took turns, token by token (`evaluation.run.run_interleaved`)

    def __post_init__(self) -> None:
        if self.method not in method_names():
            raise ValueError(f"policy {self.method!r} is not known; accepted: {', '.join(method_names())}")
        choices = {"positions": POSITIONS, "evaluate": EVALUATE, "cap_accounting": CAP_ACCOUNTING}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not accepted; accepted: {', '.join(accepted)}")
        for name in ("cap", "prefill", "timed_tokens", "block_tokens", "sample_every", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not accepted; accepted: a whole number of at least 1")
        if self.cap is None and self.method != "full" and self.options.get("window") is None:
            raise ValueError(f"policy {self.method!r} needs a cap; give --cap SLOTS")
        if self.sample_every > 1 and self.method != "recompute":
            raise ValueError(f"sample_every={self.sample_every} is for recompute only, not for {self.method!r}")
        for name in ("repeats", "timed_tokens"):
            if getattr(self, name) != getattr(type(self), name) and self.evaluate != "steps":
                raise ValueError(
                    f"{name}={getattr(self, name)} is about timings; evaluate={self.evaluate!r} takes none"
                )
        if self.warmup_tokens < 0:
            raise ValueError(f"warmup_tokens={self.warmup_tokens} is not accepted; accepted: 0 or more")
        self._check_fixed_options()
        self.recall_settings()
        self.policy()

    @property
    def has_blocks(self) -> bool:
        """Whether some tokens are scored in blocks."""
        return self.evaluate == "blocks" or self.timed_tokens is not None

    @property
    def given_cap(self) -> int:
        """The cap, where the caller knows that one is given."""
        assert self.cap is not None, "only the full cache and a policy with a window may lack a cap"
        return self.cap

    @property
    def eviction_policy(self) -> EvictionPolicy:
        """The eviction policy, where the caller knows that the method is no baseline."""
        policy = self.policy()
        assert policy is not None, "only a baseline has no eviction policy"
        return policy

    def policy(self) -> EvictionPolicy | None:
        """The eviction policy, or None for the baselines.

        Raises ValueError if the options do not fit together or a baseline is given policy options.
        """
        given = {k: v for k, v in self.options.items() if v is not None}
        if self.method in BASELINES:
            if given:
                raise ValueError(f"policy {self.method!r} takes no policy options, but {next(iter(given))} is given")
            return None
        merged = preset_options(self.method, **given)
        if "window" in given:
            policy = EvictionPolicy.build(cap_accounting=self.cap_accounting, **merged)
            self._check_window_fits(policy)
            return policy
        return EvictionPolicy.build(cap=self.cap, cap_accounting=self.cap_accounting, **merged)

    def recall_settings(self) -> RecallSettings | None:
        """What recall is asked for, as far as it is known without the model. Raises ValueError for what cannot be."""
        if not self.recall:
            return None
        if self.recall.get("recall") is None:
            raise ValueError(f"{next(iter(self.recall))} goes with recall=CHOOSER, which is not given")
        if self.method in BASELINES:
            raise ValueError(f"policy {self.method!r} has no recall; accepted: an eviction policy")
        options = {name.removeprefix(PREFIX): value for name, value in self.recall.items() if name != "recall"}
        return RecallSettings.check(self.recall["recall"], self.eviction_policy, **options)

    def label(self) -> str:
        """Short name for tables: the method and the options that tell it from its namesakes."""
        policy = self.policy()
        if policy is None:
            return self.method
        record, words, preset = policy.record(), [self.method], preset_options(self.method)
        given = {k: v for k, v in self.options.items() if v is not None and k not in FIXED.get(self.method, ())}
        shown = {short: record.get(n) for n, short in LABELS.items() if n not in FIXED.get(self.method, ())}
        words += [f"{short}={value}" for short, value in shown.items() if value]
        words += [f"{short}={given[n]}" for n, short in GIVEN_LABELS.items() if n in given]
        others = {k: v for k, v in given.items() if k not in LABELS | GIVEN_LABELS and v != preset.get(k)}
        words += [f"{name}={value}" for name, value in others.items()]
        words += [f"{name}={value}" for name, value in self.recall.items() if name != "recall_told"]
        words += [f"positions={self.positions}"] if self.positions != "cache" else []
        words += ["growth outside cap"] if self.cap_accounting != "peak" else []
        return " ".join(words)

    def prefill_tokens(self, tokens: int) -> int:
        """Tokens fed before decoding, for a text of that many tokens.

        Raises ValueError if nothing would be left to decode.
        """
        policy = self.policy()
        default = self.cap if self.cap is not None else (tokens // 4 if policy is None else policy.peak)
        wanted = default if self.prefill is None else self.prefill
        if wanted + 2 > tokens:
            raise ValueError(
                f"the text has {tokens} tokens and {wanted} of them are prefill (default: the cap), which leaves"
                f" nothing to decode; accepted: at least {wanted + 2} tokens, or a smaller --cap or --prefill"
            )
        return wanted

    def _check_fixed_options(self) -> None:
        fixed = {name: preset_options(self.method)[name] for name in FIXED.get(self.method, ())}
        for name, value in fixed.items():
            if self.options.get(name) not in (None, value):
                raise ValueError(
                    f"{name}={self.options[name]} makes another policy of {self.method!r}, which means {name}={value};"
                    " accepted: another --policy, or the option for one policy only, as in lazy:compress_every=64"
                )

    def _check_window_fits(self, policy: EvictionPolicy) -> None:
        counted = policy.target + CAP_ACCOUNTING[self.cap_accounting](policy.growth)
        if self.cap is not None and counted > self.cap:
            raise ValueError(
                f"window={policy.window} fills {counted} slots (sinks, pinned, overlap and growth included), more than"
                f" cap={self.cap}; accepted: window of at most {policy.window - counted + self.cap}, or no window"
            )

    def record(self) -> dict[str, Any]:
        """All settings, JSON-able; those of recall where there is recall."""
        return {name: value for name, value in asdict(self).items() if name != "recall" or value}
