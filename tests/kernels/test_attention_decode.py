"""`attention_decode` against float64, token by token from unrotated keys: two frames, wrapped rings, query groups."""

import pytest
import torch
from ops_cases import DEVICE, HALF, IMPLEMENTATIONS, NEEDS_TRITON, TOLERANCE, draw, error, on_implementations

from sinkstream.kernels import AttentionConfig, Workspace, attention_decode

NAN = float("nan")


def rotate(x, position, inv_freq):
    """Rotate float64 vectors (..., head_dim) to a position."""
    angle = position * inv_freq
    half = len(inv_freq)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


class Case:
    """A ring in which `visible` tokens are seen, the newest of which is being appended.

    Invisible slots hold NaN. `window_at` is the position that the oldest window token was rotated to.
    """

    def __init__(
        self, dtype, *, query_heads, kv_heads, head_dim, rotary, pinned_slots, ring, pinned, first, length, order,
        norms=False, streams=2, sink_slot=None, window_at=40,
    ):  # fmt: skip
        self.options = dict(query_heads=query_heads, pinned_slots=pinned_slots, order=order)
        self.inv_freq = 1e4 ** (-torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2))
        slots = pinned_slots + ring
        self.keys = torch.full((streams, kv_heads, slots, head_dim), NAN, dtype=dtype, device=DEVICE)
        self.values = self.keys.clone()
        self.qkv = draw(streams, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype)
        if norms:
            self.options["q_norm"], self.options["k_norm"] = (1 + draw(head_dim, scale=0.2, dtype=dtype) for _ in "qk")
        frame_at = pinned + length - 1
        slot = pinned_slots + (first + length - 1) % ring if sink_slot is None else sink_slot
        at = window_at + length - 1 if sink_slot is None else sink_slot
        frame_at = frame_at if sink_slot is None else sink_slot
        row = [slot, at, frame_at, pinned, first, length, 0, 0]
        self.scalars = torch.tensor([row] * streams, dtype=torch.int32, device=DEVICE)
        angle = torch.tensor([at, frame_at], device=DEVICE).double()[:, None] * self.inv_freq
        self.rope = torch.stack([angle.cos(), angle.sin()], 1).float().expand(streams, -1, -1, -1).contiguous()
        self.slot, self.seen = slot, []
        for i in range(pinned if sink_slot is None else sink_slot):
            self._fill(i, i, frame_at)
        for i in range(length - 1 if sink_slot is None else 0):
            self._fill(pinned_slots + (first + i) % ring, window_at + i, at)

    def _fill(self, slot, position, query_at):
        key = draw(*self.keys.shape[:2], self.keys.shape[3]).double()
        self.keys[:, :, slot] = rotate(key, position, self.inv_freq).to(self.keys.dtype)
        self.values[:, :, slot] = draw(*self.keys.shape[:2], self.keys.shape[3], dtype=self.keys.dtype)
        self.seen.append((slot, query_at))

    def parts(self):
        heads, (streams, kv_heads, _, dim) = self.options["query_heads"], self.keys.shape
        qkv = self.qkv.double()
        if self.options["order"] == "per-head":
            q, k, v = qkv.view(streams, heads, 3, dim).unbind(2)
        else:
            q, k, v = qkv.view(streams, -1, dim).split((heads, kv_heads, kv_heads), 1)
        if "q_norm" in self.options:
            q, k = (
                torch.nn.functional.rms_norm(x, (dim,), self.options[name].double(), 1e-6)
                for x, name in ((q, "q_norm"), (k, "k_norm"))
            )
        return q, k, v

    def expected(self):
        """Output and the key that must have been written, float64."""
        q, k, v = self.parts()
        groups = q.shape[1] // k.shape[1]
        at = int(self.scalars[0, 1])
        keys = torch.stack([rotate(q, p, self.inv_freq) for _, p in self.seen] + [q], 2)
        held = [self.keys[:, :, s].double().repeat_interleave(groups, 1) for s, _ in self.seen]
        held.append(k.repeat_interleave(groups, 1))
        scores = (keys * torch.stack(held, 2)).sum(-1) * q.shape[-1] ** -0.5
        values = [self.values[:, :, s].double().repeat_interleave(groups, 1) for s, _ in self.seen]
        values.append(v.repeat_interleave(groups, 1))
        out = torch.einsum("bht,bhtd->bhd", scores.softmax(-1), torch.stack(values, 2))
        return out.flatten(1), rotate(k, at, self.inv_freq)

    def run(self, implementation, **config):
        streams, kv_heads, _, dim = self.keys.shape
        workspace = Workspace(streams, self.options["query_heads"], kv_heads, dim, DEVICE)
        out = torch.full((streams, self.options["query_heads"] * dim), NAN, dtype=self.keys.dtype, device=DEVICE)
        arguments = self.qkv, self.keys, self.values, self.scalars, self.rope
        attention_decode(
            *arguments,
            **self.options,
            out=out,
            workspace=workspace,
            config=AttentionConfig(**config),
            implementation=implementation,
        )
        assert not workspace.counters.any(), "the counters are not back at zero"
        return out


NEOX = dict(query_heads=2, kv_heads=2, order="per-head")
LLAMA = dict(query_heads=6, kv_heads=2, order="blocks")
RINGS = [  # pinned_slots, ring, pinned, first, length
    (20, 24, 4, 3, 7),
    (0, 17, 0, 5, 1),
    (4, 33, 4, 20, 33),
    (4, 33, 4, 0, 33),
    (4, 70, 4, 61, 30),
    (40, 9, 40, 8, 9),
]
HEADS = [(64, 16), (96, 96), (64, 64), (128, 32), (256, 64)]  # head_dim, rotary


def ring(values):
    return dict(zip(("pinned_slots", "ring", "pinned", "first", "length"), values))


@pytest.mark.parametrize(("values", "implementation"), on_implementations(RINGS, quick=3))
@pytest.mark.parametrize("family", ["neox", "neox-dot", "llama"])
def test_rings(values, family, implementation):
    heads = LLAMA if family == "llama" else NEOX
    case = Case(torch.float16, **heads, head_dim=80, rotary=20, **ring(values))
    expected, key = case.expected()
    out = case.run(implementation, splits=2, tile=16, dot=family != "neox")
    assert error(out, expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[torch.float16]
    assert torch.equal(case.values[:, :, case.slot].double(), case.parts()[2])


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(HEADS, quick=2))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norms", [False, True])
def test_head_sizes(sizes, dtype, norms, implementation):
    head_dim, rotary = sizes
    case = Case(dtype, **LLAMA, head_dim=head_dim, rotary=rotary, norms=norms, **ring((4, 30, 4, 11, 30)))
    expected, key = case.expected()
    out = case.run(implementation, splits=1, tile=16, columns=64)
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("config", "implementation"),
    on_implementations([{"splits": 3, "tile": 16, "stages": 2}, {"splits": 1, "tile": 16}, {"splits": 20}], quick=1),
)
def test_every_way_to_cut_it(config, implementation):
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=64, **ring((4, 150, 4, 77, 140)))
    expected, _ = case.expected()
    assert error(case.run(implementation, **config), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_is_itself_a_sink(implementation):
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=16, **ring((4, 20, 3, 0, 0)), sink_slot=2)
    expected, key = case.expected()
    assert error(case.run(implementation, splits=2, tile=16), expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, 2], key) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_frames_matter(implementation):
    """The control: with one frame for everything, as if nothing had been evicted, the result is another one."""
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    expected, _ = case.expected()
    case.rope[:, 1] = case.rope[:, 0]
    assert error(case.run(implementation, splits=2, tile=16), expected) > 5 * TOLERANCE[torch.float16]


def test_mistakes_are_named():
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    arguments = case.qkv, case.keys, case.values, case.scalars, case.rope
    for change, says in [
        ({"order": "per-head"}, "order='per-head'"),
        ({"order": "x"}, "order='x'"),
        ({"query_heads": 5}, "query_heads=5"),
        ({"pinned_slots": 24}, "pinned_slots=24"),
        ({"q_norm": torch.ones(64)}, "accepted: both or neither"),
    ]:
        with pytest.raises(ValueError, match=says):
            attention_decode(*arguments, **(case.options | change))
    with pytest.raises(ValueError, match="scalars has dtype"):
        attention_decode(*arguments[:3], case.scalars.long(), case.rope, **case.options)


@NEEDS_TRITON
@pytest.mark.parametrize("heads", [NEOX, LLAMA])
def test_the_default_configuration(heads):
    case = Case(torch.float16, **heads, head_dim=80, rotary=20, streams=1, **ring((4, 30, 4, 7, 28)))
    expected, _ = case.expected()
    arguments = case.qkv, case.keys, case.values, case.scalars, case.rope
    assert (
        error(attention_decode(*arguments, **case.options, implementation="triton"), expected)
        < TOLERANCE[torch.float16]
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_queries_are_combined_in_turns(implementation):
    case = Case(torch.float16, query_heads=12, kv_heads=2, order="blocks", head_dim=128, rotary=32, streams=1,
                **ring((4, 128, 4, 7, 120)))  # fmt: skip
    expected, _ = case.expected()
    assert error(case.run(implementation, splits=16, tile=16, columns=64), expected) < TOLERANCE[torch.float16]
