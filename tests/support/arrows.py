"""Who may import whom: the table that the architecture test holds against every import, and docs against the table."""

# A unit is a top-level module or folder of the package. It imports itself and what its line names, nothing else.
LEAVES = frozenset({"registry", "compat"})
MODELS = frozenset({"models", "data"})
RECORDS = frozenset({"measure", "statistics", "records"})
BASE = LEAVES | MODELS | RECORDS | {"policies"}
ARROWS: dict[str, frozenset[str]] = {
    "registry": frozenset(),
    "compat": frozenset(),
    "measure": frozenset(),
    "statistics": frozenset(),
    "records": frozenset({"measure", "statistics"}),
    "show": frozenset({"records", "statistics"}),
    "data": LEAVES,
    "models": LEAVES,
    "policies": LEAVES,
    "cache": LEAVES | {"records", "policies", "kernels"},
    "kernels": LEAVES,
    "engine": LEAVES | {"models", "measure", "records", "policies", "cache", "kernels"},
    "serve": LEAVES | MODELS | {"measure", "records", "policies", "cache", "engine"},
    "evaluation": BASE | {"cache", "engine", "show"},
    "bench": BASE | {"cache", "engine", "serve", "evaluation", "show"},
    "studies": BASE | {"evaluation", "show"},
    "matrix": BASE | {"evaluation", "show", "bench", "studies"},
    "report": BASE | {"cache", "engine", "show", "bench", "studies", "matrix"},
    "cli": BASE | {"cache", "engine", "serve", "evaluation", "show", "bench", "studies", "matrix", "report"},
    "__init__": frozenset({"cache", "engine", "policies"}),  # the public names
}
