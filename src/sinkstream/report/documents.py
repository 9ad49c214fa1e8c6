"""The generated tables of the documents, by name; every number comes from records, every feature from a registry."""

from pathlib import Path

from sinkstream.registry import Registry

DOCUMENT_TABLES: Registry = Registry("document table")


def render_tables(results: Path) -> dict[str, str]:
    """Markdown of every registered table, by name."""
    return {}
