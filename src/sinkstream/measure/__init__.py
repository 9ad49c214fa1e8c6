"""Measuring: time, memory, bandwidth, numeric switches, versions and hardware. A leaf: no models, no caches."""
