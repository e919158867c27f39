"""Observing without touching the loop: hooks on the model that watch its training forward passes.

A forward pass is watched if it is one of training: the model in training mode, gradients recorded,
and an observation due. So evaluation passes are left alone, and the micro-batches of an accumulated
step join one observation, as they do with `observing()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fisher_lab._passes.model import Forward
from fisher_lab.layers import Layer
from fisher_lab.optim.observation import Watched, watching
from fisher_lab.optim.window import Window


class Observer(Protocol):
    """What is asked of the optimizer that observes."""

    model: nn.Module
    forward: Forward
    window: Window

    def is_due(self) -> bool:
        """Whether the forward passes of the present step are to be watched."""

    def watched_layers(self) -> dict[str, Layer]:
        """Whose inputs and output gradients are recorded."""

    def conclude(self, forwards: list[Watched], y: Tensor | None) -> None:
        """Let recorded forward passes join the present observation."""


class Attachment:
    """What `attach` gives back: it observes for an optimizer until it is removed.

    The hooks do not keep the optimizer alive, and a copied or unpickled model has none.

    Args:
        optimizer: whose model is watched.
    """

    def __init__(self, optimizer: Observer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._stack = ExitStack()
        self._forwards: list[Watched] = []
        self._leaving: RemovableHandle | None = None
        self._entering = optimizer.model.register_forward_pre_hook(_Hook(self._enter))

    def remove(self) -> None:
        """Observe no more."""
        self._entering.remove()

    def _enter(self, model: nn.Module) -> None:
        """A forward pass begins."""
        optimizer = self._optimizer()
        # within observing() it is watched already
        if optimizer is None or optimizer.window.entered:
            return
        if not model.training or not torch.is_grad_enabled():
            return
        if not optimizer.is_due():
            return
        self._forwards = self._stack.enter_context(
            watching(optimizer.forward, optimizer.watched_layers())
        )
        # registered behind the hook of `watching`, so that it runs after it; always, so that a
        # pass that raises leaves no hooks of layers behind
        leave = _Hook(self._leave)
        self._leaving = model.register_forward_hook(leave, always_call=True)

    def _leave(self, model: nn.Module) -> None:  # noqa: ARG002
        """A watched forward pass ends, perhaps by an exception; then nothing was recorded."""
        assert self._leaving is not None
        self._leaving.remove()
        self._stack.close()
        forwards = self._forwards
        self._forwards = []
        optimizer = self._optimizer()
        if forwards and optimizer is not None:
            optimizer.conclude(forwards, None)


class _Hook:
    """A bound method as a hook that keeps nobody alive; copied or pickled, it does nothing."""

    def __init__(self, method: Callable[[nn.Module], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, *ignored: Any) -> None:  # noqa: ARG002
        method = self._method()
        if method is not None:
            method(module)

    def __reduce__(self) -> Any:
        return _nothing_to_do, ()


def _nothing(*ignored: Any) -> None:
    """The hook of a copied model."""


def _nothing_to_do() -> Callable[..., None]:
    return _nothing
