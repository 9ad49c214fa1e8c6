"""Studies: each in one room, with its run, its record, its tables and its pictures."""
