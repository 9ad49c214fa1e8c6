"""`CheckedCache`: where an engine has its policy, its model's description and its recall from; it holds no token."""

from sinkstream.cache import StreamingCache


class CheckedCache(StreamingCache):
    """An empty streaming cache, made after every check of model, policy and options."""

    shows_queries = False  # the engine keeps them
