"""Source: a model and data, ready to be captured again and again within a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import seed_of
from fisher_lab._ground.memory import budget_bytes, readable
from fisher_lab._passes.batches import Batches
from fisher_lab._passes.capture import capture, check_examples, first_input
from fisher_lab._passes.model import (
    evaluation_copy,
    label_seed,
    plain_kernels,
    probe,
    sample_labels,
    untouched_randomness,
)
from fisher_lab.layers import Layer, select
from fisher_lab.likelihoods import FisherKind, Likelihood, as_likelihood, check_fisher
from fisher_lab.statistics import LayerStats, joined


class Source:
    """A model and data, ready to be captured again and again: the copy, the layers, the batches and the labels.

    Args:
        model: the user's model; only a copy in evaluation precision is used.
        likelihood: a Likelihood or a torch loss module.
        data: see `fisher_lab._passes.batches.Batches`.
        layers: names of layers, None for all.
        fisher: "true", "mc" or "empirical".
        seed: of the sampled labels.
        dtype: precision of all computations.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: "error" or "skip" for modules without adapter.

    Raises:
        ValueError, TypeError: whatever cannot be measured, in one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module,
        data: Any,
        *,
        layers: Sequence[str] | None = None,
        fisher: FisherKind = "true",
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        memory: float | None = None,
        on_unknown: Any = "error",
    ) -> None:
        check_fisher(fisher)
        self.fisher, self.seed, self.dtype = fisher, seed_of(seed), dtype
        self.budget = budget_bytes(memory)
        self.likelihood = as_likelihood(likelihood)
        self.model = evaluation_copy(model, dtype, device)
        self._item = torch.finfo(dtype).bits // 8
        self.selection = select(self.model, layers, on_unknown)
        self.layers = self.selection.layers
        self._check_memory()
        own = next(self.model.parameters()).device
        self.batches = Batches(data, dtype, own, self.budget)
        with untouched_randomness():  # which a DataLoader draws its seed from
            x, y = self.batches.first()
            z = probe(self.model, x)
        self.likelihood.check_output(z)
        if z.shape[0] != 1:
            raise ValueError(f"The model returned shape {tuple(z.shape)} for 1 example, expected [1, *output].")
        if y is None:
            self.likelihood.check_unlabelled(z)
        if fisher == "empirical" and y is None:
            raise ValueError('fisher="empirical" needs labels, got none; pass data as (x, y) or use fisher="true".')
        self.outputs = tuple(z.shape[1:])
        self.first_batch = x.shape[0]
        self.R = self.likelihood.directions(z, fisher)
        self._outputs, self._unrolled = self._sizes(x[:1])
        self._check_example()
        self.chunk = self._chunk(self.layers)
        self._verified: set[str] = set()  # layers whose first capture was checked
        self._cached: tuple[tuple[str, ...], dict[str, LayerStats]] = ((), {})

    def _check_memory(self) -> None:
        for name, layer in self.layers.items():
            need = 4 * layer.factor_size() * self._item  # a matrix, its eigenvectors, a result
            if need > self.budget:
                raise ValueError(
                    f"Layer {name!r} ({type(layer.module).__name__}, W {layer.shape[0]} x {layer.shape[1]}) needs "
                    f"{readable(need)}, expected at most {readable(self.budget)}; leave it out with layers=[...] or "
                    "raise memory=."
                )

    def kept(self, names: Iterable[str] | None = None) -> bool:
        """Whether the data is one batch whose columns, for these layers, are captured once and kept."""
        numbers = sum(self._captured_numbers(name) for name in (self.layers if names is None else names))
        return self.batches.single and self.first_batch * numbers * self._item <= self.budget / 4

    @property
    def N(self) -> int:
        """Examples in the data, known after one pass."""
        assert self.batches.N is not None
        return self.batches.N

    @property
    def scale(self) -> float:
        """What an assembled matrix is multiplied with: N for losses that are sums over examples."""
        return float(self.N) if self.likelihood.summed else 1.0

    def _sizes(self, x: Tensor) -> tuple[int, dict[str, int]]:
        """Numbers per example: all modules' outputs, and each layer's unrolled input (or explicit gradients)."""
        outputs: list[int] = []
        unrolled = {n: layer.shape[0] * (self.R + 2) for n, layer in self.layers.items() if layer.gradient_form}

        def look(name: str, use: Layer, x: Tensor) -> None:
            a = use.unroll_input(x)
            check_examples(use.name, a.shape[0], 1)  # with one example no other dimension passes for the examples
            unrolled[name] = unrolled.get(name, 0) + a.numel()

        hooks = [
            m.register_forward_hook(
                lambda _m, _i, out: outputs.append(out.numel()) if isinstance(out, Tensor) else None
            )
            for m in self.model.modules()
        ]
        for name, layer in self.layers.items():
            for use in () if layer.gradient_form else layer.uses:
                hooks.append(
                    use.module.register_forward_hook(
                        lambda _m, inputs, named, _o, use=use, name=name: look(name, use, first_input(inputs, named)),
                        with_kwargs=True,
                    )
                )
        try:
            with untouched_randomness(), torch.no_grad(), plain_kernels():
                self.model(x.clone())
        finally:
            for hook in hooks:
                hook.remove()
        return sum(outputs), unrolled

    def _chunk(self, names: Iterable[str]) -> int:
        """Examples whose unrolled inputs and batched gradients take at most a quarter of the budget."""
        return max(1, self.budget // 4 // self.example_bytes(names))

    def example_bytes(self, names: Iterable[str]) -> int:
        """Bytes per example of all outputs, and of unrolled inputs and gradients of these layers."""
        numbers = (self.R + 2) * self._outputs + 2 * sum(self._unrolled.get(name, 0) for name in names)
        return max(1, numbers * self._item)

    def _check_example(self) -> None:
        need = max(self.example_bytes([name]) for name in self.layers)  # layers can be captured one by one
        if need > self.budget:
            cure = 'use fisher="mc", whose R is 1, or raise memory=' if self.R > 1 else "raise memory="
            raise ValueError(
                f"One example with R = {self.R} directions needs {readable(need)}, expected at most "
                f"{readable(self.budget)}; {cure}."
            )

    def column_numbers(self, name: str) -> float:
        """Numbers per example that the columns of a layer's block take: inputs and output gradients, or P if fewer."""
        rows, columns = self.layers[name].shape
        return min(self._captured_numbers(name), self.R * rows * columns)

    def _captured_numbers(self, name: str) -> float:
        """Numbers per example that the captured statistics of a layer hold."""
        rows, columns = self.layers[name].shape
        if self.layers[name].gradient_form:
            return self.R * rows * columns
        return self._unrolled.get(name, 0) / max(1, columns) * (columns + self.R * rows)

    def parts(self, names: Iterable[str] | None = None) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """One pass over the data in pieces that fit the memory: x, the data's labels, labels to differentiate at."""
        for index, (x, y) in enumerate(self.batches):
            if index:
                probe(self.model, x)  # batches need not be alike
            if y is not None:
                self.likelihood.check_labels(torch.empty(x.shape[0], *self.outputs, device="meta"), y)
            label = y
            if self.fisher == "mc":
                generator = torch.Generator(x.device).manual_seed(label_seed(self.seed, index))
                label = sample_labels(self.model, partial(self.likelihood.sample, generator=generator), x, self.chunk)
                label = label if y is None else self.likelihood.masked(label, y)
            chunk = self.chunk if names is None else self._chunk(names)
            for start in range(0, x.shape[0], chunk):
                piece = slice(start, start + chunk)
                yield x[piece], None if y is None else y[piece], None if label is None else label[piece]

    def sweep(self, names: Sequence[str] | None = None) -> Iterator[dict[str, LayerStats]]:
        """One pass: the LayerStats of some layers, piece by piece, or at once where they are kept (see `kept`).

        Callers guard the global random state: a generator that is left half-way would restore it too late.

        Args:
            names: the layers; None for all.
        """
        key = tuple(self.layers if names is None else names)
        known, stats = self._cached
        if known and set(key) <= set(known):
            yield {name: stats[name] for name in key}
            return
        everything = self.kept()
        layers = {name: layer for name, layer in self.layers.items() if everything or name in key}
        keep, pieces = self.kept(layers), []
        for x, _, label in self.parts(layers):
            verify = not set(layers) <= self._verified
            stats = capture(self.model, layers, self.likelihood, x, self.fisher, label, verify)
            self._verified.update(layers)
            if keep:
                pieces.append(stats)
            else:
                yield {name: stats[name] for name in key}
        if keep:
            self._cached = (tuple(layers), {name: joined([piece.pop(name) for piece in pieces]) for name in layers})
            yield {name: self._cached[1][name] for name in key}
