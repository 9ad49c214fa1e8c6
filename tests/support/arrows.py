"""Who may import whom: the table that the architecture test holds against every import, and docs against the table."""

# A unit is a top-level module or folder of the package. It imports itself and what its line names, nothing else.
LEAVES = frozenset({"registry", "compat"})
MODELS = frozenset({"models", "data"})
RECORDS = frozenset({"measure", "statistics", "records"})
BASE = LEAVES | MODELS | RECORDS | {"policies"}
ARROWS: dict[str, frozenset[str]] = {
    "registry": frozenset(),
    "compat": frozenset(),
    "ray_cluster": frozenset(),
    "measure": frozenset(),
    "statistics": frozenset(),
    "records": frozenset({"measure", "statistics"}),
    "show": frozenset({"records", "statistics"}),
    "data": LEAVES,
    "models": LEAVES,
    "policies": LEAVES,
    "archive": LEAVES | {"records", "policies"},
    "cache": LEAVES | {"records", "policies", "archive", "kernels"},
    "kernels": LEAVES,
    "engine": LEAVES | {"models", "measure", "records", "policies", "archive", "cache", "kernels"},
    "serve": LEAVES | MODELS | {"measure", "records", "policies", "archive", "cache", "engine", "ray_cluster"},
    "evaluation": BASE | {"archive", "cache", "engine", "show"},
    "bench": BASE | {"archive", "cache", "engine", "serve", "evaluation", "show"},
    "studies": BASE | {"archive", "evaluation", "show"},
    "matrix": BASE | {"archive", "evaluation", "show", "bench", "studies", "ray_cluster"},
    "report": BASE | {"archive", "cache", "engine", "show", "bench", "studies", "matrix"},
    "cli": BASE | {"archive", "cache", "engine", "serve", "evaluation", "show", "bench", "studies", "matrix", "report"},
    "__main__": frozenset({"cli"}),
    "__init__": frozenset({"cache", "engine", "policies"}),  # the public names
}
