"""A filled ring and one new token, with what attention over it must give: cases of the attention kernels."""

import torch
from ops_cases import DEVICE, draw

from sinkstream.kernels import AttentionConfig, Workspace, attention_decode
from sinkstream.kernels.observed import NOT_OBSERVED

NAN = float("nan")


def rotate(x, position, inv_freq):
    """Rotate float64 vectors (..., head_dim) to a position."""
    angle = position * inv_freq
    half = len(inv_freq)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def behind(front, slots):
    """The same slots, the last of a buffer that has others in front of them, which hold NaN."""
    others = torch.full((*slots.shape[:2], front, slots.shape[3]), NAN, dtype=slots.dtype, device=DEVICE)
    return torch.cat([others, slots], 2)[:, :, front:]


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

    def weights(self):
        """What every query gives to every slot, ``(streams, query_heads, slots)`` float64, and the rotated queries."""
        q, k, _ = self.parts()
        groups, at = q.shape[1] // k.shape[1], int(self.scalars[0, 1])
        seen = [(s, p, self.keys[:, :, s].double()) for s, p in self.seen]
        seen.append((self.slot, at, rotate(k, at, self.inv_freq)))
        scores = torch.stack(
            [(rotate(q, p, self.inv_freq) * key.repeat_interleave(groups, 1)).sum(-1) for _, p, key in seen], -1
        )
        weights = torch.zeros(*scores.shape[:2], self.keys.shape[2], dtype=torch.float64, device=DEVICE)
        weights[..., [s for s, _, _ in seen]] = (scores * q.shape[-1] ** -0.5).softmax(-1)
        return weights, rotate(q, at, self.inv_freq)

    def run(self, implementation, observed=NOT_OBSERVED, **config):
        streams, kv_heads, _, dim = self.keys.shape
        workspace = Workspace(streams, self.options["query_heads"], kv_heads, dim, DEVICE)
        out = torch.full((streams, self.options["query_heads"] * dim), NAN, dtype=self.keys.dtype, device=DEVICE)
        arguments = self.qkv, self.keys, self.values, self.scalars, self.rope
        attention_decode(
            *arguments,
            **self.options,
            out=out,
            observed=observed,
            workspace=workspace,
            config=AttentionConfig(**config),
            implementation=implementation,
        )
        assert not workspace.counters.any(), "the counters are not back at zero"
        return out
