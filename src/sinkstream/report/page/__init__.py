"""The page: one self-contained HTML file that tells the whole story, from records and nothing else."""
