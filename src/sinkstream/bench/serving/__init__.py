"""``bench --serve``: a running server under load, timed by a client in a process of its own."""
