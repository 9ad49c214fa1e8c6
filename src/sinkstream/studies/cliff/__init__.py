"""The cliff: what hard eviction costs, told apart from what a longer visible context gains."""
