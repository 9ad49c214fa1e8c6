"""A cache in a file, and copies of a cache: `save`, `load` and `fork`.

A fork holds the same stream so far. Its buffers are those of the cache that it was made of until one of the two takes
new tokens; then that one copies them. So a system prompt is fed once and held once, however many conversations begin
with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from sinkstream.cache.batched import BatchedCache
from sinkstream.cache.hooks import attach
from sinkstream.cache.layers import StreamingLayer
from sinkstream.cache.recall_file import recall_options
from sinkstream.cache.rows import Rows
from sinkstream.cache.saving import fill_stream, stream_record
from sinkstream.cache.stream import Stream
from sinkstream.cache.stream_file import check_fits, fingerprint, identity, read_stream, saved_policy, write_stream
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.eviction import option_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY_OPTIONS = ("policy", "cap", "cap_accounting")  # beside those of `option_names`


class CopiedCache(BatchedCache):
    """A cache that can be written to a file, read from one, and forked.

    Attributes
    ----------
    stream : Stream
    policy : EvictionPolicy
    """

    policy: EvictionPolicy
    stream: Stream
    shows_queries = True  # whether the model's attention shows recall its queries
    _pending: Any = None  # a forward that has begun

    def __init__(self, stream: Stream | None = None, *args: Any, **options: Any):
        if args or options or not isinstance(stream, Stream):
            name = type(self).__name__
            raise TypeError(
                f"{name}(…) makes no cache; accepted: {name}.for_model(model, …), or {name}.load(model, path)"
            )
        super().__init__(layers=[StreamingLayer(self, i) for i in range(stream.spec.layers)])
        self.spec, self.policy, self.stream = stream.spec, stream.policy, stream
        self.chunk_user = stream.user
        self._close: Callable[[], object] = lambda: None

    @classmethod
    @abstractmethod
    def for_model(cls, model: PreTrainedModel, **options: Any) -> Self:
        """Make a cache for one model; see `StreamingCache.for_model`."""

    def attach_to(self, model: PreTrainedModel) -> None:
        """Put the hooks on the model that the cache is for."""
        recall = self.stream.recall
        asked = self.shows_queries and recall is not None and recall.queries is not None
        observed = asked or bool({"attention", "accumulated"} & self.policy.needs)
        in_blocks = self.stream.block_tokens > 0 and self.spec.attention == "sdpa" and self.spec.observable
        self._close = attach(self, model, attention=observed or in_blocks or self.compiled)

    def save(self, path: str | Path) -> None:
        """Write the stream to a safetensors file, for `load` or the engine's ``restore``.

        Parameters
        ----------
        path : str or Path
            An existing file is replaced, in one piece.

        Raises
        ------
        ValueError
            If the cache is closed, or the file of its archive is damaged.
        WriteError
            If the file cannot be written; an older one stays as it was.
        """
        model = self._attached_model("saved")
        if isinstance(self.stream, Rows):
            raise ValueError(
                "rows that differ are not written to one file; accepted: for each row, cache.fork(),"
                " batch_select_indices(torch.tensor([row])) and save(path)"
            )
        write_stream(path, stream_record(self.stream, identity(self.spec, fingerprint(model))))

    @classmethod
    def load(
        cls,
        model: PreTrainedModel,
        path: str | Path,
        *,
        positions: str | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Self:
        """Make a cache that goes on where a saved one, or a stream of an engine, was.

        Parameters
        ----------
        model : PreTrainedModel
            With the weights and the dtype that the stream was made with.
        path : str or Path
            A file of `save`, or of the engine's ``snapshot``.
        positions : {"cache", "original"} or None
            None: those of the file.
        device : str, torch.device or None
            Where the buffers lie; None: the device of the model.
        **options
            Those of `for_model`. Without any option of the policy, the policy of the file; without ``recall``, the
            recall of the file, whose chooser must then be one of this package. The archive is in the file; where it
            goes (``recall_bytes``, ``recall_file``, ``recall_file_bytes``) is said anew.

        Raises
        ------
        ValueError
            If the file is of another model, policy, kind of positions or format, or is truncated or damaged; and as
            `for_model`.
        """
        saved = read_stream(path)
        options = recall_options(saved, path, options)
        if not (option_names() | set(POLICY_OPTIONS)) & options.keys():
            options["policy"] = saved_policy(saved, path)
        cache = cls.for_model(model, positions=positions or saved.positions, **options)
        try:
            attached = cache._attached_model("loaded")
            device = torch.device(attached.device if device is None else device)
            if device.type == "meta":
                raise ValueError("the model's weights lie on no device (meta); give device=DEVICE, that of the tokens")
            mine = identity(cache.spec, fingerprint(attached))
            recall = None if cache.stream.recall is None else cache.stream.recall.settings
            positions = cache.stream.positions
            check_fits(saved, path, model=mine, policy=cache.policy, positions=positions, recall=recall)
            fill_stream(cache.stream, saved, path, device)
        except BaseException:
            cache.close()
            raise
        return cache

    def close(self) -> None:
        """Take the hooks off the model. Happens by itself when the cache is collected."""
        self._close()
        self.model = None

    def fork(self) -> Self:
        """Another cache on the same model with the same stream so far; the two go on independently.

        The buffers are shared until one of the two takes new tokens: `stats` counts them in ``shared_bytes``. Where the
        archive of recall has a file, the fork has one of the same size, with a copy of what is in it and the same name
        with ``.fork1``, ``.fork2`` … behind it, which is deleted with the fork's stream.

        Raises
        ------
        ValueError
            If the cache is closed, or the file of its archive is damaged.
        WriteError
            If the fork's file cannot be made.
        """
        model = self._attached_model("forked")
        other = type(self)(self.stream.fork(share=self._pending is None))
        other.compiled = self.compiled
        other.attach_to(model)
        return other

    def __copy__(self) -> Self:
        """As `fork`."""
        return self.fork()

    def __deepcopy__(self, memo: dict) -> Self:
        """As `fork`: the copy is for the same model."""
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a pickle would hold the model."""
        raise ValueError(
            f"{type(self).__name__} cannot be pickled; accepted: cache.save(path) and {type(self).__name__}.load(model,"
            " path), or cache.fork() in the same process"
        )

    def _attached_model(self, wanted: str) -> Any:
        """The model that the cache was made for. Raises ValueError if the cache is closed, or the model is gone."""
        model = None if self.model is None else self.model()
        if model is None:
            raise ValueError(
                f"a cache that is closed, or whose model is gone, cannot be {wanted}; do so before close()"
            )
        return model
