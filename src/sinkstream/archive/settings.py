"""The options of recall: chooser, slots, times of choice, positions of recalled tokens, and archive."""

import re
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, Self

from sinkstream.archive.base import ARCHIVES
from sinkstream.archive.choosers import CHOOSERS, Chooser
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.options import check_option, check_options, check_whole, option, option_fields
from sinkstream.policies.triggers import Turns
from sinkstream.registry import did_you_mean

BUDGET_BYTES = 2 << 30
STEP_BYTES = 16 << 20
_numbers: dict[str, count] = {}  # of files beside others, by the name before the number
PREFIX = "recall_"  # of a setting's name, and of a chooser's option, among the options of a cache


@dataclass(frozen=True)
class RecallSettings:
    """How evicted tokens come back.

    Raises
    ------
    ValueError
        If a setting, or a combination of them, is not accepted.
    """

    chooser: Chooser
    slots: int = option(None, "slots that recalled tokens take out of the window", minimum=1)
    every: int = option(8, "tokens between two choices", minimum=1)
    empty_every: int = option(
        None,
        "the same while nothing is recalled, a divisor of it; default: 1 if the chooser foresees, else recall_every",
        minimum=1,
    )
    gate: float = option(
        1.0, "score that opens the gate, in units of the chooser's 1 % false-alarm level; 0: always open", minimum=0.0
    )
    alarms: int = option(
        None,
        "false alarms per 1,000 tokens from which on the gate rises: frames that were emptied without a score of twice"
        " the gate; 0: it never rises; default: the chooser's",
        minimum=0,
        maximum=1000,
    )
    lag: int = option(
        0, "tokens from a choice of the gate to the frame that it sets, so that no step waits for it", minimum=0
    )
    step_bytes: int = option(
        STEP_BYTES,
        "bytes of the archive that one step may wait for: a larger frame of the gate is set later, one token for"
        " every further recall_step_bytes",
        minimum=1,
    )
    hold: int = option(16, "tokens for which recalled tokens stay after the gate was last open", minimum=0)
    hold_asked: int = option(256, "tokens for which recalled tokens stay after a question", minimum=0)
    share: float = option(
        0.6, "a question brings blocks back from this share of its best score on", minimum=0.0, maximum=1.0
    )
    distance: int = option(
        65, "positions from the query to the nearest recalled token; 0: right behind the sinks", minimum=0
    )
    archive: str = option("kv", "what is kept of evicted tokens", choices=ARCHIVES.names)
    behind: int = option(
        0, "latest tokens of the window that a text archive reads in front of recalled ones", minimum=0
    )
    bytes: int = option(BUDGET_BYTES, "host memory of the archive", minimum=1)
    file: str | None = option(
        None, "file for what does not fit the host memory; made by the stream, and deleted with it"
    )
    file_bytes: int = option(BUDGET_BYTES, "size of the file", minimum=1)

    def __post_init__(self):
        check_options(self, PREFIX)
        self._check_chooser()
        if self.file is not None and self.archive != "kv":
            raise ValueError(f"recall_file goes with recall_archive='kv', not with {self.archive!r}")
        if self.behind and self.archive != "text":
            raise ValueError(f"recall_behind={self.behind} goes with recall_archive='text', not with {self.archive!r}")
        if self.empty_every is None:
            object.__setattr__(self, "empty_every", 1 if self.chooser.foresees else self.every)
        if self.alarms is None:
            object.__setattr__(self, "alarms", self.chooser.alarms)
        if self.every % self.empty_every:
            raise ValueError(
                f"recall_empty_every={self.empty_every} is not accepted; accepted: a divisor of recall_every="
                f"{self.every}"
            )

    def _check_chooser(self) -> None:
        """Raise ValueError unless the class attributes that a user's chooser may override are whole numbers."""
        name = type(self.chooser).__name__
        for what, least in (("block", 1), ("query_tokens", 1), ("alarms", 0)):
            check_whole(f"{name}.{what}", getattr(self.chooser, what), least)

    def record(self) -> dict[str, Any]:
        """The settings as JSON: the name of the chooser under ``recall``, settings and options by name."""
        names = {cls: name for name, cls in CHOOSERS.items()}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "chooser"}
        options = {f.name: getattr(self.chooser, f.name) for f in fields(self.chooser)}
        plain = {n: v for n, v in options.items() if isinstance(v, int | float | str | tuple | list | None)}
        name = names.get(type(self.chooser), type(self.chooser).__name__)
        return {"recall": name, "heads": list(self.chooser.heads)} | plain | own

    def beside(self) -> Self:
        """The settings of another stream beside this one: a number is appended to the name of its file."""
        if self.file is None:
            return self
        base = re.sub(r"\.fork[0-9]+$", "", self.file)
        names = (f"{base}.fork{n}" for n in _numbers.setdefault(base, count(1)))
        return replace(self, file=next(name for name in names if not Path(name).exists()))

    @classmethod
    def build(
        cls, recall: "str | Chooser", model: Any, peak: int, tokenizer: Any = None, **options: Any
    ) -> "RecallSettings":
        """Settings from flat options, without their prefix.

        Parameters
        ----------
        recall : str or Chooser
            Name of a registered chooser, or a chooser.
        model : PreTrainedModel
            For choosers that must know it.
        peak : int
            The most entries that the policy caches: a quarter of them is the default of ``slots``.
        tokenizer : tokenizer or None
            For choosers that read text.
        **options
            Settings, and options of the chooser where it is given by name. None means "not given".

        Raises
        ------
        ValueError
            Naming the option, the value and what is accepted.
        """
        mine, given = cls._parted(recall, options)
        chooser = CHOOSERS[recall].for_model(model, **given) if isinstance(recall, str) else recall
        chooser.check(model)
        return cls(chooser.with_tokenizer(tokenizer), **{"slots": max(1, peak // 4)} | mine)

    @classmethod
    def check(cls, recall: "str | Chooser", policy: EvictionPolicy, **options: Any) -> Self:
        """The settings as far as they are known without the model. Raises ValueError as `build` and `check_policy`."""
        mine, given = cls._parted(recall, options)
        given.pop("heads", None)  # who knows the model says which it has
        chooser = CHOOSERS[recall](**given) if isinstance(recall, str) else recall
        settings = cls(chooser, **{"slots": max(1, policy.peak // 4)} | mine)
        settings.check_policy(policy)
        return settings

    @classmethod
    def _parted(cls, recall: "str | Chooser", options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings, and options of the chooser, that are given. Raises ValueError if nobody has one, as `build`."""
        given = {name: value for name, value in options.items() if value is not None}
        own = {f.name for f in option_fields(cls)}
        mine = {name: given.pop(name) for name in [*given] if name in own}
        if not isinstance(recall, str | Chooser):
            raise ValueError(f"recall={recall!r} is not accepted; accepted: {', '.join(CHOOSERS)}, or a Chooser")
        known = {f.name for f in fields(CHOOSERS[recall])} if isinstance(recall, str) else set()
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            names = [PREFIX + name for name in sorted(own | known)]
            meant = did_you_mean(PREFIX + unknown, names)
            raise ValueError(f"unknown option '{PREFIX}{unknown}'{meant}; accepted: {', '.join(names)}")
        for f in option_fields(CHOOSERS[recall]) if isinstance(recall, str) else ():
            if f.name in given:
                check_option(f, given[f.name], PREFIX)
        if isinstance(mine.get("file"), Path):
            mine["file"] = str(mine["file"])
        return mine, given

    def check_policy(self, policy: EvictionPolicy) -> None:
        """Raise ValueError, by name, unless recall composes with the policy, and its slots leave a window."""
        refused = {
            "a policy that pins tokens (refresh)": policy.refresh > 0,
            "evict='turns'": any(isinstance(t, Turns) for t in policy.triggers),
        }
        wrong = next((name for name, given in refused.items() if given), None)
        if wrong is not None:
            raise excluded(wrong)
        most = policy.window + policy.overlap - 1
        if most < 1:
            raise ValueError("recall takes slots out of a window of one token; accepted: a larger cap, or fewer sinks")
        if self.slots > most:
            raise ValueError(
                f"recall_slots={self.slots} leave nothing of a window of {policy.window + policy.overlap} tokens;"
                f" accepted: 1 to {most}"
            )


def excluded(what: str) -> ValueError:
    """What is raised where recall does not compose with something that is given."""
    return ValueError(f"recall and {what} exclude each other; give one of them")
