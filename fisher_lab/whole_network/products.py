"""The Fisher of all weights of a network together, from the columns of all layers.

With P^l_rn the per-example gradient of layer l for direction r and example n, V = {l: V_l} and

    s_rn = sum_l <P^l_rn, V_l>,

the products are (F V)_l = 1/N sum_rn s_rn P^l_rn and V^T F V = 1/N sum_rn s_rn^2: layers are summed
before anything is squared, so that what couples them is there, at the cost of the blocks alone. The
Gram matrix of the columns of the network is the sum of the layers' Gram matrices. Nothing of size
d x d is formed but where d is small. The dense twins stand in tests/network/test_fisher.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.arguments import check_kind, number, shown
from fisher_lab._ground.lanczos import lanczos, start_vector
from fisher_lab._ground.memory import Budget, readable
from fisher_lab._ground.text import did_you_mean
from fisher_lab.statistics import LayerStats, contractions
from fisher_lab.statistics.contractions import Columns

Arrays = dict[str, Tensor]  # one array of the shape of W for every layer


class Products:
    """F over the weights of all layers, `{layer: W [d_out, d_in]}`, as products.

    For example, of `nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))`: `shapes` is
    `{"0": (3, 5), "2": (2, 4)}` (the bias is the last column of W), `dim` 23, and `F @ V` takes and
    gives `{"0": [3, 5], "2": [2, 4]}`.

    Args:
        pieces: begins a pass over the data; gives the columns of some examples at a time.
        shapes: of W by layer.
        N: examples in a pass.
        R: directions per example.
        gradient: g, of the loss over every W.
        budget: the memory.
        kept: whether the columns are in memory, so that a pass costs no capture.

    Attributes:
        shapes: of W by layer.
        N: examples.
        R: directions per example.
        gradient: g `{layer: [d_out, d_in]}` of the loss at the data's labels, or at labels drawn
            from the model.
    """

    def __init__(
        self,
        pieces: Callable[[], Iterator[Columns]],
        shapes: Mapping[str, tuple[int, int]],
        N: int,
        R: int,
        gradient: Arrays,
        budget: Budget,
        kept: bool,
    ) -> None:
        self.pieces = pieces
        self.shapes = dict(shapes)
        self.N = N
        self.R = R
        self.gradient = dict(gradient)
        self.budget = budget
        self.kept = kept

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({len(self.shapes)} layers, d={self.dim}, N={self.N}, R={self.R})"

    # -- sizes -------------------------------------------------------------------------------------
    @property
    def dim(self) -> int:
        """Number of parameters d of all layers."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def _like(self) -> Tensor:
        """A tensor of the type and on the device of the numbers."""
        return next(iter(self.gradient.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._like.device

    # -- between {layer: W} and one vector ---------------------------------------------------------
    def flatten(self, V: Mapping[str, Tensor]) -> Tensor:
        """`{layer: [..., d_out, d_in]}` as one array `[..., d]`, layer after layer, row-major.

        Raises:
            ValueError: where a layer is missing or has another shape.
            TypeError: for anything but a mapping.
        """
        check_kind("V", V, Mapping, "{layer: array of the shape of its W}")
        parts = []
        for name, shape in self.shapes.items():
            part = V.get(name)
            if not isinstance(part, Tensor) or tuple(part.shape[-2:]) != shape:
                got = "nothing"
                if isinstance(part, Tensor):
                    got = f"shape {tuple(part.shape)}"
                raise ValueError(
                    f"Got {got} for layer {name!r}, expected [..., {shape[0]}, {shape[1]}]; give "
                    "an array of the shape of W for every layer (bias as last column)."
                )
            parts.append(part.to(self._like).flatten(-2))
        return torch.cat(parts, -1)

    def unflatten(self, v: Tensor) -> Arrays:
        """One array `[..., d]` as `{layer: [..., d_out, d_in]}`.

        Raises:
            ValueError: for an array of another size.
        """
        self._check_vectors(v)
        arrays = {}
        start = 0
        for name, (rows, columns) in self.shapes.items():
            end = start + rows * columns
            arrays[name] = v[..., start:end].unflatten(-1, (rows, columns))
            start = end
        return arrays

    def _check_vectors(self, v: Any) -> None:
        """Refuse what is no array `[..., d]`."""
        check_kind("v", v, Tensor, f"a tensor [..., {self.dim}]")
        if v.ndim == 0 or v.shape[-1] != self.dim:
            raise ValueError(f"Got shape {tuple(v.shape)}, expected [..., {self.dim}].")

    # -- products ----------------------------------------------------------------------------------
    def __matmul__(self, V: Mapping[str, Tensor]) -> Arrays:
        """F V for V `{layer: [..., d_out, d_in]}`, in its shape."""
        return self.unflatten(self.apply(self.flatten(V)))

    def apply(self, v: Tensor) -> Tensor:
        """F times vectors `[..., d]`.

        Raises:
            ValueError: for vectors of another size.
        """
        self._check_vectors(v)
        V = self.unflatten(v)
        total = torch.zeros_like(v)
        for columns in self.pieces():
            s = self.project(columns, V)
            total += self.combine(columns, s)
        return total / self.N

    def project(self, columns: Columns, V: Mapping[str, Tensor]) -> Tensor:
        """s_rn = sum_l <P^l_rn, V_l> `[..., R, n]` of some examples."""
        names = list(self.shapes)
        total = contractions.project(columns[names[0]], V[names[0]])
        for name in names[1:]:
            total = total + contractions.project(columns[name], V[name])
        return total

    def combine(self, columns: Columns, s: Tensor) -> Tensor:
        """sum_rn s_rn P_rn `[..., d]` of some examples for s `[..., R, n]`."""
        parts = [contractions.combine(columns[name], s).flatten(-2) for name in self.shapes]
        return torch.cat(parts, -1)

    def quadratic(self, V: Mapping[str, Tensor]) -> Tensor:
        """V^T F V `[...]`, never negative."""
        v = self.flatten(V)
        arrays = self.unflatten(v)
        total = v.new_zeros(v.shape[:-1])
        for columns in self.pieces():
            s = self.project(columns, arrays)
            total = total + s.square().sum((-2, -1))
        return total / self.N

    # -- norms -------------------------------------------------------------------------------------
    def trace(self) -> Tensor:
        """tr F, a scalar."""
        return self._trace

    @cached_property
    def _trace(self) -> Tensor:
        total = self._like.new_zeros(())
        for columns in self.pieces():
            for stats in columns.values():
                # a mean over the examples of the piece
                total = total + contractions.squares(stats).sum() * (stats.N / self.N)
        return total

    def block_norms(self) -> Tensor:
        """Frobenius norms of the blocks between layers `[L, L]`, in the order of `shapes`.

        |F_lm|_F^2 = 1/N^2 <K_l, K_m> with the layers' Gram matrices K.
        """
        return self._block_norms

    @cached_property
    def _block_norms(self) -> Tensor:
        pieces = self._all_pieces("The norms of blocks between layers need")
        squares = contractions.gram_products(pieces)
        # products of PSD matrices are not negative, but rounding may say so
        return squares.clamp(min=0).sqrt() / self.N

    def frobenius_norm(self) -> Tensor:
        """|F|_F, a scalar."""
        return self.block_norms().norm()

    def off_block(self) -> Tensor:
        """Share of |F|_F outside the blocks of the layers, a scalar in [0, 1)."""
        norms = self.block_norms()
        outside = norms - torch.diag(norms.diagonal())
        return outside.norm() / norms.norm()

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue, a scalar, by the Lanczos method to 1e-6."""
        return torch.tensor(self._top, dtype=self.dtype, device=self.device)

    @cached_property
    def _top(self) -> float:
        # every damping's condition number asks for it
        found = lanczos(self.apply, start_vector(self), tolerance=1e-6)
        return found.high

    def condition(self, shift: float) -> float:
        """An upper bound of the condition number of F + shift I.

        Raises:
            ValueError: if the shift is no positive number.
        """
        if not 0 < number(shift) < math.inf:
            raise ValueError(f"Got shift={shown(shift)}, expected a finite number above 0.")
        return 1 + float(self.spectral_norm()) / number(shift)

    def eigenpairs(self, k: int) -> tuple[Tensor, Arrays]:
        """The k largest eigenvalues `[k]`, descending, and their eigenvectors `{layer: [k, d_out,
        d_in]}`.

        Raises:
            ValueError: if k is not between 1 and d - 1.
        """
        if not isinstance(k, int) or not 0 < k < self.dim:
            raise ValueError(f"Got k={k!r}, expected a number from 1 to d - 1 = {self.dim - 1}.")
        from scipy.sparse.linalg import LinearOperator, eigsh

        def product(x: Any) -> Any:
            v = torch.as_tensor(x, dtype=self.dtype, device=self.device).flatten()
            return self.apply(v).cpu().numpy()

        start = start_vector(self).cpu().numpy()
        operator = LinearOperator((self.dim, self.dim), matvec=product, dtype=start.dtype)
        values, vectors = eigsh(operator, k, which="LA", v0=start)
        order = values.argsort()[::-1].copy()
        V = torch.as_tensor(vectors.T[order].copy(), dtype=self.dtype, device=self.device)
        found = torch.as_tensor(values[order].copy(), dtype=self.dtype, device=self.device)
        return found, self.unflatten(V)

    # -- dense -------------------------------------------------------------------------------------
    def dense(self) -> Tensor:
        """F `[d, d]`, layer after layer.

        Raises:
            ValueError: if it does not fit the memory.
        """
        self._check_bytes(self.dim**2, "The dense Fisher of the network needs")
        total = self._like.new_zeros(self.dim, self.dim)
        for columns in self.pieces():
            for some in self._examples(columns):
                U = [_rows(columns[name].examples(some)) for name in self.shapes]
                every = torch.cat(U, 1)  # [n R, d]
                total.addmm_(every.T, every)
        return total / self.N

    def block(self, a: str, b: str) -> Tensor:
        """The block of F between two layers `[d_a, d_b]`.

        Raises:
            ValueError: if a layer has another name, or the block does not fit the memory.
        """
        for name in (a, b):
            if not isinstance(name, str) or name not in self.shapes:
                known = ", ".join(self.shapes)
                guess = did_you_mean(name, self.shapes) if isinstance(name, str) else ""
                raise ValueError(f"Got layer {shown(name)}{guess}, expected one of: {known}.")
        d_a = math.prod(self.shapes[a])
        d_b = math.prod(self.shapes[b])
        self._check_bytes(d_a * d_b, f"The block between {a!r} and {b!r} needs")
        total = self._like.new_zeros(d_a, d_b)
        for columns in self.pieces():
            for some in self._examples(columns):
                U = _rows(columns[a].examples(some))
                V = U
                if b != a:
                    V = _rows(columns[b].examples(some))
                total.addmm_(U.T, V)
        return total / self.N

    def _examples(self, columns: Columns) -> Iterator[slice]:
        """Examples of a piece whose gradients, of all parameters, fit their share."""
        n = next(iter(columns.values())).N
        bytes_each = self.R * self.dim * self._like.element_size()
        step = max(1, int(self.budget.for_gradients // bytes_each))
        for start in range(0, n, step):
            yield slice(start, min(n, start + step))

    def _check_bytes(self, numbers: int, what: str) -> None:
        need = numbers * self._like.element_size()
        if need > self.budget.total:
            raise ValueError(
                f"{what} {readable(need)}, expected at most {readable(self.budget.total)}; use "
                "products with it, fewer layers=[...], or raise memory=."
            )

    def _all_pieces(self, what: str) -> list[Columns]:
        """The columns of all examples, where they are in memory."""
        if not self.kept:
            raise ValueError(
                f"{what} the columns of all layers at once, which do not fit into "
                f'{readable(self.budget.total)}; use fewer examples, fisher="mc", or raise memory=.'
            )
        return list(self.pieces())


def _rows(stats: LayerStats) -> Tensor:
    """The columns of some examples as rows `[n R, d]`, each an example's gradient in a
    direction.
    """
    P = stats.gradients()
    return P.flatten(2).flatten(0, 1)
