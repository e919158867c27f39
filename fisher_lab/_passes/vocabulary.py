"""From what was captured of a vocabulary's layer to its statistics, which say g in few numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_lab.layers import EmbeddingLayer, Layer, VocabularyLayer
from fisher_lab.statistics import VocabularyStats

Part = tuple[Layer, Tensor, Tensor]  # a use's adapter, its a [N, T, Q, d_in], g [R, N, T, Q, d_out]
ROUNDINGS = 1e4  # up to which an output gradient may be off its form


class NoSoftmaxError(ValueError):
    """The output gradients of a layer are not those of a softmax of its outputs."""


def of_vocabulary(layer: VocabularyLayer, parts: list[Part]) -> VocabularyStats:
    """Statistics of a Linear layer to logits and of the lookups of its weight.

    Args:
        layer: its adapter.
        parts: of its uses, with one direction.

    Raises:
        NoSoftmaxError: where the output gradients are not c (onehot(y) - softmax(z)).
    """
    W = layer.weight
    logits: list[tuple[Tensor, Tensor]] = []
    indices = []
    gradients = []
    for use, a, g in parts:
        if not isinstance(use, EmbeddingLayer):
            logits.append((a[:, :, 0], g[0, :, :, 0]))
            continue
        index = a[:, :, 0, 0]
        indices.append(layer.trained(index, use))
        e = g[0, :, :, 0].detach()
        gradients.append(pad(e, (0, int(layer.bias))))
    if len(logits) != 1:
        raise NoSoftmaxError(f"Layer {layer.name!r} was used {len(logits)} times, expected once.")
    a, g = logits[0]
    label, scale, log_sum = _read(layer.name, W, a, g.detach())
    N = len(a)
    index = a.new_zeros(N, 0, dtype=torch.long)
    e = a.new_zeros(N, 0, W.shape[1])
    if indices:
        index = torch.cat(indices, 1)
        e = torch.cat(gradients, 1)
    return VocabularyStats(W, a, label, scale, log_sum, index, e, layer.bias)


def _read(name: str, W: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Label, weight and logarithm of the softmax's sum `[N, T]` of every position.

    Only the label's entry of g has the sign of c, and it is as large as all others together.

    Args:
        name: of the layer.
        W: the weight `[V, d_in]`.
        a: inputs `[N, T, d_in]`.
        g: output gradients `[N, T, V]`.
    """
    logits = a @ W.T
    log_sum = logits.logsumexp(-1)
    log_p = logits.sub_(log_sum.unsqueeze(-1))
    label = g.abs().argmax(-1)
    at_label = label.unsqueeze(-1)
    others = -torch.expm1(log_p.gather(-1, at_label))  # 1 - p_y
    tiny = torch.finfo(g.dtype).tiny
    scale = g.gather(-1, at_label) / others.clamp(min=tiny)
    expected = log_p.exp_().mul_(-scale)
    expected.scatter_add_(-1, at_label, scale)
    off = expected.sub_(g).abs_().amax()
    most = ROUNDINGS * torch.finfo(g.dtype).eps * scale.abs().amax()
    if not bool(off <= most):
        raise NoSoftmaxError(
            f"Layer {name!r} has output gradients that are not those of a softmax of its outputs, "
            "expected the logits of the model themselves; leave it out with layers=[...]."
        )
    return label, scale.squeeze(-1), log_sum
