"""The prune rules of the design, simulated token by token with plain lists.

Time is counted in appended tokens. Just before token t is written, n = cached + 1. With the base C = S + B + W and the
target T = C + O, an event fires when n >= T + R (lazy; R = 1 is strict), when n > T + slack, or when a callback says
so; then every step drops min(n - T, max_drop) until n <= T. The oldest window tokens go. With a refresh budget the
leaving tokens compete with the pinned ones, and a callback chooses who stays.

With turns, all of the oldest turn goes, and as many turns as make room; a turn that is cut already, or that alone fills
the window, goes token by token.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

Choose = Callable[[list[int], int, int, Hashable], list[int]]
WantPrune = Callable[[int, int], bool]


@dataclass(frozen=True)
class Rule:
    """Sizes in tokens: sink S, window W, refresh B, overlap O, compress_every R, slack, max_drop D.

    `compress_every` defaults to 1 (strict) if neither `slack` nor `adaptive` is given. With `adaptive` the callback
    `want_prune` fires events too, and `compress_every` is then the longest wait (R_max). `turns` are the tokens that
    begin a turn.
    """

    sink: int
    window: int
    refresh: int = 0
    overlap: int = 0
    compress_every: int | None = None
    slack: int | None = None
    max_drop: int | None = None
    adaptive: bool = False
    turns: frozenset[int] = frozenset()

    def __post_init__(self):
        if self.window + self.overlap < 1:
            raise ValueError("window + overlap is 0; the token being written needs a place")

    @property
    def interval(self) -> int | None:
        """R after its default is applied, None if no lazy rule is active."""
        if self.compress_every is None and self.slack is None and not self.adaptive:
            return 1
        return self.compress_every

    @property
    def target(self) -> int:
        """T: what a prune leaves, the new token included."""
        return self.sink + self.refresh + self.window + self.overlap

    @property
    def cap(self) -> int:
        """The most entries ever visible: the target plus the growth."""
        growths = [] if self.slack is None else [self.slack]
        if self.interval is not None:
            growths.append(self.interval - 1)
        if not growths:
            raise ValueError("an adaptive rule without compress_every or slack has no cap")
        return self.target + min(growths)


@dataclass(frozen=True)
class Step:
    """What one appended token sees.

    Attributes
    ----------
    token : int
        Logical index t of the appended token.
    before : dict of group to list of int
        Visible indices before this step's drop, without t (what is cached when the policy is asked).
    visible : dict of group to list of int
        Visible indices in order: sinks, pinned in original order, window up to and including t.
    event : bool
        Whether pruning mode was entered at this step.
    drop_size : int
        Tokens dropped at this step.
    """

    token: int
    before: dict[Hashable, list[int]]
    visible: dict[Hashable, list[int]]
    event: bool
    drop_size: int


class Stream:
    """The simulator: call `append()` once per token.

    Parameters
    ----------
    rule : Rule
    choose : callable (candidates, keep, t, group) -> list of int, optional
        Called at every drop, once per group, if `refresh` > 0. `candidates` are the pinned tokens and those leaving the
        window, in original order; it returns `keep` of them. Required with refresh.
    want_prune : callable (t, gathered) -> bool, optional
        Asked only while no pruning is under way and `gathered` = n - T >= 1. Required with `adaptive`.
    groups : sequence, default=(None,)
        Keys of the sets that choose for themselves: `(None,)` for one shared set, or for instance (layer, head) pairs.
    """

    def __init__(self, rule: Rule, choose: Choose | None = None, want_prune: WantPrune | None = None, groups=(None,)):
        if rule.refresh and choose is None:
            raise ValueError(f"refresh={rule.refresh} needs `choose`")
        if rule.adaptive != (want_prune is not None):
            raise ValueError(f"adaptive={rule.adaptive} but want_prune={want_prune!r}; give both or none")
        self.rule, self.choose, self.want_prune = rule, choose, want_prune
        self.sinks: list[int] = []
        self.window: list[int] = []
        self.pinned: dict[Hashable, list[int]] = {group: [] for group in groups}
        self.pruning = False
        self.seen = 0

    def append(self) -> Step:
        """Append the next token and return what it sees."""
        t = self.seen
        before = self._visible()
        n = len(next(iter(before.values()))) + 1
        event = not self.pruning and self._fires(t, n)
        if event:
            self.pruning = True
        drop = 0
        if self.pruning:
            drop = n - self.rule.target
            if self.rule.max_drop is not None:
                drop = min(drop, self.rule.max_drop)
            self.pruning = n - drop > self.rule.target
            drop += self._drop(t, n - drop)
        (self.sinks if len(self.sinks) < self.rule.sink else self.window).append(t)
        self.seen += 1
        return Step(t, before, self._visible(), event, drop)

    def _fires(self, t: int, n: int) -> bool:
        rule = self.rule
        lazy = rule.interval is not None and n >= rule.target + rule.interval
        slack = rule.slack is not None and n > rule.target + rule.slack
        gathered = n - rule.target
        asked = self.want_prune is not None and gathered >= 1 and self.want_prune(t, gathered)
        return lazy or slack or asked

    def _drop(self, t: int, total: int) -> int:
        """Shrink so that `total` tokens are visible once t has been written; returns how many went beyond that."""
        window_after = total - 1 - len(self.sinks) - self.rule.refresh  # without t
        leaving = self.window[: len(self.window) - window_after]
        more = self._rest_of_turn(leaving, self.window[len(leaving) :], t)
        self.window = self.window[len(leaving) + more :]
        if not self.rule.refresh:
            return more
        for group, pinned in self.pinned.items():
            candidates = pinned + leaving
            kept = sorted(self.choose(list(candidates), self.rule.refresh, t, group))
            if len(kept) != self.rule.refresh or len(set(kept)) != len(kept) or not set(kept) <= set(candidates):
                raise ValueError(f"choose returned {kept}; need {self.rule.refresh} distinct of {candidates}")
            self.pinned[group] = kept
        return more

    def _rest_of_turn(self, leaving: list[int], rest: list[int], t: int) -> int:
        """How many tokens of `rest` belong to the turn that `leaving` ends in, if whole turns go."""
        if not leaving or leaving[0] not in self.rule.turns:
            return 0
        return next((i for i, token in enumerate([*rest, t]) if token in self.rule.turns), 0)

    def _visible(self) -> dict[Hashable, list[int]]:
        return {group: self.sinks + pinned + self.window for group, pinned in self.pinned.items()}


def simulate(rule: Rule, tokens: int, choose=None, want_prune=None, groups=(None,)) -> Iterator[Step]:
    """Yield the step of each of `tokens` appended tokens; see `Stream` for the arguments."""
    stream = Stream(rule, choose, want_prune, groups)
    for _ in range(tokens):
        yield stream.append()
