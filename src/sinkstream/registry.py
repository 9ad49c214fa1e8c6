"""One registry per kind: names to classes or functions, from which CLI choices, tests and doc tables are derived.

A registry never holds instances, so that no run can change the next one. Insertion order is kept: it is the order of
every table that is generated from it.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Callable)


class Registry(Generic[T]):
    """Named classes or functions of one kind.

    Parameters
    ----------
    kind : str
        What the entries are, in the singular ("scorer", "text"); it appears in error messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a class or function under `name`. Raises ValueError if the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            meant = did_you_mean(name, self._entries)
            raise ValueError(f"unknown {self.kind} {name!r}{meant}; accepted: {', '.join(self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """All (name, entry) pairs, in the order of registration."""
        return list(self._entries.items())

    def summary(self, name: str) -> str:
        """First line of the entry's docstring, for help texts and tables."""
        doc = (self[name].__doc__ or "").strip()
        return doc.splitlines()[0].rstrip(".") if doc else ""


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """Part of an error message: the accepted name nearest to `name`, in brackets; empty if none, or `name`, is near."""
    near = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.75)
    return f" (did you mean {near[0]!r}?)" if near and near[0] != name else ""


def import_folder(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, in alphabetical order, so that each registers what it defines."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda m: m.name):
        importlib.import_module(f"{package}.{module.name}")
