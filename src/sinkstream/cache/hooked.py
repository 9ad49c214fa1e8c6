"""What a model knows of the hooks that streaming caches have put on it."""

from typing import Any

HOOKED = "_sinkstream_hooked"  # the attribute of a module that holds its `Hooked`


class Hooked:
    """The hooks of one module and the caches that need them; an attribute of the module while caches of it live.

    In a copy or a pickle of the module, None is in its place. No table of all modules: a compiler that traces the hooks
    would guard on the places of other models in it, which may die meanwhile.

    Attributes
    ----------
    weights : tuple
        Of a decoder, as `hooks._weights_of`, when the hooks were put on or after the latest ``load_state_dict()``.
    untraced : bool
        Whether the hooks are those that a compiler calls and does not trace, which take 0.1 ms longer.
    """

    def __init__(self) -> None:
        self.users: set[object] = set()
        self.handles: list[Any] = []
        self.weights: tuple = ()
        self.untraced = False

    def __reduce__(self) -> tuple:
        return type(None), ()

    def take_off(self) -> None:
        """Remove the hooks."""
        handles, self.handles = self.handles, []
        for handle in handles:
            handle.remove()


def hooked_of(module: Any) -> Hooked | None:
    """The hooks of this very module; None: it has none of ours, or those that a copy has brought along."""
    return getattr(module, HOOKED, None)
