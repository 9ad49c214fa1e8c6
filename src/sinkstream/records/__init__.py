"""Records: what a run leaves on disk, how it is checked, read, paired and selected."""
