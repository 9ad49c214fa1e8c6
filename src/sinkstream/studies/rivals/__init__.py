"""Rivals: other ways to decode for ever, or to try, on the same tokens and at the same peak slots as our policies."""
