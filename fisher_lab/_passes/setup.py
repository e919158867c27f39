"""Setup: what was asked, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from fisher_lab._ground.arguments import seed_of
from fisher_lab._ground.memory import Budget
from fisher_lab._ground.ranks import Ranks, check_alike
from fisher_lab._passes.batches import LABELS, Batches, batch_checksum, checksum
from fisher_lab._passes.labels import FisherKind, Labels, labels_of
from fisher_lab._passes.model import Forward, Output, evaluation_copy, untouched_randomness
from fisher_lab.layers import Selection, select
from fisher_lab.likelihoods import Likelihood, as_likelihood

OnUnknown = Literal["error", "skip", "flatten"]


@dataclass(frozen=True)
class Setup:
    """A question about a model: whose Fisher, on which data, of which kind, and how it is to be
    computed.

    The public functions take these as keyword arguments and hand them on; this is where they are
    described.

    Attributes:
        model: any module that acts per example, in evaluation mode; it is not changed, only a copy
            is used.
        likelihood: a Likelihood or a torch loss module (then: the Fisher that equals the GGN of
            that loss).
        data: (inputs, y), inputs alone, a DataLoader or an iterable of such batches; inputs are a
            tensor x `[N, ...]`, a tuple (the model is called as `model(*inputs)`) or a mapping
            (`model(**inputs)`).
        layers: names of layers; None for all.
        fisher: "true" (expectation over labels), "mc" (labels sampled from the model) or
            "empirical" (the labels given). "true" costs R = number of outputs backward passes, "mc"
            one.
        seed: of everything that is drawn; sampled labels are the same for every way to compute.
        dtype: precision of the computation: torch.float64 or torch.float32.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: modules that no adapter understands: "error" measures those with few parameters
            over their flattened parameters and refuses larger ones, "skip" leaves them out and says
            so.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z: a name, an index or a function; None for a tensor,
            or `logits`.
    """

    model: nn.Module
    likelihood: Likelihood | nn.Module
    data: Any
    layers: Sequence[str] | None = None
    fisher: FisherKind = "true"
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: torch.device | str | None = None
    memory: float | None = None
    on_unknown: OnUnknown = "error"
    labels: str = LABELS
    output: Output | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **fixed: Any) -> Setup:
        """The question among the arguments of a public function.

        So a new attribute is written here and in the signatures, and is handed on by no line.

        Args:
            arguments: its `locals()` before any is worked on; those that are no attributes of a
                Setup are the function's own.
            **fixed: attributes that the function chooses itself.
        """
        asked = dict(fixed)
        for field in fields(cls):
            if field.name not in fixed:
                asked[field.name] = arguments[field.name]
        return cls(**asked)

    def prepared(self) -> Prepared:
        """The question checked and brought to one form.

        Raises:
            ValueError, TypeError: whatever cannot be measured, in one sentence.
        """
        seed = seed_of(self.seed)
        kind = labels_of(self.fisher, seed)
        budget = Budget.of(self.memory)
        likelihood = as_likelihood(self.likelihood)
        module = evaluation_copy(self.model, self.dtype, self.device)
        selection = select(module, self.layers, self.on_unknown)
        if kind.expectation:
            # whatever the number of outputs, so that all ways agree on the form
            selection = selection.for_directions()
        device = next(module.parameters()).device  # where the copy is, whatever was asked
        batches = Batches(self.data, self.dtype, device, budget.total, self.labels)
        forward = Forward(module, self.output)
        return Prepared(forward, likelihood, selection, batches, kind, budget, self.dtype)


@dataclass(frozen=True)
class Prepared:
    """A Setup in one form.

    Attributes:
        forward: the copy of the model, and what of its output is z.
        likelihood: p(y | z).
        selection: the layers' adapters, and what was left out.
        batches: the data.
        labels: the kind of Fisher.
        budget: the memory.
        dtype: the precision.
    """

    forward: Forward
    likelihood: Likelihood
    selection: Selection
    batches: Batches
    labels: Labels
    budget: Budget
    dtype: torch.dtype

    def model_checksum(self) -> int:
        """CRC-32 of parameters and buffers."""
        module = self.forward.module
        crc = 0
        for tensor in (*module.parameters(), *module.buffers()):
            crc = checksum(tensor, crc)
        return crc

    def checksum(self) -> int:
        """CRC-32 of the model and the first batch: whether two processes ask the same."""
        first = self.batches.first()
        return batch_checksum(first.inputs, first.y, self.model_checksum())


def check_asked_alike(prepared: Prepared, ranks: Ranks) -> None:
    """Refuse ranks that ask about different models or data; nothing is read of one alone.

    Args:
        prepared: the question of this rank.
        ranks: who shares the work.
    """
    if ranks.alone:
        return
    with untouched_randomness():
        check_alike(ranks.gathered(prepared.checksum))
