"""The row of the step table that a step reads: what it must know of each stream, one int32 scalar a column."""

# Columns of the per-stream scalars, int32. A ring slot r is visible iff (r - FIRST) mod ring < LENGTH.
SLOT = 0  # where the token is written
WINDOW_POSITION = 1  # of its query, against ring keys
FRAME_POSITION = 2  # of its query, against pinned keys
PINNED = 3  # pinned entries visible
FIRST = 4  # ring index of the oldest visible window token
LENGTH = 5  # visible window tokens, the new one included
TOKEN = 6  # id of the token; -1 - t for the token of index t in the stream until the step has begun
QUERY = 7  # token index modulo the observed queries; -1 marks the first token of a stream
FIELDS = 8

# In place of a token id, given to a step: what the step does with the logits that it finds.
LIKELIEST = -1  # take the likeliest token
DRAWN = -2  # draw a token as the stream's row of the sample table says

# In place of a token id, in the step table.
IDLE = -(2**31)  # the stream sits the step out
NO_TOKEN = 2**31 - 1  # the logits were no distribution, and the likeliest token has been appended
