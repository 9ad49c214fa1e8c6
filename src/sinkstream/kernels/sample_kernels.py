"""The kernels of `sample`: processed logits and their largest, bits of a threshold, and the winners of the tiles."""

from sinkstream.kernels.fixed_point import (
    exp2_minus_jit,
    log2_of_one_plus_jit,
    log2_ratio_jit,
)
from sinkstream.kernels.likeliest import first_largest
from sinkstream.kernels.runtime import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    tl,
)


@jit
def _number(number_ptr, stream, COLUMN: tl.constexpr, NUMBERS: tl.constexpr):
    return tl.load(number_ptr + stream * NUMBERS + COLUMN).to(tl.float32)


@jit
def _processed(logits, number_ptr, count_ptr, bias_ptr, stream, columns, vocab, NUMBERS: tl.constexpr):
    """Biases and penalties, as the twin `processed` has them."""
    place = stream * vocab + columns
    count = tl.load(count_ptr + place, mask=columns < vocab, other=0).to(tl.int32)
    logits = logits + tl.load(bias_ptr + place, mask=columns < vocab, other=0.0)
    repetition = _number(number_ptr, stream, 2, NUMBERS)
    presence = _number(number_ptr, stream, 3, NUMBERS)
    frequency = _number(number_ptr, stream, 4, NUMBERS)
    drawn = count & 16383
    punished = tl.where(logits < 0, logits * repetition, tl.div_rn(logits, tl.zeros_like(logits) + repetition))
    logits = tl.where(count > 0, punished, logits)
    logits = logits - drawn.to(tl.float32) * frequency
    return logits - tl.where(drawn > 0, presence, 0.0)


@jit
def _key(logits, base, scale):
    """Base-2 logarithm of unnormalised probabilities, Q24 int64."""
    key = (logits - base) * scale
    most = 2305843009213693952.0
    key = tl.where(key != key, -most, tl.minimum(tl.maximum(key, -most), most))
    return key.to(tl.int64)


@jit
def _below(logits, top, scale):
    """How far a token is below the likeliest one, in [0, LIMIT]."""
    below = -_key(logits, top, scale)
    return tl.minimum(tl.maximum(below, 0), 1073741823)


@jit
def _log2(x):
    """Base-2 logarithm of whole numbers from 1, Q24 int64."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    return (((bits >> 23) - 127) << 24) + (log2_of_one_plus_jit((bits & 8388607) << 9) >> 6)


@jit
def _log2_exponential(words):
    """Base-2 logarithm of exponential random numbers, Q24 int64, of random words below 2^32, int64."""
    small = words < 2147483648
    x = 2 * tl.where(small, words, 4294967295 - words) + 1
    logarithm = _log2(x) - 553648128
    near = logarithm + (log2_ratio_jit(tl.where(small, words, 0)) >> 6)
    far = _log2(-logarithm) - 411524412
    return tl.where(small, near, far)


@jit
def _position(plan_ptr, cursor_ptr, stream, rows, plan_stride, FIELDS: tl.constexpr, TOKEN: tl.constexpr):
    """Index in the stream of the token that the coming step appends."""
    at = (tl.load(cursor_ptr + stream) + 1) % rows
    return -1 - tl.load(plan_ptr + at * plan_stride + stream * FIELDS + TOKEN)


@jit
def _random_words(columns, seed, position):
    """One word of Philox4x32-10 a token, int64: word ``token % 4`` at the count ``(token // 4, position, 0, 0)``."""
    block = columns >> 2
    zero = tl.zeros_like(block)
    a, b, c, d = tl.philox(seed, block, zero + position, zero, zero)
    word = columns & 3
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d))).to(tl.int64)


@jit
def _top(top_ptr, stream, tiles, SIZE: tl.constexpr):
    """The largest processed logit of a stream."""
    column = tl.arange(0, SIZE)
    return tl.max(tl.load(top_ptr + stream * tiles + column, mask=column < tiles, other=-float("inf")), 0)


@jit
def _search_state(
    setting_ptr, number_ptr, sum_ptr, state_ptr, stream, launched, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr,
    LAUNCHES: tl.constexpr, DIGIT: tl.constexpr, SETTINGS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """(key found so far, sum that stays below, largest key of the thresholds before) after `launched` launches.

    A threshold is the largest key of which less than the target lies above, in tokens for top-k and in weight for
    top-p. Launches of a threshold that a stream does not have find nothing.
    """
    k = tl.load(setting_ptr + stream * SETTINGS + 1)
    p = tl.load(number_ptr + stream * NUMBERS + 1)
    before = tl.maximum(launched - 1, 0)
    place = (stream * ROUNDS + before) * 4
    low = tl.load(state_ptr + place)
    target = tl.load(state_ptr + place + 1)
    limit = tl.load(state_ptr + place + 2)
    column = tl.arange(0, PIVOTS)
    sums = tl.load(sum_ptr + (stream * ROUNDS + before) * PIVOTS + column)
    by_weight = (k == 0) | (before >= LAUNCHES)
    first = before % LAUNCHES == 0
    whole = tl.sum(tl.where(column == 0, sums, 0), 0)
    share = tl.maximum((whole.to(tl.float64) * p).to(tl.int64), 1)
    target = tl.where(first & by_weight, share, target)
    shift = 30 - DIGIT * (before % LAUNCHES + 1)
    digit = tl.sum(((column > 0) & (sums < target)).to(tl.int64), 0)
    low = low + (digit << shift.to(tl.int64))
    ended = launched % LAUNCHES == 0
    searched = tl.where(before < LAUNCHES, (k > 0) | (p < 1), (k > 0) & (p < 1))
    limit = tl.where(ended & searched, tl.minimum(limit, low), limit)
    low = tl.where(ended, 0, low)
    start = launched == 0
    return tl.where(start, 0, low), tl.where(start, k, target), tl.where(start, 1073741823, limit)


@jit
def prepare_kernel(
    token_ptr, logit_ptr, number_ptr, setting_ptr, count_ptr, bias_ptr, out_ptr, top_ptr, sum_ptr, vocab, stride,
    TABLES: tl.constexpr, SUMS: tl.constexpr, TILE: tl.constexpr, DRAWN: tl.constexpr, NUMBERS: tl.constexpr,
    SETTINGS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, stream): processed logits (with TABLES), the tile's largest, and sums set to zero."""
    tile, stream = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
    if tl.load(token_ptr + stream) == DRAWN:
        columns = tile * TILE + tl.arange(0, TILE)
        logits = tl.load(logit_ptr + stream * stride + columns, mask=columns < vocab, other=-float("inf"))
        if TABLES:
            logits = _processed(logits, number_ptr, count_ptr, bias_ptr, stream, columns, vocab, NUMBERS)
            logits = tl.where(columns < vocab, logits, -float("inf"))
            tl.store(out_ptr + stream * vocab + columns, logits, mask=columns < vocab)
        if tl.load(setting_ptr + stream * SETTINGS) == 2:
            top, _index = first_largest(logits, columns, vocab - 1)
            tl.store(top_ptr + stream * tl.num_programs(0) + tile, top)
            if SUMS:  # noqa: SIM102  (known when the kernel is compiled)
                if tile == 0:
                    column = tl.arange(0, 512)
                    tl.store(sum_ptr + stream * SUMS + column, tl.zeros([512], tl.int64), mask=column < SUMS)


@jit
def search_kernel(
    token_ptr, logit_ptr, number_ptr, setting_ptr, top_ptr, below_ptr, weight_ptr, sum_ptr, state_ptr, launched, vocab,
    stride, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, LAUNCHES: tl.constexpr, DIGIT: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, DRAWN: tl.constexpr, NUMBERS: tl.constexpr, SETTINGS: tl.constexpr,
    START: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, stream): 5 bits more of the key of a threshold; the sum in place 0 is that of all tokens.

    START: the first launch, which keeps the keys and weights of all tokens for the others.
    """
    tile, stream, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
    launched = tl.full((), launched, tl.int32)  # Triton makes a constant of a 1
    k = tl.load(setting_ptr + stream * SETTINGS + 1)
    p = tl.load(number_ptr + stream * NUMBERS + 1)
    token = tl.load(token_ptr + stream)
    if PDL:
        gdc_wait()
    if token == DRAWN:
        low, target, limit = _search_state(
            setting_ptr, number_ptr, sum_ptr, state_ptr, stream, launched, ROUNDS, PIVOTS, LAUNCHES, DIGIT, SETTINGS,
            NUMBERS,
        )  # fmt: skip
        if tile == 0:
            place = state_ptr + (stream * ROUNDS + launched) * 4
            tl.store(place, low)
            tl.store(place + 1, target)
            tl.store(place + 2, limit)
        second = launched >= LAUNCHES
        if ((k > 0) & (p < 1)) | (((k > 0) | (p < 1)) & (launched < LAUNCHES)):
            columns = tile * TILE + tl.arange(0, TILE)
            inside = columns < vocab
            place = stream * vocab + columns
            if START:
                logits = tl.load(logit_ptr + stream * stride + columns, mask=inside, other=-float("inf"))
                key = _below(logits, _top(top_ptr, stream, tiles, SIZE), _number(number_ptr, stream, 0, NUMBERS))
                weight = (exp2_minus_jit((key & 16777215) << 8) << 10) >> (key >> 24)
                below = key.to(tl.int32)
                tl.store(below_ptr + place, below, mask=inside)
                tl.store(weight_ptr + place, weight, mask=inside)
            else:
                below = tl.load(below_ptr + place, mask=inside, other=1073741823)
                weight = tl.load(weight_ptr + place, mask=inside, other=0)
            amount = tl.where((k == 0) | second, weight, 1)
            amount = tl.where(inside & (below <= limit.to(tl.int32)), amount, 0)
            column = tl.arange(0, PIVOTS)
            shift = 30 - DIGIT * (launched % LAUNCHES + 1)
            pivot = tl.where(column == 0, 1073741824, low.to(tl.int32) + (column << shift))
            sums = tl.sum(tl.where(below[:, None] < pivot[None, :], amount[:, None], 0), 0)
            tl.atomic_add(sum_ptr + (stream * ROUNDS + launched) * PIVOTS + column, sums, sem="relaxed")


@jit
def race_kernel(
    token_ptr, logit_ptr, processed_ptr, number_ptr, setting_ptr, count_ptr, bias_ptr, top_ptr, sum_ptr, state_ptr,
    plan_ptr, cursor_ptr, value_ptr, index_ptr, rows, plan_stride, vocab, stride, THRESHOLDS: tl.constexpr,
    TABLES: tl.constexpr, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, LAUNCHES: tl.constexpr, DIGIT: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, DRAWN: tl.constexpr, NUMBERS: tl.constexpr, SETTINGS: tl.constexpr,
    FIELDS: tl.constexpr, TOKEN: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, stream): the winner of the tile. Streams that are given a token have none."""
    tile, stream, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if EARLY:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
    token = tl.load(token_ptr + stream)
    if token < 0:
        columns = tile * TILE + tl.arange(0, TILE)
        inside = columns < vocab
        place = stream * tiles + tile
        if token == DRAWN:
            if TABLES and THRESHOLDS:
                logits = tl.load(processed_ptr + stream * vocab + columns, mask=inside, other=-float("inf"))
            else:
                logits = tl.load(logit_ptr + stream * stride + columns, mask=inside, other=-float("inf"))
                if TABLES:
                    logits = _processed(logits, number_ptr, count_ptr, bias_ptr, stream, columns, vocab, NUMBERS)
            kind = tl.load(setting_ptr + stream * SETTINGS)
            seed = tl.load(setting_ptr + stream * SETTINGS + 3)
            scale = _number(number_ptr, stream, 0, NUMBERS)
            base = 0.0
            if THRESHOLDS:
                base = tl.where(kind == 2, _top(top_ptr, stream, tiles, SIZE), 0.0)
            key = _key(logits, base, scale)
            position = _position(plan_ptr, cursor_ptr, stream, rows, plan_stride, FIELDS, TOKEN)
            race = (key - _log2_exponential(_random_words(columns, seed, position))).to(tl.float32)
            race = tl.where(logits == -float("inf"), -float("inf"), race)
            if THRESHOLDS:
                limit = tl.load(setting_ptr + stream * SETTINGS + 2)
                if ROUNDS:
                    _low, _target, found = _search_state(
                        setting_ptr, number_ptr, sum_ptr, state_ptr, stream, ROUNDS, ROUNDS, PIVOTS, LAUNCHES, DIGIT,
                        SETTINGS, NUMBERS,
                    )  # fmt: skip
                    limit = tl.minimum(limit, found)
                below = tl.minimum(tl.maximum(-key, 0), 1073741823)
                race = tl.where((below <= limit) | (kind != 2), race, -float("inf"))
            race = tl.where((logits != logits) | (logits == float("inf")), float("inf"), race)
            most = 3.4028234663852886e38
            likely = tl.where(logits != logits, most, tl.minimum(tl.maximum(logits, -most), most))
            values = tl.where(kind == 0, likely, race)
        else:
            values = tl.load(logit_ptr + stream * stride + columns, mask=inside, other=-float("inf"))
        top, index = first_largest(tl.where(inside, values, -float("inf")), columns, vocab - 1)
        tl.store(value_ptr + place, top)
        tl.store(index_ptr + place, index)
