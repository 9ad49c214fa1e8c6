"""Report: tables, plots, headline figures and generated parts of documents, from run records and nothing else."""
