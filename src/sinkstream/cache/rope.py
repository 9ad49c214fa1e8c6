"""Rotary positions: exact angles in float64, rotation and its inverse in float32."""

import numpy as np
import torch

AHEAD = 256  # positions whose rotations are computed before they are asked for


class Rope:
    """The rotation of one model, with its own copy of the frequencies.

    Pairs are (i, i + rotary_dim / 2), as in GPT-NeoX and every Llama-like model of transformers. Dimensions past
    ``rotary_dim`` are left alone (partial rotary). No attention scaling is applied: keys arrive with it already.

    Parameters
    ----------
    inv_freq : Tensor, (rotary_dim / 2,) or (layers, 1, 1, 1, rotary_dim / 2)
        Frequencies of the model's rotary module, radians per position. Where layers differ, each has its own; angles
        then have the axes of buffers ``(layers, batch, kv_heads, slots, rotary_dim / 2)``.
    """

    def __init__(self, inv_freq: torch.Tensor):
        self.inv_freq = inv_freq.detach().to("cpu", torch.float64)
        self.rotary_dim = 2 * self.inv_freq.shape[-1]
        self._host_freq = self.inv_freq.numpy()
        self._on: dict[torch.device, torch.Tensor] = {}
        self._blocks: dict[torch.device, tuple[int, int, torch.Tensor]] = {}  # first position, how many, phases
        rows = [] if self.inv_freq.ndim == 1 else [tuple(row.flatten().tolist()) for row in self.inv_freq]
        of_frequencies = {row: Rope(torch.tensor(row, dtype=torch.float64)) for row in rows}
        self._layers = [of_frequencies[row] for row in rows]
        self.kinds = list(of_frequencies.values()) or [self]  # the rotations that layers have, each once

    def layer(self, row: int) -> "Rope":
        """The rotation of one layer, given by its row in the stacked buffers."""
        return self._layers[row] if self._layers else self

    def of_layer(self, row: int, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is one layer's of cosines and sines of all layers."""
        return (angles[0][row], angles[1][row]) if self._layers else angles

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every angle.

        Parameters
        ----------
        positions : Tensor, (...,), any integer or float dtype
            May be negative. Angles are computed in float64 on the device of `positions`.

        Returns
        -------
        cos, sin : Tensor, (..., rotary_dim / 2), float32
            Of each layer where layers differ: then positions are ``(slots,)`` or have the axes of buffers.
        """
        angle = positions.to(torch.float64)[..., None] * self.frequencies(positions.device)
        return angle.cos().float(), angle.sin().float()

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """``(rotary_dim / 2,)``, float64, radians per position, on a device; of each layer where layers differ."""
        if device not in self._on:
            self._on[device] = self.inv_freq.to(device)
        return self._on[device]

    def phases_from(self, first: int, count: int, device: torch.device) -> torch.Tensor:
        """Rotations of `count` positions in a row, not to be written to.

        They are computed on the host, for `AHEAD` further positions too: a strict policy asks for the next one at every
        token, and a copy to the device would make the host wait for it.

        Returns
        -------
        Tensor, (count, rotary_dim / 2), complex64, on `device`
            Of each layer where layers differ.
        """
        start, size, block = self._blocks.get(device, (0, 0, None))
        if block is None or not start <= first <= first + count <= start + size:
            start, size = first, count + AHEAD
            angle = np.arange(start, start + size, dtype=np.float64)[:, None] * self._host_freq
            block = torch.from_numpy(np.exp(1j * angle).astype(np.complex64)).to(device)
            self._blocks[device] = (start, size, block)
        return block.narrow(-2, first - start, count)

    def phases(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations of any positions: complex64, ``(..., rotary_dim / 2)``; see `angles`."""
        return torch.complex(*self.angles(positions))

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """The rotary pairs of float32 vectors ``(..., head_dim)`` as complex64 ``(..., rotary_dim / 2)``."""
        half = self.rotary_dim // 2
        return torch.complex(x[..., :half], x[..., half : self.rotary_dim])

    def write_rotated(self, out: torch.Tensor, pairs: torch.Tensor, phases: torch.Tensor) -> None:
        """Rotate `pairs` by `phases` and write them over the rotary dimensions of `out`, in its dtype; few kernels."""
        halves = out.narrow(-1, 0, self.rotary_dim).unflatten(-1, (2, self.rotary_dim // 2))
        halves.copy_(torch.view_as_real(pairs * phases).transpose(-1, -2))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate forward by the given angles.

        Parameters
        ----------
        x : Tensor, (..., head_dim)
            Any float dtype; the work is done in float32.
        cos, sin : Tensor, broadcastable to (..., rotary_dim / 2)

        Returns
        -------
        Tensor, (..., head_dim), float32
        """
        half, x = self.rotary_dim // 2, x.float()
        a, b = x[..., :half], x[..., half : self.rotary_dim]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., self.rotary_dim :]], dim=-1)

    def unrotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate back by the given angles. Axes as in `rotate`."""
        return self.rotate(x, cos, -sin)
