"""Source: a question (Setup) ready to be captured again and again within its memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.memory import least, readable
from fisher_lab._passes.batches import Batch
from fisher_lab._passes.capture import (
    Placements,
    by_form,
    capture,
    find_placements,
    recording,
)
from fisher_lab._passes.labels import (
    Empirical,
    Outputs,
    check_output_factors,
    gradient_labels,
)
from fisher_lab._passes.model import (
    Forward,
    lowest_precision,
    outputs_of,
    probe,
    untouched_randomness,
)
from fisher_lab._passes.placement import Placement
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.vocabulary import NoSoftmaxError
from fisher_lab.layers import GradientForm, Layer, VocabularyLayer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.statistics import Gathered, LayerStats, sums_over


@dataclass(frozen=True)
class Piece:
    """Some examples of a batch, in a number that fits the memory.

    Attributes:
        batch: inputs and the data's labels.
        label: labels at which the loss is differentiated; None where the kind of Fisher needs none.
        likelihood: with the scale that the whole batch's labels give it.
    """

    batch: Batch
    label: Tensor | None
    likelihood: Likelihood


class Source:
    """A question ready to be captured: the copy of the model, the layers, the batches and the
    labels.

    Args:
        setup: the question.
        vocabularies: whether layers of a vocabulary may have statistics of their own kind, which
            not all readers understand.

    Raises:
        ValueError, TypeError: whatever cannot be measured, in one sentence.

    Attributes:
        forward: the copy of the model.
        layers: adapters by name.
        R: directions per example.
        outputs: shape of an example's output.
        precision: the lowest precision in which the forward pass computes.
        chunk: most examples whose columns of all layers fit the memory at once.
    """

    def __init__(self, setup: Setup, vocabularies: bool = False) -> None:
        self.setup = setup
        self.vocabularies = vocabularies
        prepared = setup.prepared()
        self.prepared = prepared
        self.forward: Forward = prepared.forward
        self.likelihood: Likelihood = prepared.likelihood
        self.selection = prepared.selection
        self.batches = prepared.batches
        self.labels = prepared.labels
        self.budget = prepared.budget
        self.dtype = prepared.dtype
        self.layers: dict[str, Layer] = dict(self.selection.layers)
        self._itemsize = self.dtype.itemsize
        self._check_factors()
        with untouched_randomness():  # which a DataLoader draws its seed from
            first = self.batches.first()
            z = probe(self.forward, first)
        self._check_first(z, first)
        self.outputs = tuple(z.shape[1:])
        self.first_batch = first.N
        self.R = self.labels.directions(self.likelihood, z)
        check_output_factors(self.R, z, self.budget)
        self._drawn: dict[int, Tensor] = {}  # labels by batch
        with untouched_randomness():
            self.precision = lowest_precision(self.forward, first, self.dtype)
            self.forward = replace(self.forward, inside=self.precision)
            room = self.budget.for_piece // self._itemsize
            self.placements: Placements = find_placements(self.forward, self.layers, first, room)
            self._take_gradient_form()
            self._take_vocabulary_form(first)
            self._positions: dict[str, int] = {}  # of one example, by layer
            self._output_numbers, self._input_numbers = self._sizes(first)
        self._check_example()
        if self.batches.single:
            for name, layer in self.layers.items():
                if isinstance(layer, VocabularyLayer):
                    self.check_vocabulary(name)
        self.chunk = self._chunk(self.layers)
        self._verified: set[str] = set()  # layers whose first capture was checked
        self._kept: dict[str, LayerStats] = {}  # columns that fit the memory and are captured once
        self._own = set(self.layers)  # the others are captured by other ranks
        self._beside: dict[str, tuple[str, ...]] = {}  # layers with which a layer's pieces are cut

    # -- what is asked -----------------------------------------------------------------------------
    @property
    def model(self) -> nn.Module:
        """The copy of the model."""
        return self.forward.module

    @property
    def fisher(self) -> str:
        """Name of the kind of Fisher."""
        return self.labels.kind

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.labels.seed

    @property
    def N(self) -> int:
        """Examples in the data."""
        return self.batches.counted()

    @property
    def about_N(self) -> int:
        """About as many, without a pass over the data."""
        return self.batches.about(self.first_batch)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return next(self.model.parameters()).device

    @property
    def limit(self) -> float:
        """Bytes that were asked for; infinite where the budget is what happens to be free, since
        numbers must not depend on that.
        """
        if self.setup.memory is None:
            return math.inf
        return float(self.budget.total)

    @property
    def scale(self) -> float:
        """The loss over its mean: N for losses that are sums over examples, whose statistics have
        it inside.
        """
        if self.likelihood.summed:
            return float(self.N)
        return 1.0

    # -- checks before anything is computed --------------------------------------------------------
    def _check_factors(self) -> None:
        """Refuse layers with a factor that no approximation avoids and that does not fit."""
        for name, layer in self.layers.items():
            if self._may_be_vocabulary(layer):
                continue
            factor = layer.factor_size() * self._itemsize
            need = self.budget.for_factor(factor)
            if need > self.budget.total:
                kind = type(layer.module).__name__
                rows, columns = layer.shape
                most = readable(self.budget.total)
                cure = "leave it out with layers=[...] or raise memory="
                if self.labels.expectation and layer.tied:  # an embedding
                    cure = f'use fisher="mc", {cure}'
                raise ValueError(
                    f"Layer {name!r} ({kind}, W {rows} x {columns}) needs {readable(need)}, "
                    f"expected at most {most}; {cure} to {least(need)}."
                )

    def _check_first(self, z: Any, first: Batch) -> None:
        """Refuse outputs and labels that do not fit the likelihood and the kind of Fisher."""
        self.likelihood.check_output(z)
        self.likelihood.check_values(z)
        if z.shape[0] != 1:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)} for 1 example, expected [1, *output]."
            )
        if first.y is None:
            self.likelihood.check_unlabelled(z)
            self.labels.check_unlabelled()

    def _take_gradient_form(self) -> None:
        """Layers without inputs of their own for every example: those whose rows several examples
        use in other ways than sharing one, and those that are never called.
        """
        for name, kinds in list(self.placements.items()):
            if Placement.MIXED in kinds:
                reason = "its rows are shared by several examples"
            elif Placement.UNSEEN in kinds:
                reason = "it is never called, its parameters are read"
            else:
                continue
            layer = self.layers[name]
            self.layers[name] = GradientForm.joined(layer.uses, reason)
            del self.placements[name]
        self._check_factors()  # of the new forms

    def _may_be_vocabulary(self, layer: Layer) -> bool:
        """Whether a layer may turn out to be one of a vocabulary."""
        one_direction = not self.labels.expectation
        return self.vocabularies and one_direction and VocabularyLayer.may_be(layer)

    def _take_vocabulary_form(self, first: Batch) -> None:
        """Layers to the logits of a softmax over many classes, found on one example."""
        may_be = [name for name, layer in self.layers.items() if self._may_be_vocabulary(layer)]
        one = first.part(slice(0, 1))
        for name in may_be:
            layer = VocabularyLayer(self.layers[name])
            try:
                capture(
                    self.forward, {name: layer}, one.inputs, self._any_factors(one), self.placements
                )
            except NoSoftmaxError:
                continue
            self.layers[name] = layer
        self.vocabularies = False  # what is none now is measured as any other layer
        self._check_factors()

    def check_vocabulary(self, name: str) -> None:
        """Refuse a layer of a vocabulary whose inputs do not fit the memory."""
        if self.fits_at_once([name]):
            return
        raise ValueError(
            f"Layer {name!r} has more inputs than fit a quarter of the memory, "
            f"{readable(self.budget.for_columns)}; use fewer examples or raise memory=."
        )

    def _any_factors(self, one: Batch) -> Callable[[Tensor], Tensor]:
        """Output factors of an example at any label."""
        likelihood = self.likelihood.of_batch(one.y)

        def factors(z: Tensor) -> Tensor:
            label = None
            if self.labels.draws:
                generator = torch.Generator(z.device).manual_seed(self.seed)
                label = likelihood.sample(z.detach(), generator)
            return self.labels.factors(likelihood, z, label, one.y)

        return factors

    def _check_example(self) -> None:
        """Refuse examples that do not fit one by one, even where layers are captured one by one."""
        sizes = [self.example_bytes([name]) for name in self.layers]
        need = max(sizes)
        if need > self.budget.total:
            cure = f"raise memory= to {least(need)}"
            if self.R > 1:
                cure = f'use fisher="mc", whose R is 1, or {cure}'
            raise ValueError(
                f"One example with R = {self.R} directions needs {readable(need)}, expected at "
                f"most {readable(self.budget.total)}; {cure}."
            )

    # -- sizes -------------------------------------------------------------------------------------
    def _sizes(self, first: Batch) -> tuple[int, dict[str, int]]:
        """Numbers per example: all modules' outputs, and each layer's unrolled input (or explicit
        gradients).
        """
        outputs: list[int] = []

        def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append(output.numel())

        hooked, flat = by_form(self.layers)
        one = first.part(slice(0, 1)).inputs
        handles = []
        try:
            for module in self.model.modules():
                handle = module.register_forward_hook(count)
                handles.append(handle)
            with torch.enable_grad(), recording(hooked) as uses:
                self.forward(one)
        finally:
            for handle in handles:
                handle.remove()
        unrolled = {}
        for name, of_layer in uses.items():
            layer = self.layers[name]
            if isinstance(layer, VocabularyLayer):
                sizes = [layer.captured_numbers(use.layer, use.a) for use in of_layer]
            else:
                sizes = [use.layer.unrolled_numbers(use.a) for use in of_layer]
            unrolled[name] = sum(sizes)
            positions = [math.prod(use.a.shape[:3]) for use in of_layer]  # rows, positions, groups
            self._positions[name] = sum(positions)
        for name, layer in flat.items():
            parameters = layer.shape[0]
            unrolled[name] = parameters * (self.R + 2)
        return sum(outputs), unrolled

    def take(self, own: Iterable[str], groups: Iterable[Sequence[str]]) -> None:
        """Capture only some of the layers, in the pieces in which one process would capture all.

        Args:
            own: names of the layers that are captured here; the others are other ranks'.
            groups: names of the layers that one process would capture in one pass.
        """
        self._own = set(own)
        everything = tuple(self.layers)
        for group in groups:
            beside = everything if self.fits_at_once() else tuple(group)
            for name in group:
                self._beside[name] = beside

    def _chunk(self, names: Iterable[str]) -> int:
        """Examples whose unrolled inputs and batched gradients fit the share of a piece."""
        fitting = self.budget.for_piece // self.example_bytes(names)
        return max(1, int(fitting))

    def example_bytes(self, names: Iterable[str]) -> int:
        """Bytes per example of all outputs, and of unrolled inputs and gradients of
        these layers.
        """
        inputs = 0
        for name in names:
            inputs += self._input_numbers.get(name, 0)
        # of outputs the gradients for every direction, the output itself and a copy; of inputs the
        # unrolled form and a copy
        numbers = (self.R + 2) * self._output_numbers + 2 * inputs
        return max(1, numbers * self._itemsize)

    def positions(self, name: str) -> int:
        """Positions (and groups) of an example at which a layer is used, 1 in the gradient form."""
        return max(1, self._positions.get(name, 1))

    def column_numbers(self, name: str) -> float:
        """Numbers per example that the columns of a layer's block take: inputs and output
        gradients, or P if fewer.
        """
        rows, columns = self.layers[name].shape
        explicit = self.R * rows * columns
        return min(self._captured_numbers(name), explicit)

    def _captured_numbers(self, name: str) -> float:
        """Numbers per example that the captured statistics of a layer hold."""
        rows, columns = self.layers[name].shape
        if self.layers[name].gradient_form:
            return self.R * rows * columns
        if isinstance(self.layers[name], VocabularyLayer):
            return self._positions[name] * (columns + 3)  # label, weight and sum of the softmax
        return self._positions[name] * (columns + self.R * rows)

    def fits_at_once(self, names: Iterable[str] | None = None) -> bool:
        """Whether the data is one batch whose columns, for these layers, are captured once and
        kept.
        """
        chosen = list(self.layers if names is None else names)
        small = all(isinstance(self.layers[name], VocabularyLayer) for name in chosen)
        if not self.batches.single and not small:
            return False
        numbers = 0.0
        for name in chosen:
            numbers += self._captured_numbers(name)
        of_example = numbers * self._itemsize
        return self._examples() * of_example <= self.budget.for_columns

    def _examples(self) -> int:
        """N, without a pass where the data is one batch."""
        return self.first_batch if self.batches.single else self.N

    # -- passes over the data ----------------------------------------------------------------------
    def batches_with_labels(self) -> Iterator[Piece]:
        """One pass over the batches, their labels drawn."""
        for batch in self.batches:
            if batch.index:
                probe(self.forward, batch)  # batches need not be alike
            if batch.y is not None:
                like_outputs = torch.empty(batch.N, *self.outputs, device="meta")
                self.likelihood.check_labels(like_outputs, batch.y)
            scaled = self.likelihood.of_batch(batch.y)
            yield Piece(batch, self._drawn_for(batch), scaled)

    def _drawn_for(self, batch: Batch) -> Tensor | None:
        """The labels drawn for a batch, once where they are small beside the outputs: classes."""
        known = self._drawn.get(batch.index)
        if known is not None:
            return known
        label = self.labels.draw(self.likelihood, self._outputs_of(batch), batch.index)
        if label is not None and not label.is_floating_point():
            self._drawn[batch.index] = label
        return label

    def parts(self, names: Iterable[str] | None = None) -> Iterator[Piece]:
        """One pass over the data in pieces in which the columns of these layers (None: all) fit the
        memory.
        """
        chunk = self.chunk
        if names is not None:
            beside: set[str] = set()
            for name in names:
                beside.update(self._beside.get(name, (name,)))
            chunk = self._chunk(beside)
        for whole in self.batches_with_labels():
            for start in range(0, whole.batch.N, chunk):
                some = slice(start, start + chunk)
                part = whole.batch.part(some)
                label = whole.label
                if label is not None:
                    label = label[some]
                yield Piece(part, label, whole.likelihood)

    def _outputs_of(self, batch: Batch) -> Outputs:
        """The outputs of a batch, computed a piece at a time."""
        return outputs_of(self.forward, batch, self.outputs, self.chunk)

    def factors_of(self, piece: Piece) -> Callable[[Tensor], Tensor]:
        """The output factors of a piece as a function of its outputs."""
        # read before the pass, since only sums need it
        N = self.N if self.likelihood.summed else None

        def factors(z: Tensor) -> Tensor:
            piece.likelihood.check_values(z)
            y = piece.batch.y
            return self.labels.factors(piece.likelihood, z, piece.label, y, N)

        return factors

    def sweep(self, names: Sequence[str] | None = None) -> Iterator[dict[str, LayerStats]]:
        """One pass: the LayerStats of some layers, piece by piece, or at once where they are kept.

        Callers guard the global random state: a generator that is left half-way would restore it
        too late.

        Args:
            names: the layers; None for all.
        """
        wanted = list(self.layers if names is None else names)
        if set(wanted) <= set(self._kept):
            yield {name: self._kept[name] for name in wanted}
            return
        chosen = set(wanted)
        if self.fits_at_once():  # then all layers are captured in this pass
            chosen = self._own if chosen <= self._own else set(self.layers)
        layers = {name: layer for name, layer in self.layers.items() if name in chosen}
        if not self.fits_at_once(layers):
            for stats in self._captured(layers):
                yield {name: stats[name] for name in wanted}
            return
        gathered = {name: Gathered(self._examples()) for name in layers}
        for piece in self._captured(layers):
            for name in layers:
                gathered[name].add(piece.pop(name))
        self._kept = {}
        for name in layers:
            # the pieces of a layer go as they are joined, so that no layer is held twice
            self._kept[name] = gathered.pop(name).whole()  # type: ignore[assignment]
        yield {name: self._kept[name] for name in wanted}

    def _captured(self, layers: dict[str, Layer]) -> Iterator[dict[str, LayerStats]]:
        """The LayerStats of these layers piece by piece, the first checked against autograd."""
        for piece in self.parts(layers):
            verify = not set(layers) <= self._verified
            inputs = piece.batch.inputs
            factors = self.factors_of(piece)
            yield capture(self.forward, layers, inputs, factors, self.placements, verify)
            self._verified.update(layers)

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the mean loss over every W: at the data's labels, or at labels drawn from the
        model.
        """
        totals: dict[str, Tensor] = {}
        device = next(self.model.parameters()).device
        for columns in self.gradient_columns():
            for name, stats in columns.items():
                ones = torch.ones(1, stats.N, dtype=self.dtype, device=device)
                part = sums_over(stats, shared=False).combine(ones)
                if name in totals:
                    part = totals[name] + part
                totals[name] = part
        # N is known after the pass
        return {name: total / self.N for name, total in totals.items()}

    def gradient_columns(self) -> Iterator[dict[str, LayerStats]]:
        """Gradients of the examples' losses, as columns of some examples at a time: at the data's
        labels, or at labels drawn from the model.
        """
        for batch in self.batches:
            outputs = self._outputs_of(batch)
            label = gradient_labels(self.likelihood, outputs, batch.y, self.seed, batch.index)
            likelihood = self.likelihood.of_batch(batch.y)
            for start in range(0, batch.N, self.chunk):
                some = slice(start, start + self.chunk)
                yield self._gradients_of(batch.part(some), label[some], likelihood)

    def _gradients_of(
        self, batch: Batch, label: Tensor, likelihood: Likelihood
    ) -> dict[str, LayerStats]:
        """Columns of the examples' gradients."""

        def factors(z: Tensor) -> Tensor:
            return Empirical().factors(likelihood, z, None, label)

        return capture(self.forward, self.layers, batch.inputs, factors, self.placements)
