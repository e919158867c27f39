"""About how long a comparison takes, from the sizes of its layers alone.

Operations are counted as those of products of large matrices, whose speed is measured once by a
quick product. What is slower than a product counts more; these factors, and how many products a
Lanczos run takes, were found by timing (and hold within a factor of about two on the problems of
`fisher_lab.problems` and on small transformers).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fisher_lab._ground.progress import duration
from fisher_lab._passes.source import Source
from fisher_lab.errors import DENSE_DIM
from fisher_lab.layers import VocabularyLayer

LANCZOS = 24  # products of a run
EIGEN = 45  # an eigendecomposition of n x n: this times n^3
SMALL = 5e8  # what every layer takes whatever its size
OF_CANDIDATE = 2e8  # and every candidate of it
DERIVATIVE = 10  # forward passes that a derivative in one direction takes
SOLVES = 40  # products of a damped solve of a large block
WORTH_TELLING = 10.0  # seconds
SLOWEST = 1e10  # operations a second of the slowest machine to reckon with
CALIBRATION = 384  # rows of the matrices that are multiplied to measure the speed


@dataclass(frozen=True)
class Sizes:
    """What the cost of a layer follows from.

    Attributes:
        rows: of W.
        columns: of W.
        T: positions of an example.
        N: examples.
        R: directions.
        inputs: whether it has inputs of its own, or per-example gradients alone.
        vocabulary: whether its columns are formed anew in every pass, some rows at a time.
    """

    rows: int
    columns: int
    T: int
    N: int
    R: int
    inputs: bool
    vocabulary: bool = False

    @classmethod
    def of(cls, source: Source, name: str) -> Sizes:
        """Those of a layer."""
        layer = source.layers[name]
        rows, columns = layer.shape
        T = source.positions(name)
        return cls(
            rows,
            columns,
            T,
            source.about_N,
            source.R,
            not layer.gradient_form,
            isinstance(layer, VocabularyLayer),
        )

    @property
    def dim(self) -> float:
        """Of the block."""
        return float(self.rows) * self.columns

    @property
    def gradients(self) -> float:
        """Numbers in the per-example gradients."""
        return self.N * self.R * self.dim

    @property
    def factors(self) -> float:
        """Numbers in inputs and output gradients."""
        return self.N * self.T * (self.columns + float(self.R) * self.rows)

    @property
    def forward(self) -> float:
        """Operations of the layer's forward pass."""
        return 2.0 * self.N * self.T * self.dim

    @property
    def formed(self) -> float:
        """Operations by which the per-example gradients are formed."""
        return self.R * self.forward

    @property
    def is_dense(self) -> bool:
        """Whether the block itself is held."""
        small = self.dim <= DENSE_DIM
        return small or self.dim**2 <= min(self.factors, self.gradients)

    @property
    def through_positions(self) -> bool:
        """Whether norms go through pairs of positions, products through inputs and gradients."""
        pairs = float(self.T) ** 2 * (self.rows + self.columns)
        return self.inputs and (self.T == 1 or pairs <= self.dim)


def of_layer(sizes: Sizes, candidates: int, dampings: int) -> float:
    """Operations to measure a layer.

    Args:
        sizes: of the layer.
        candidates: number of approximations.
        dampings: of the damped measures, 0 without them.
    """
    rows, columns = float(sizes.rows), float(sizes.columns)
    constant = SMALL + candidates * (1 + dampings) * OF_CANDIDATE
    if sizes.vocabulary:
        # in every one of some passes, output gradients and their products with the inputs
        passes = candidates * (2 + dampings * SOLVES)
        return constant + passes * sizes.formed
    # second moments of inputs and gradients, and gradients in an eigenbasis
    moments = sizes.N * sizes.T * (columns**2 + sizes.R * rows**2)
    eigen = EIGEN * (rows**3 + columns**3)
    if not sizes.inputs:
        moments = sizes.N * sizes.R * rows**2
    # half of the candidates have factors of their own
    building = candidates * (moments + sizes.formed + eigen) / 2
    if sizes.is_dense:
        measuring = _dense(sizes, candidates)
    else:
        measuring = _by_columns(sizes, candidates)
    damped = dampings * candidates * _damped(sizes)
    return constant + building + measuring + damped


def _dense(sizes: Sizes, candidates: int) -> float:
    """The block, and all eigenvalues of every difference."""
    block = sizes.formed + 2 * sizes.gradients * sizes.dim
    return block + candidates * _eigenvalues(sizes.dim)


def _eigenvalues(n: float) -> float:
    """All of them, without vectors."""
    return EIGEN / 3 * n**3


def _by_columns(sizes: Sizes, candidates: int) -> float:
    """The Gram matrix of the columns, inner products, and Lanczos runs."""
    rows, columns = sizes.rows, sizes.columns
    n = float(sizes.N * sizes.T)
    if sizes.through_positions:
        gram = 2 * n**2 * (columns + float(sizes.R) ** 2 * rows)
        inner = n * (columns**2 + sizes.R * rows**2)
    else:
        gram = 2 * sizes.N * sizes.R * sizes.gradients
        inner = sizes.gradients * (rows + columns)
    own = 2 * sizes.dim * (rows + columns)  # a product with an approximation
    run = LANCZOS * (product(sizes) + own)
    return gram + sizes.formed + candidates * (inner + run)


def product(sizes: Sizes) -> float:
    """One product with the exact block."""
    if sizes.is_dense:
        return 2 * sizes.dim**2
    if sizes.through_positions:
        return 2 * sizes.forward + 4 * sizes.N * sizes.T * float(sizes.R) * sizes.rows
    return 4 * sizes.gradients


def _damped(sizes: Sizes) -> float:
    """The damped inverses of a block and an approximation, and the norm of their difference."""
    if sizes.dim <= DENSE_DIM:
        return EIGEN * sizes.dim**3
    return (LANCZOS + 1) * SOLVES * product(sizes)


def of_comparison(
    source: Source, names: Iterable[str], candidates: int, dampings: int, R: int | None = None
) -> float:
    """Operations of a whole comparison.

    Args:
        source: the question.
        names: the layers to measure.
        candidates: number of approximations.
        dampings: of the damped measures, 0 without them.
        R: directions of another kind of Fisher; None for those of the question.
    """
    every = []
    for name in source.layers:
        sizes = Sizes.of(source, name)
        if R is not None:
            sizes = replace(sizes, R=R)
        every.append((name, sizes))
    forward = sum(sizes.forward for _, sizes in every)
    check = of_check(source)
    wanted = set(names)
    total = 0.0
    for name, sizes in every:
        total += check
        if name not in wanted:
            continue
        total += (1 + sizes.R) * sizes.forward
        if not sizes.inputs:  # gradients of single examples, through the whole model
            total += (1 + sizes.R) * forward
        total += of_layer(sizes, candidates, dampings)
    return total


def work_of(source: Source, candidates: int, dampings: int) -> dict[str, float]:
    """Operations to measure each layer, without the check."""
    return {name: of_layer(Sizes.of(source, name), candidates, dampings) for name in source.layers}


def of_check(source: Source) -> float:
    """Operations of the independent check of one layer."""
    every = [Sizes.of(source, name) for name in source.layers]
    derivative = DERIVATIVE * sum(sizes.forward for sizes in every)
    if any(sizes.vocabulary for sizes in every):  # all layers in one pass
        return derivative / len(every)
    return derivative


def told(
    source: Source, names: Sequence[str], candidates: int, dampings: int, processes: int = 1
) -> str | None:
    """One line on what takes longer than ten seconds, as "41 layers, largest 512 x 4608, R = 9,
    N = 64: about 7 min; fisher='mc' about 40 s"; None for what does not.

    Args:
        source: the question.
        names: the layers to measure.
        candidates: number of approximations.
        dampings: of the damped measures, 0 without them.
        processes: that share the work.
    """
    operations = of_comparison(source, names, candidates, dampings)
    if operations <= WORTH_TELLING * SLOWEST:  # no need to measure the speed
        return None
    speed = seconds_per_operation(source.dtype, source.device) / processes
    seconds = operations * speed
    if seconds <= WORTH_TELLING:
        return None
    largest = max((source.layers[name].shape for name in names), key=math.prod)
    line = (
        f"{len(names)} layers, largest {largest[0]} x {largest[1]}, R = {source.R}, "
        f"N = {source.about_N}: about {duration(seconds)}"
    )
    if not source.labels.expectation or source.R == 1:  # one sampled label costs as much
        return line
    sampled = of_comparison(source, names, candidates, dampings, R=1) * speed
    return f"{line}; fisher='mc' about {duration(sampled)}"


def seconds_per_operation(dtype: torch.dtype, device: torch.device) -> float:
    """By a quick product of two matrices: the fastest of three."""
    n = CALIBRATION
    x = torch.ones(n, n, dtype=dtype, device=device)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        (x @ x)[0, 0].item()  # which waits for the device
        taken.append(time.perf_counter() - started)
    return min(taken) / (2 * n**3)
