"""`persistent_layers` of Llama-like layers against float64: all layers of a step in one kernel."""

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, TOLERANCE, draw, error
from persistent_layers_case import PersistentLayersCase
from ring_case import Case, behind

from sinkstream.kernels.config import PersistentConfig
from sinkstream.kernels.persistent_llama import LlamaTensors, PersistentLlama

HEADS, KV_HEADS, DIM, HIDDEN, MIDDLE, EPS = 4, 2, 16, 40, 72, 1e-5
SMALL = PersistentConfig(slots=32) if DEVICE.type == "cuda" else PersistentConfig(warps=16, per_sm=4, slots=32)  # 3 SMs


class Layers(PersistentLayersCase):
    """Random layers over rings that are filled alike, one new token, and what the step must give."""

    def __init__(self, dtype, count=2, front=0, **ring):
        options = self.RING | ring
        rows = (HEADS + 2 * KV_HEADS) * DIM
        self.layers, self.cases = [], []
        for _ in range(count):
            case = Case(
                dtype, query_heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, rotary=DIM, order="blocks", streams=1,
                **options,
            )  # fmt: skip
            case.keys, case.values = (behind(front, slots) for slots in (case.keys, case.values))
            self.cases.append(case)
            weights = ((rows, HIDDEN), (HIDDEN, HEADS * DIM), (2 * MIDDLE, HIDDEN), (HIDDEN, MIDDLE))
            qkv, o, gate_up, down = (draw(*shape, scale=shape[1] ** -0.5, dtype=dtype) for shape in weights)
            norm, mlp_norm = (1 + draw(HIDDEN, scale=0.2, dtype=dtype) for _ in range(2))
            self.layers.append(LlamaTensors(norm, qkv, o, mlp_norm, gate_up, down, case.keys, case.values))
        self.hidden = draw(1, HIDDEN, dtype=dtype)

    def expected(self):
        """The residual stream and every layer's new key and value, float64."""
        x, written = self.hidden.double(), []
        for layer, case in zip(self.layers, self.cases):
            case.qkv = torch.nn.functional.rms_norm(x, (HIDDEN,), layer.norm.double(), EPS) @ layer.qkv.double().T
            context, key = case.expected()
            written.append((key, case.parts()[2]))
            x = x + context @ layer.o.double().T
            gate, up = (
                torch.nn.functional.rms_norm(x, (HIDDEN,), layer.mlp_norm.double(), EPS) @ layer.gate_up.double().T
            ).chunk(2, 1)
            x = x + (torch.nn.functional.silu(gate) * up) @ layer.down.double().T
        return x, written

    def kernel(self, config=SMALL):
        pinned = self.cases[0].options["pinned_slots"]
        return PersistentLlama(self.layers, query_heads=HEADS, pinned_slots=pinned, rotary=DIM, eps=EPS, config=config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "count", "ring"),
    [
        pytest.param(torch.bfloat16, 1, {"front": 6}, id="ring"),
        pytest.param(torch.float16, 2, {"ring": 20, "pinned": 3, "first": 0, "length": 0, "sink_slot": 2}, id="sink"),
    ],
)
def test_the_residual_stream_and_the_slots_agree_with_float64(implementation, dtype, count, ring):
    torch.manual_seed(0)
    layers = Layers(dtype, count, **ring)
    expected, written = layers.expected()
    kernel = layers.kernel()
    for _ in range(count):  # twice for two layers: the counters must be left as they were found
        assert error(layers.run(kernel, implementation), expected) < 2 * TOLERANCE[dtype]  # two layers of rounding
    for case, (key, value) in zip(layers.cases, written):
        assert error(case.keys[:, :, case.slot], key) < TOLERANCE[dtype]
        assert error(case.values[:, :, case.slot], value) < TOLERANCE[dtype]
    layers.layers[0].o.neg_()
    assert error(layers.run(kernel, "torch"), expected) > 0.1, "control: other weights say something else"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_shape_without_room_for_its_programs_is_refused_by_the_kernel_and_not_by_the_twin(
    implementation, monkeypatch
):
    torch.manual_seed(0)
    monkeypatch.setattr("sinkstream.kernels.persistent_llama.multiprocessors", lambda device: 1)
    layers = Layers(torch.float16, 1)
    if implementation == "torch" and DEVICE.type == "cpu":
        expected, _ = layers.expected()
        assert error(layers.run(layers.kernel(), implementation), expected) < TOLERANCE[torch.float16]
    else:
        with pytest.raises(ValueError, match="layers of 40 and 72 values with 4 heads over 45 slots; accepted by the"):
            layers.run(layers.kernel(), implementation)
