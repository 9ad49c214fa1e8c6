"""Measure and tune the kernels of the decode step, inside the engine's own `FusedDecode`; see `__main__`."""
