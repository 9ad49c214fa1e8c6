"""Random series for the tests of the statistics."""

import numpy as np


def correlated(shape: tuple, rng: np.random.Generator, memory: float = 0.8) -> np.ndarray:
    """Gaussian AR(1) noise of unit innovation along the last axis, after a burn-in of 100 steps."""
    noise = rng.standard_normal((*shape[:-1], shape[-1] + 100))
    for t in range(1, noise.shape[-1]):
        noise[..., t] += memory * noise[..., t - 1]
    return noise[..., 100:]
