"""Measuring: time, memory, bandwidth, numeric switches, versions and hardware. A leaf: knows no models and no caches."""
