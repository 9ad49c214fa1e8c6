"""The row of the step table that a step reads: what it must know of each stream, one int32 scalar a column."""

# Columns of the per-stream scalars, int32. A ring slot r is visible iff (r - FIRST) mod ring < LENGTH.
SLOT = 0  # where the token is written
WINDOW_POSITION = 1  # of its query, against ring keys
FRAME_POSITION = 2  # of its query, against pinned keys
PINNED = 3  # pinned entries visible
FIRST = 4  # ring index of the oldest visible window token
LENGTH = 5  # visible window tokens, the new one included
TOKEN = 6  # id of the token; LIKELIEST until the step has begun
QUERY = 7  # token index modulo the observed queries; -1 marks the first token of a stream
FIELDS = 8

LIKELIEST = -1  # in place of a token id: the likeliest token of the logits that the step finds
