"""Layers of a model's own forward, recomputed in the backward pass, their inputs waiting in host memory.

For models without fused layers. What transformers' `offload=True` does not do: the copies run beside the computation
and come back one layer ahead, pinned memory is allocated once, and of what is saved only layer inputs go out.

Nothing is replaced for it. `torch.utils.checkpoint` calls its `context_fn`, saves the layer's arguments, and enters the
first of the two contexts that it got: a saved-tensor hook that finds itself between the first and the third of these
is looking at arguments of a layer, of which the first that is as large as the hidden states is put into the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from tandem.rl.errors import UserError
from tandem.rl.model import LanguageModel, LayoutInUse, current_layout
from tandem.rl.offload import HostStore, Stored, goes_to_host


class CheckpointedLayers:
    """Serves one model; lies beside it as `lm.checkpoints` and changes no class.

    Args:
        offload: keep layer inputs in host memory; None: on a GPU, for packs that would leave more than 512 MiB.
    """

    def __init__(self, *, offload: bool | None = None) -> None:
        self.host: HostStore | None = None
        self.offload = offload
        self._lm: Any = None
        self._size = 0  # elements of the pack's hidden states
        self._layer_starts = False
        self._watched: tuple[torch.Tensor, int] | None = None

    def attach(self, lm: LanguageModel) -> CheckpointedLayers:
        """Switch the model's checkpointing on, for train mode.

        Raises:
            UserError: the model has none.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        model = lm.causal_lm
        try:
            _switch(model, "enable")({"use_reentrant": False, "context_fn": self._contexts})
        except ValueError as error:
            raise UserError(
                f"{type(model).__name__} cannot recompute its layers: {error}",
                fix="set train.gradient_checkpointing=false",
            ) from error
        if any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
            # transformers makes embeddings require a gradient, as reentrant checkpointing needs. Here that would only
            # keep them and their gradient on the device.
            model.disable_input_require_grads()
        self._lm = lm
        lm.checkpoints = self
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`, and free the host memory."""
        if self._lm is not None:
            _switch(self._lm.causal_lm, "disable")()
            self._lm.checkpoints = None
        self._lm, self.host, self._watched = None, None, None

    def abandon(self) -> None:
        """Let go of what the latest pack has left, which did not come to its end."""
        self._watched = None
        if self.host is not None:
            self.host.begin()

    @contextmanager
    def saving(self, rows: int) -> Iterator[None]:
        """Around the forward pass of a pack of `rows` tokens."""
        if not torch.is_grad_enabled() or not self._offloads(rows):
            yield
            return
        if self.host is None:
            self.host = HostStore(self._lm.device)
        self.host.begin()
        self._size = rows * self._lm.causal_lm.config.get_text_config().hidden_size
        self._layer_starts, self._watched = False, None
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _offloads(self, rows: int) -> bool:
        config = self._lm.causal_lm.config.get_text_config()
        left = config.num_hidden_layers * rows * config.hidden_size * self._lm.dtype.itemsize
        return goes_to_host(self.offload, left, self._lm.device)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        self._layer_starts = True
        # The backward pass may run in another thread, and with another pack's layout.
        return self._layer(), LayoutInUse(current_layout())

    @contextmanager
    def _layer(self) -> Iterator[None]:
        self._layer_starts = False
        yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Stored:
        tensor = tensor.detach()  # the graph must not hold itself
        if not self._layer_starts or not tensor.is_floating_point() or tensor.numel() < self._size:
            return tensor
        self._layer_starts = False
        self._check_unchanged()
        assert self.host is not None
        stored = self.host.put([tensor])
        self._watched = (tensor, tensor._version)
        return stored

    def _unpack(self, packed: torch.Tensor | Stored) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._check_unchanged()
        (tensor,) = packed.take()
        packed.prefetch()
        return tensor

    def _check_unchanged(self) -> None:
        """A layer that writes to its input would race with the copy of it. Autograd cannot see that behind hooks."""
        watched, self._watched = self._watched, None
        if watched is not None and watched[0]._version != watched[1]:
            raise RuntimeError(
                f"a layer of {type(self._lm.causal_lm).__name__} changes its input in place, so that it cannot be "
                "recomputed from it; set train.gradient_checkpointing=false"
            )


def _switch(model: Any, way: str) -> Any:
    """transformers' method, by its newer name where it has that."""
    return getattr(model, f"activation_checkpointing_{way}", None) or getattr(model, f"gradient_checkpointing_{way}")
