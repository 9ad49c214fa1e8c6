"""Streaming question answering: facts arrive for ever, and every few lines one of them is asked, by how far back."""
