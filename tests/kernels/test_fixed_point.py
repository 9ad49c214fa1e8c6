"""Exponential, logarithms and exponential random numbers in whole numbers, against float64."""

import math

import pytest
import torch
from scipy.stats import kstest

from sinkstream.kernels.fixed_point import LIMIT, ONE, exp2_minus, log2_of_one_plus, log2_ratio, weight_of
from sinkstream.kernels.sample_twin import log2, log2_exponential, philox

WORDS = torch.cat([torch.tensor([0, 1, 2**31, 2**32 - 1]), torch.arange(0, 2**32, 2**32 // 100_003)])
UNIT = 2.0**-30


def test_the_functions_are_those_of_float64():
    share = WORDS.double() / 2**32
    assert (exp2_minus(WORDS).double() * UNIT - 2**-share).abs().max() < 6e-9
    assert (log2_of_one_plus(WORDS).double() * UNIT - torch.log2(1 + share)).abs().max() < 8e-9
    half = WORDS[WORDS > 0] // 2 + 1
    share = half.double() / 2**32
    expected = torch.log2(-torch.log1p(-share) / share)
    assert (log2_ratio(half).double() * UNIT - expected).abs().max() < 1e-8


def test_weights_halve_and_end():
    keys = torch.tensor([0, ONE, 10 * ONE, 40 * ONE, 41 * ONE, LIMIT])
    assert weight_of(keys, exp2_minus).tolist() == [2**40, 2**39, 2**30, 1, 0, 0]
    keys = torch.arange(0, 30 * ONE, 12_347)
    assert (weight_of(keys, exp2_minus).diff() <= 0).all()
    expected = 2 ** (40 - keys.double() / ONE)
    assert ((weight_of(keys, exp2_minus).double() - expected).abs() <= 1.2e-8 * expected + 1).all()


def test_logarithms_of_whole_numbers():
    x = torch.cat([torch.arange(1, 3000), WORDS + 1])
    assert (log2(x).double() / ONE - torch.log2(x.double())).abs().max() < 2e-7


def test_exponential_numbers_of_every_word():
    share = (WORDS.double() + 0.5) / 2**32
    expected = torch.log2(-torch.log1p(-share))
    assert (log2_exponential(WORDS).double() / ONE - expected).abs().max() < 5e-7


@pytest.mark.parametrize(
    ("seed", "block", "position", "expected"),
    [  # of the published generator, with the two other words of the counter 0
        (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_philox_is_the_published_generator(seed, block, position, expected):
    words = philox(torch.tensor([seed]), torch.tensor([block]), torch.tensor([position]))
    assert words[0, 0].tolist() == expected


def test_random_numbers_are_exponential_and_of_their_own():
    words = philox(torch.tensor([1, 2]), torch.arange(10_000), torch.tensor([5, 5]))
    numbers = 2 ** (log2_exponential(words).double() / ONE)
    assert kstest(numbers[0].flatten().numpy(), "expon").pvalue > 1e-3
    assert kstest(numbers[0].flatten().numpy() * 1.05, "expon").pvalue < 1e-3, "control"
    assert abs(float(torch.corrcoef(numbers.flatten(1))[0, 1])) < 5 / math.sqrt(40_000)
    later = philox(torch.tensor([1]), torch.arange(10_000), torch.tensor([6]))
    assert not torch.equal(later[0], words[0])
