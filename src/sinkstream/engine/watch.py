"""Checks once per call that the model is unchanged since the engine was made, and takes changed weights at a reset.

The decode step reads the memory that the weights had when the engine was made. A weight that is replaced
(``load_state_dict(assign=True)``, ``parameter.data = …``) lies elsewhere; one that is written in place is read by the
step, but the keys and values of the streams, and sums that packing has made, are of the old one. Not seen: a write in
place through ``parameter.data``, which changes neither address nor version; steps and prompts read the new values then.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinkstream.cache.stream_file import fingerprint
from sinkstream.cache.wrappers import is_adapter
from sinkstream.engine.checked_cache import CheckedCache
from sinkstream.engine.modules import GLOBAL_HOOKS, Part, parts
from sinkstream.engine.packing import PackedWeights, check_packable, sum_biases
from sinkstream.engine.state import StreamState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _state(module: nn.Module) -> tuple:
    """What may be added to a module: a forward of its own, hooks, and what an adapter has merged."""
    own: Any = vars(module)
    found = own.get("forward"), tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"]), type(module).forward
    if isinstance(module, nn.Embedding):
        return *found, module.max_norm
    if not is_adapter(module):
        return found
    adapter: Any = module
    names = ("merged_adapters", "active_adapters", "disable_adapters")
    return *found, *(str(getattr(adapter, name, None)) for name in names)


class _Weight:
    """One parameter as it was when the engine was made.

    Attributes
    ----------
    home : Tensor
        The memory that the decode step reads.
    """

    def __init__(self, part: Part, name: str):
        self.path = f"{part.path}.{name}"
        self._held = part.module._parameters
        self._name = name
        self.parameter: nn.Parameter = self._held[name]  # type: ignore[assignment]
        self.home = self.parameter.detach()
        self._address = self.parameter.data_ptr()
        self._version = None if self.parameter.is_inference() else self.parameter._version

    def same(self) -> bool:
        """Whether it is this parameter still, where it lay, and not written since."""
        now = self._held.get(self._name)
        if now is not self.parameter or now.data_ptr() != self._address:
            return False
        return self._version is None or now._version == self._version


class ModelWatch:
    """Notices what has changed in a model since the latest `renew`.

    Parameters
    ----------
    model : PreTrainedModel
        Its weights are packed.
    weights : PackedWeights
    """

    def __init__(self, model: PreTrainedModel, weights: PackedWeights):
        self._model, self._packed = model, weights
        self._record()

    def _record(self) -> None:
        found = list(parts(self._model))
        self._places = [(p.siblings, p.name, p.module) for p in found]
        self._states = [_state(p.module) for p in found]
        self._classes = {type(p.module): type(p.module).forward for p in found}
        marked = [any(state[:3]) or len(state) > 4 for state in self._states]  # the others are asked less
        self._quiet = [(*place, vars(place[2])) for place, more in zip(self._places, marked) if not more]
        self._marked = [(*place, state) for place, state, more in zip(self._places, self._states, marked) if more]
        held = [p for p in found if not is_adapter(p.module)]
        self._weights = [_Weight(p, name) for p in held for name, w in p.module._parameters.items() if w is not None]
        drops = [m.p for _, _, m in self._places if isinstance(m, nn.Dropout)]
        self._drops = any([*drops, getattr(self._model.config, "attention_dropout", 0.0)])

    def _same_modules(self) -> bool:
        if any(GLOBAL_HOOKS):
            return False
        if any(kind.forward is not forward for kind, forward in self._classes.items()):
            return False
        for siblings, name, module, own in self._quiet:
            if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if siblings is not None and siblings.get(name) is not module:
                return False
        for siblings, name, module, state in self._marked:
            if (siblings is not None and siblings.get(name) is not module) or _state(module) != state:
                return False
        return True

    def check(self) -> str | None:
        """Refuse a model that the engine does not serve any more; the path of a weight that has changed, if any has.

        Raises
        ------
        ValueError
            Naming the module that was changed and the way out.
        """
        if self._drops and self._model.training:
            raise ValueError("the model is in training mode and has dropout; call model.eval() before using the engine")
        modules_same = self._same_modules()
        changed = next((w.path for w in self._weights if not w.same()), None)
        if modules_same and changed is None:
            return None
        check_packable(self._model)
        if not modules_same and changed is None:
            changed = self._moved()
            if changed is None:
                self._record()
        return changed

    def _moved(self) -> str | None:
        """The path of a module that holds other weights, or merged others, than it did; None if none does."""
        adapters = {id(m): s for (_, _, m), s in zip(self._places, self._states) if is_adapter(m)}
        before = {w.path: w.parameter for w in self._weights}
        for part in parts(self._model):
            if is_adapter(part.module):
                if adapters.get(id(part.module), ())[4:] != _state(part.module)[4:]:
                    return part.path
                continue
            for name, parameter in part.module._parameters.items():
                if parameter is not None and before.get(f"{part.path}.{name}") is not parameter:
                    return f"{part.path}.{name}"
        return None

    @torch.no_grad()
    def renew(self) -> None:
        """Take the model's present weights, in the memory that the decode step reads.

        Raises
        ------
        ValueError
            If the engine does not serve the model any more, or a weight has another shape, dtype or device.
        """
        check_packable(self._model)
        homes = {w.path: w.home for w in self._weights}
        found = {
            f"{part.path}.{name}": parameter
            for part in parts(self._model)
            if not is_adapter(part.module)
            for name, parameter in part.module._parameters.items()
            if parameter is not None
        }
        self._check_fit(homes, found)
        with torch.inference_mode(False):
            for path, parameter in found.items():
                home = homes[path]
                if parameter.data_ptr() != home.data_ptr():
                    home.copy_(parameter)
                    parameter.data = home
                    if not parameter.is_inference():
                        parameter.detach().narrow(0, 0, 0).zero_()  # counts as a write, so that other engines see it
            sum_biases(self._model, self._packed)
        self._record()

    def _check_fit(self, homes: dict[str, torch.Tensor], found: dict[str, nn.Parameter]) -> None:
        odd = sorted(homes.keys() ^ found.keys())
        for path, now in found.items():
            home = homes.get(path)
            if home is not None and (home.shape, home.dtype, home.device) != (now.shape, now.dtype, now.device):
                odd.append(path)
        shared: dict[int, nn.Parameter] = {}
        for path, now in found.items():
            if path in homes:
                other = shared.setdefault(homes[path].data_ptr(), now)
                if other.data_ptr() != now.data_ptr() and not (other.shape == now.shape and torch.equal(other, now)):
                    odd.append(path)  # tied when the engine was made, and not any more
        if odd:
            raise ValueError(
                f"{odd[0]} does not fit the memory that the engine reads (another shape, dtype or device, added, taken"
                " away, or no longer tied); make the engine again"
            )


class WatchedModel:
    """What an engine asks of its model at every call but `step`.

    Attributes
    ----------
    model : PreTrainedModel
    state : StreamState
    """

    model: PreTrainedModel
    state: StreamState
    _watch: ModelWatch
    _cache: CheckedCache

    def check_model(self) -> None:
        """Refuse a model that was changed after the engine was made; once a call, and never in a decode step.

        Weights that were replaced or written are taken anew while no stream holds a token.

        Raises
        ------
        ValueError
            Naming what was changed and the way out; the streams are as they were.
        """
        changed = self._watch.check()
        if changed is not None and any(counters.seen for counters in self.state.counters):
            raise ValueError(
                f"the model's weights were changed after the engine was made ({changed}), and the streams hold keys and"
                " values of the old ones; engine.reset() forgets all streams and takes the new weights"
            )
        if changed is not None:
            self._renew()

    def renew_model(self) -> None:
        """Take the model's weights anew if they have changed; all streams must be forgotten with it.

        Raises
        ------
        ValueError
            If the engine does not serve the model any more, or a weight has another shape, dtype or device.
        """
        if self._watch.check() is not None:
            self._renew()

    def _renew(self) -> None:
        self._watch.renew()
        self._cache.checked_weights = None
        vars(self).pop("model_hash", None)

    @cached_property
    def model_hash(self) -> str:
        """Hash of the model's shape, dtype and weights."""
        return fingerprint(self.model)
