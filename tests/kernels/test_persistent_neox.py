"""`persistent_layers` of GPT-NeoX layers against float64: all layers of a step in one kernel, and its shares."""

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, TOLERANCE, draw, error
from persistent_layers_case import PersistentLayersCase
from ring_case import Case, behind

from sinkstream.kernels.config import PersistentNeoxConfig
from sinkstream.kernels.persistent_neox import NeoxTensors, PersistentNeox

HEADS, DIM, ROTARY, HIDDEN, MIDDLE, EPS = 3, 16, 8, 40, 72, 1e-5
# interpreted, for three multiprocessors: 18 programs; of a GPU's multiprocessors each has room for one of 8 warps
WIDE = PersistentNeoxConfig(per_sm=1 if DEVICE.type == "cuda" else 6)
CONFIGS = [
    pytest.param(
        PersistentNeoxConfig(warps=4, per_sm=4, rows=4, out_rows=2, slots=16, lead=2, early=0), id="small tiles"
    ),
    pytest.param(PersistentNeoxConfig(warps=16, per_sm=2, rows=8, slots=32, lead=1, early=1), id="wide rows"),
    pytest.param(PersistentNeoxConfig(per_sm=3, rows=16, out_rows=16, lead=0, early=2), id="everything early"),
]


class Layers(PersistentLayersCase):
    """Random layers over rings that are filled alike, one new token, and what the step must give."""

    def __init__(self, dtype, count=2, front=0, **ring):
        options = self.RING | ring
        context = HEADS * DIM
        self.layers, self.cases = [], []
        for _ in range(count):
            case = Case(
                dtype, query_heads=HEADS, kv_heads=HEADS, head_dim=DIM, rotary=ROTARY, order="per-head", streams=1,
                **options,
            )  # fmt: skip
            case.keys, case.values = (behind(front, slots) for slots in (case.keys, case.values))
            self.cases.append(case)
            norms = [1 + draw(HIDDEN, scale=0.2, dtype=dtype) for _ in range(2)]
            biases = [draw(n, scale=0.3, dtype=dtype) for n in (HIDDEN, HIDDEN, 3 * context + MIDDLE, HIDDEN)]
            weight_in = draw(3 * context + MIDDLE, HIDDEN, scale=HIDDEN**-0.5, dtype=dtype)
            weight_out = draw(HIDDEN, context + MIDDLE, scale=(context + MIDDLE) ** -0.5, dtype=dtype)
            own = norms[0], biases[0], norms[1], biases[1], weight_in, biases[2], weight_out, biases[3]
            self.layers.append(NeoxTensors(*own, case.keys, case.values))
        self.hidden = draw(1, HIDDEN, dtype=dtype) + 1  # a mean that the norm must take away

    def expected(self):
        """The residual stream and every layer's new key and value, float64."""
        x, written, rows = self.hidden.double(), [], 3 * HEADS * DIM
        for layer, case in zip(self.layers, self.cases):
            t = NeoxTensors(*(tensor.double() for tensor in layer))
            first, second = (
                torch.nn.functional.layer_norm(x, (HIDDEN,), *norm, EPS)
                for norm in ((t.norm, t.norm_bias), (t.mlp_norm, t.mlp_norm_bias))
            )
            case.qkv = first @ t.weight_in[:rows].T + t.bias_in[:rows]
            context, key = case.expected()
            written.append((key, case.parts()[2]))
            middle = torch.nn.functional.gelu(second @ t.weight_in[rows:].T + t.bias_in[rows:])
            x = x + torch.cat([context, middle], 1) @ t.weight_out.T + t.bias_out
        return x, written

    def kernel(self, config=WIDE):
        pinned = self.cases[0].options["pinned_slots"]
        return PersistentNeox(
            self.layers, query_heads=HEADS, pinned_slots=pinned, rotary=ROTARY, eps=EPS, config=config
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "count", "ring"),
    [
        pytest.param(torch.bfloat16, 1, {"front": 6}, id="ring"),
        pytest.param(torch.float16, 2, {"ring": 20, "pinned": 3, "first": 0, "length": 0, "sink_slot": 2}, id="sink"),
        pytest.param(torch.float16, 2, {"pinned": 0, "first": 3, "length": 9}, id="nothing pinned"),
    ],
)
def test_the_residual_stream_and_the_slots_agree_with_float64(implementation, dtype, count, ring):
    torch.manual_seed(0)
    layers = Layers(dtype, count, **ring)
    expected, written = layers.expected()
    kernel = layers.kernel()
    for _ in range(2):  # twice: the counters must be left as they were found
        assert error(layers.run(kernel, implementation), expected) < 2 * TOLERANCE[dtype]  # two layers of rounding
    for case, (key, value) in zip(layers.cases, written):
        assert error(case.keys[:, :, case.slot], key) < 2 * TOLERANCE[dtype]
        assert error(case.values[:, :, case.slot], value) < 2 * TOLERANCE[dtype]
    layers.layers[0].weight_out.neg_()
    assert error(layers.run(kernel, "torch"), expected) > 0.1, "control: other weights say something else"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("config", CONFIGS)
def test_shares_and_tiles_change_no_value(implementation, config):
    torch.manual_seed(1)
    layers = Layers(torch.float16, 1)
    expected, _ = layers.expected()
    assert error(layers.run(layers.kernel(config), implementation), expected) < TOLERANCE[torch.float16]


def test_every_row_and_every_slot_has_a_program():
    torch.manual_seed(2)
    layers = Layers(torch.float16, 1)
    for config in (WIDE, *(c.values[0] for c in CONFIGS)):
        grid = layers.kernel(config).grid
        assert all(r * grid.programs >= n for r, n in zip(grid.rows, (3 * HEADS * DIM, MIDDLE, HIDDEN), strict=True))
        assert grid.ring_programs * grid.slots >= 41 and (grid.splits - grid.ring_programs) * grid.slots >= 4
        assert grid.splits * HEADS <= grid.programs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_out": lambda t: t.T.contiguous().T}, "weight_out of layer 0 has strides"),
        ({"bias_in": lambda t: t.float()}, "bias_in of layer 0 has dtype torch.float32; accepted: torch.float16"),
        ({"values": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)}, "values of layer 0 has strides"),
    ],
)
def test_what_it_refuses(change, says):
    layers = Layers(torch.float16, 1)
    layers.layers[0] = layers.layers[0]._replace(**{k: f(getattr(layers.layers[0], k)) for k, f in change.items()})
    with pytest.raises(ValueError, match=says):
        layers.kernel()
