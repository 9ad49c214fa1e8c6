"""Exponential and logarithm in 64-bit integers, so that a CPU and a GPU draw the same token from the same logits.

Floating-point units differ in the last bit of an exponential, and a sum of floats depends on its order; whole numbers
do neither. The functions here hold operators alone: the twins call them with tensors, and the kernels compile them.
Polynomials are Chebyshev fits; `tests/kernels/test_fixed_point.py` holds them against float64.

Q30 means a whole number that stands for itself times 2^-30.
"""

from sinkstream.kernels.runtime import jit, tl  # noqa: F401  (the interpreter looks for `tl` where functions are)

FRACTION = 24  # bits behind the point of keys: base-2 logarithms of probabilities
ONE = 1 << FRACTION
LIMIT = (1 << 30) - 1  # the largest key: 64 halvings below the likeliest token


def exp2_minus(f):
    """2^-(f / 2^32), Q30, of f in [0, 2^32); error below 4e-9."""
    p = 15804 - ((1046 * f) >> 32)
    p = -164921 + ((p * f) >> 32)
    p = 1431461 + ((p * f) >> 32)
    p = -10327332 + ((p * f) >> 32)
    p = 59597076 + ((p * f) >> 32)
    p = -257941247 + ((p * f) >> 32)
    p = 744261118 + ((p * f) >> 32)
    return 1073741824 - ((p * f) >> 32)


def log2_of_one_plus(m):
    """Base-2 logarithm of 1 + m / 2^32, Q30, of m in [0, 2^32); error below 8e-9."""
    p = -21198405 + ((3773608 * m) >> 32)
    p = 55887395 + ((p * m) >> 32)
    p = -96737653 + ((p * m) >> 32)
    p = 133257033 + ((p * m) >> 32)
    p = -168982012 + ((p * m) >> 32)
    p = 217057921 + ((p * m) >> 32)
    p = -299197210 + ((p * m) >> 32)
    p = 475340159 + ((p * m) >> 32)
    middle = ((m >> 1) * (4294967296 - m)) >> 31
    return (m >> 2) + ((middle * p) >> 32)


def log2_ratio(v):
    """Base-2 logarithm of -ln(1 - V) / V, Q30, of V = v / 2^32 in [0, 1/2]; error below 1e-8."""
    p = -693297480 + ((600428160 * v) >> 32)
    p = 525617214 + ((p * v) >> 32)
    p = -70500460 + ((p * v) >> 32)
    p = 130753633 + ((p * v) >> 32)
    p = 132055988 + ((p * v) >> 32)
    p = 193785904 + ((p * v) >> 32)
    p = 322722484 + ((p * v) >> 32)
    p = 774541012 + ((p * v) >> 32)
    return (p * v) >> 32


def weight_of(key, exp2):
    """2^-key of a key in [0, LIMIT], Q40 int64: the likeliest token weighs 2^40; `exp2` is `exp2_minus`."""
    return (exp2((key & 16777215) << 8) << 10) >> (key >> 24)


exp2_minus_jit = jit(exp2_minus)
log2_of_one_plus_jit = jit(log2_of_one_plus)
log2_ratio_jit = jit(log2_ratio)
