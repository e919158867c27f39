"""Run: the state of one compare, layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fisher_lab import errors as measures
from fisher_lab._ground.memory import peak_bytes
from fisher_lab._ground.progress import Progress
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation, Exact
from fisher_lab.approximations.exact import is_dense
from fisher_lab.diagnose.across import OFF_BLOCK, off_block
from fisher_lab.diagnose.asked import Matrices
from fisher_lab.diagnose.checking import Check
from fisher_lab.diagnose.standard_errors import Found, StandardErrors
from fisher_lab.errors import DampedPair, Measure, Measured, Total, absolute_damping
from fisher_lab.estimation.exact import exact_blocks
from fisher_lab.estimation.running import Running, sweep_all
from fisher_lab.matrices import FisherMatrix, LowRank, Streamed
from fisher_lab.results.comparison import ALL, Comparison, Cost, Row
from fisher_lab.statistics import LayerStats

STREAMED = "columns, read anew for every product"  # the route of layers whose columns do not fit into the memory


class DifferentRunError(ValueError):
    """The file to go on from holds another comparison."""


class Run:
    """The state of one compare: what was checked, measured and kept so far."""

    def __init__(
        self,
        source: Source,
        candidates: dict[str, Approximation | Matrices],
        wanted: list[Measure],
        dampings: tuple[float, ...],
        exact: str,
        standard_errors: bool,
    ) -> None:
        self.source, self.candidates, self.wanted, self.dampings, self.exact = (
            source,
            candidates,
            wanted,
            dampings,
            exact,
        )
        self.standard_errors = StandardErrors(wanted) if standard_errors else None
        self.rows: list[Row] = []
        self.between: list[Row] = []
        self.costs: list[Cost] = []
        self.quantities: list[dict[str, Any]] = []
        self.covariances: list[dict[str, Any]] = []  # of layers taken over from an earlier run
        self.settings: dict[str, Any] = {}
        self.done: set[str] = set()
        self.gradients: dict[str, Tensor] = {}
        self.blocks: dict[str, FisherMatrix] = {}
        self.streamed: set[str] = set()  # layers whose columns do not fit into the memory
        self.check = Check(source)

    # -- measuring -------------------------------------------------------------------------------------------------
    def groups(self) -> list[list[str]]:
        """Layers to measure together: one by one if the columns are kept, else as many as fit a third of the budget.

        A layer whose columns alone are more than the budget is measured alone, and its columns are read anew for every
        product.
        """
        groups: list[list[str]] = []
        room = 0.0
        for name in (name for name in self.source.layers if name not in self.done):
            rows, columns = self.source.layers[name].shape
            kept = min(float(rows * columns) ** 2, self.source.N * self.source.column_numbers(name))
            if (
                self.source.budget.for_block(kept * torch.finfo(self.source.dtype).bits // 8) > self.source.budget.total
                and self.exact == "captured"
            ):
                self.streamed.add(name)
            if name in self.streamed or self.source.fits_at_once() or self.source.fits_at_once([name]):
                groups.append([name])
                room = 0.0
                continue
            need = 8.0 * (len(self.candidates) * (rows**2 + columns**2 + 2 * rows * columns) + 3 * kept)
            if room < need:
                groups.append([])
                room = self.source.budget.for_group
            groups[-1].append(name)
            room -= need
        return groups

    def measure(self, names: list[str], bar: Progress) -> None:
        """Build the exact block and every approximation of some layers and measure them."""
        source = self.source
        kept = next(iter(source.sweep(names))) if source.fits_at_once() or source.fits_at_once(names) else {}
        for name in names:
            if name in kept:
                kept[name].hold(source.budget.for_gradients)
        running: dict[Any, Running] = {}
        for name in names:
            bar.say(f"building {name}")
            if name not in self.streamed and (name not in kept or is_dense(kept[name])):
                running[name, "exact"] = Running(Exact())
            for label, candidate in self._measurable(name).items():
                if isinstance(candidate, Approximation):
                    running[name, label] = Running(candidate)
        sweep_all(running, source)
        if self.exact == "func" and not self.blocks:
            self.blocks = exact_blocks(source.prepared, source.layers)
        for name in names:
            captured = self._captured(name, kept, running)
            checked = self.check.deviation(name, captured)
            block = self.blocks[name] if self.exact == "func" else captured
            self._check_scale(name, block)
            bar.advance()
            self._layer(name, block, checked, running, kept.get(name), bar)
            self.done.add(name)
            if name in kept:
                kept[name].release()

    def _check_scale(self, name: str, block: FisherMatrix) -> None:
        """Refuse blocks whose squares would overflow or vanish."""
        size, info = float(block.trace()), torch.finfo(self.source.dtype)
        if size != 0 and not math.sqrt(info.tiny) < size < math.sqrt(info.max):
            raise ValueError(
                f"The exact block of layer {name!r} has trace {size:.1e}, expected between "
                f"{math.sqrt(info.tiny):.0e} and {math.sqrt(info.max):.0e} in {self.source.dtype}; "
                "rescale the inputs or the loss, or use float64."
            )

    def _measurable(self, name: str) -> dict[str, Approximation | Matrices]:
        """The candidates, but for those that would hold the columns of a layer that do not fit into the memory."""
        if name not in self.streamed:
            return self.candidates
        room = self.source.budget.total / (
            2 * self.source.column_numbers(name) * torch.finfo(self.source.dtype).bits // 8
        )
        return {
            k: c for k, c in self.candidates.items()
            if not isinstance(c, Approximation) or min(c.keeps_examples, self.source.N) <= room
        }  # fmt: skip

    def _captured(self, name: str, kept: dict[str, LayerStats], running: dict[Any, Running]) -> FisherMatrix:
        if name in self.streamed:
            source = self.source
            one = torch.ones((), dtype=source.dtype, device=next(source.model.parameters()).device)
            return Streamed(partial(_pieces, source, name), source.N, source.layers[name].shape, one)
        if (name, "exact") not in running:
            return LowRank(kept[name])  # with all that was computed on the way
        block = running[name, "exact"].matrix
        assert block is not None
        return block

    def _layer(
        self,
        name: str,
        block: FisherMatrix,
        checked: float,
        running: dict[Any, Running],
        stats: LayerStats | None,
        bar: Progress,
    ) -> None:
        scale = self.source.scale
        exact = block.scaled(scale) if scale != 1.0 else block
        seconds = running[name, "exact"].seconds if (name, "exact") in running else None
        if isinstance(exact, LowRank):
            exact.stats.hold(self.source.budget.for_gradients)
        route = exact.stats.route if isinstance(exact, LowRank) else type(exact).__name__.lower()
        about = {"route": route, "bytes": exact.nbytes, "seconds": seconds, "checked": checked}
        measurable = self._measurable(name)
        if name in self.streamed:
            missing = [label for label in self.candidates if label not in measurable]
            about |= {"route": STREAMED, "left_out": missing}
            reason = "needs more columns than fit into the memory"
            self.settings["left_out"] |= {f"{label} of layer {name!r}": reason for label in missing}
        self.settings["layers"][name].update(about)
        matrices: dict[str, FisherMatrix] = {}
        for label, candidate in measurable.items():
            if isinstance(candidate, Approximation):
                state = running.pop((name, label))
                _check_matrix(name, label, state.matrix, exact.shape)
                assert state.matrix is not None
                matrices[label] = state.matrix.scaled(scale) if scale != 1.0 else state.matrix
                self.costs.append(Cost(name, label, state.seconds, matrices[label].nbytes))
            else:
                matrices[label] = candidate[name].to(exact.device, exact.dtype)
                self.costs.append(Cost(name, label, 0.0, candidate[name].nbytes))
        undamped = [m for m in self.wanted if not m.damped]
        pairs = measures.pairs(exact, matrices)
        if any(m.reads("top_difference") for m in undamped):
            bar.say(f"{name}: spectral norms")
            measures.advance(pairs.values(), self.source.budget.for_lanczos)
        stderr: Found = {}
        if self.standard_errors is not None and stats is not None:
            bar.say(f"{name}: standard errors")
            scaled = stats if scale == 1.0 else stats.like(stats.a, stats.g * scale**0.5)
            stderr = self.standard_errors.layer(name, scaled, exact, pairs, self.candidates)
        for label, pair in pairs.items():
            bar.say(f"{name}: {label}")
            self._record(name, label, None, pair, undamped, checked, stderr)
            bar.advance()
        damped = [m for m in self.wanted if m.damped]
        if damped and float(exact.trace()) <= 0:
            self.settings["layers"][name]["damped"] = "left out: F = 0, no damping is relative to it"
        elif damped and name in self.streamed:
            self.settings["layers"][name]["damped"] = "left out: the columns do not fit into the memory"
            self.settings["left_out"][f"damped errors of layer {name!r}"] = "the columns do not fit into the memory"
        elif damped:
            for damping in self.dampings:
                bar.say(f"{name}: damping {damping:g}")
                inverse = exact.powered(-1.0, absolute_damping(exact, damping))
                for label, matrix in matrices.items():
                    damped_pair = DampedPair(exact, matrix, self._gradient(name), damping, inverse)
                    self._record(name, label, damping, damped_pair, damped, checked)

    def _record(
        self,
        layer: str,
        label: str,
        damping: float | None,
        pair: Any,
        wanted: list[Measure],
        checked: float | None,
        stderr: Found | None = None,
    ) -> None:
        """Rows of one pair, and the plain numbers behind them (so that the matrices can go)."""
        for m in wanted:
            value, noise = m.formula(pair)
            if not value == value:
                raise ValueError(
                    f"{m.name} of {label} on layer {layer!r} is NaN, expected a number; check the approximation, "
                    "or raise the damping."
                )
            error = (stderr or {}).get((label, m.name))
            self.rows.append(Row(layer, label, m.name, value, noise, damping, checked, self.source.fisher, error))
        numbers = {k: v for k, v in vars(pair).items() if k[0] != "_" and isinstance(v, float | Measured)}
        self.quantities.append({"layer": layer, "approximation": label, "damping": damping, **numbers})

    def _gradient(self, name: str) -> Tensor:
        """Gradient of the mean loss over W: of the data's labels, or of labels sampled from the model."""
        if not self.gradients:
            labelled = self.source.batches.first().y is not None
            self.settings["gradient"] = "of the data's labels" if labelled else "of labels sampled from the model"
            self.gradients = self.source.gradients()
        return self.gradients[name]

    def across(self) -> None:
        """Entries between layers."""
        value, noise = off_block(self.source)
        self.between = [Row(ALL, "Exact", OFF_BLOCK, value, noise, None, self._worst_check(), self.source.fisher)]

    # -- the result ------------------------------------------------------------------------------------------------
    def take_over(self, earlier: Comparison, path: Path) -> None:
        """Keep the layers that an earlier, interrupted run of the same comparison finished."""
        keys = ("fingerprint", "fisher", "likelihood", "seed", "dtype", "candidates", "errors", "dampings", "exact")
        every = (*keys, "versions", "standard_errors")
        differing = [key for key in every if earlier.settings.get(key) != self.settings[key]]
        if differing:
            raise DifferentRunError(
                f"{path} holds another comparison ({', '.join(differing)} differ), expected the same run; "
                "choose another file or delete it."
            )
        # a layer is finished once its last approximation has its last error
        last = (list(self.candidates)[-1], self.wanted[-1].name)
        for row in earlier.rows:
            if row.layer in self.source.layers and (row.approximation, row.error) == last:
                self.done.add(row.layer)
        self.rows = [row for row in earlier.rows if row.layer in self.done]
        self.costs = [cost for cost in earlier.costs if cost.layer in self.done]
        self.quantities = [q for q in earlier.quantities if q["layer"] in self.done]
        self.covariances = [c for c in earlier.covariances if c["layer"] in self.done]
        self.settings["left_out"] |= earlier.settings["left_out"]
        for name in self.done:
            self.settings["layers"][name] = earlier.settings["layers"][name]

    def comparison(self, started: float, complete: bool) -> Comparison:
        """The result so far; over all layers once all are measured."""
        rows = list(self.rows)
        if complete and len(self.source.layers) > 1:
            rows += self._over_layers()
        rows += self.between
        order = {name: i for i, name in enumerate((*self.source.layers, ALL))}
        rows.sort(key=lambda row: order[row.layer])
        spent = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(), "complete": complete}
        return Comparison(
            tuple(rows), tuple(self.costs), {**self.settings, **spent}, tuple(self.quantities), self._covariances()
        )

    def _covariances(self) -> tuple[dict[str, Any], ...]:
        return (*self.covariances, *(self.standard_errors.covariances if self.standard_errors else ()))

    def _over_layers(self) -> list[Row]:
        """Rows of the block-diagonal matrix of all layers."""
        rows, checked = [], self._worst_check()
        layers = self.settings["layers"].values()
        left_out = {label for about in layers for label in about.get("left_out", ())}
        streamed = any(about["route"] == STREAMED for about in layers)
        for damping in dict.fromkeys(row.damping for row in self.rows):
            if damping is not None and streamed:
                continue  # some layers have no damped errors
            totals: dict[str, Total] = {}
            for label in self.candidates:
                found = [q for q in self.quantities if q["approximation"] == label and q["damping"] == damping]
                if found and label not in left_out:
                    totals[label] = Total([SimpleNamespace(**_thawed(q)) for q in found])
            stderr = {}
            if self.standard_errors is not None and damping is None:
                stderr = self.standard_errors.total([*self.source.layers], totals)
            for label, total in totals.items():
                for m in (m for m in self.wanted if m.layered and m.damped == (damping is not None)):
                    value, noise = m.formula(total)
                    error = stderr.get((label, m.name))
                    rows.append(Row(ALL, label, m.name, value, noise, damping, checked, self.source.fisher, error))
        return rows

    def _worst_check(self) -> float | None:
        found = [row.checked for row in self.rows if row.checked is not None]
        return max(found) if found else None


def _pieces(source: Source, name: str) -> Iterator[LayerStats]:
    """One pass over the columns of a layer."""
    for stats in source.sweep([name]):
        yield stats[name]


def _check_matrix(layer: str, label: str, matrix: Any, shape: tuple[int, int]) -> None:
    """Refuse what an approximation assembled if it is no matrix over the layer's weight."""
    if not isinstance(matrix, FisherMatrix) or tuple(matrix.shape) != tuple(shape):
        found = f"a matrix over {tuple(matrix.shape)}" if isinstance(matrix, FisherMatrix) else type(matrix).__name__
        raise ValueError(
            f"{label} assembled {found} on layer {layer!r}, expected a FisherMatrix over {tuple(shape)}; "
            "check its assemble."
        )


def _thawed(quantities: dict[str, Any]) -> dict[str, Any]:
    return {k: Measured(*v) if isinstance(v, list | tuple) else v for k, v in quantities.items()}
