"""Decode steps that fuse one thing only, so that each fusion has a figure of its own beside the plain step."""

from torch.nn import functional as F

from sinkstream.engine import plain
from sinkstream.engine.fused import FusedDecode
from sinkstream.engine.packing import NeoxLayer, Norm, PackedWeights
from sinkstream.engine.span import StreamSpan
from sinkstream.kernels import norm_linear
from sinkstream.kernels.add_norm import NormTensors, add_norm
from sinkstream.kernels.plans import LAYERS, LaunchPlan


def _tensors(norm: Norm) -> NormTensors:
    return norm.weight, norm.bias


def decode_add_norm(state: StreamSpan, weights: PackedWeights) -> None:
    """One step of a span, as `plain.decode`; every residual addition and the norms after it are one kernel."""
    state.begin_row()
    row = plain.Row(state, weights.rope_factor)
    plain.begin_channels(state, row)
    x, delta = F.embedding(row.token, weights.embedding), None
    for i, layer in enumerate(weights.layers):
        attention, mlp = _tensors(layer.attention_norm), _tensors(layer.mlp_norm)
        if isinstance(layer, NeoxLayer):
            x, first, second = add_norm(x, delta, attention, mlp, eps=layer.attention_norm.eps)
            delta = plain.neox_products(state, row, i, layer, first, second)
        else:
            x, first, _ = add_norm(x, delta, attention, eps=layer.attention_norm.eps)
            x, first, _ = add_norm(x, plain.llama_attention(state, row, i, layer, first), mlp, eps=layer.mlp_norm.eps)
            delta = plain.llama_mlp(layer, first)
    _, last, _ = add_norm(x, delta, _tensors(weights.final_norm), eps=weights.final_norm.eps)
    state.logits.copy_(F.linear(last, weights.head))
    state.end_row()


class OpsDecode(FusedDecode):
    """The fused step with a launch for every op of every layer, whatever its plan says of a persistent kernel."""

    def use(self, plan: LaunchPlan) -> None:
        super().use({op: launch for op, launch in plan.items() if op != LAYERS})


class LinearDecode(OpsDecode):
    """The fused step with PyTorch's attention: projections and MLP are kernels, with their norms and residuals."""

    def _note_token(self) -> None:
        plain.begin_channels(self.state, self._row)

    def _accumulate(self) -> None:
        """Nothing is left to add up: `plain.attend` has observed the attention of the step."""

    def _how(self, op: str, *, early: bool = True) -> dict:
        """As in the fused step; the op after PyTorch's attention may not start early, see there."""
        return super()._how(op, early=early and op not in ("out", "o"))

    def _attention_up(self, i: int) -> None:
        layer, spec, up = self.weights.layers[i], self.spec, slice(self.qkv_rows, None)
        assert isinstance(layer, NeoxLayer), "an op of GPT-NeoX layers"
        heads = self.first.view(len(self.first), spec.query_heads, 3, spec.head_dim).unbind(2)
        self.context.copy_(plain.attend(self.state, self._row, i, *heads))
        norm = layer.mlp_norm
        norm_linear(
            self.hidden, layer.weight_in[up], norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            bias=layer.bias_in[up], activation="gelu", out=self.middle,
        )  # fmt: skip

    def _attention(self, i: int) -> None:
        layer, spec = self.weights.layers[i], self.spec
        assert not isinstance(layer, NeoxLayer), "an op of Llama-like layers"
        query, key, value = plain.llama_heads(spec, layer, self.first)
        self.context.copy_(plain.attend(self.state, self._row, i, query, key, value))
