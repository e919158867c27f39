"""What the processes of one training exchange: the only file of the optimizers that knows several.

Every rank sees its own part of a global batch, and the numbers are to be those of one process that
sees all of it. What has to be summed depends on the statistics:

    per_example    n m of every layer's moments m over n examples, after the moments
    mean           the summed gradient at sampled labels, before the moments: the outer product of
                   the global mean is not the mean of the ranks' outer products
    gradient       the number of examples: DistributedDataParallel's gradients are global already

All state is the same on every rank, bit for bit. Before tensors are summed, the ranks tell each
other on the host what they have (how many examples, which layers), so that they agree on what
follows, and end together where one of them has raised. What is summed goes in one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_lab._ground.linalg import kept
from fisher_lab._ground.ranks import ALONE, Ranks, dealt, ranks_of
from fisher_lab._passes.labels import DRAWN_AT_ONCE
from fisher_lab.approximations.moments import Means
from fisher_lab.estimation.average import Mean
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.optim.layer_state import Contribution
from fisher_lab.optim.observation import Observed, of_batch_mean, of_gradient
from fisher_lab.optim.options import Refreshing

Shape = tuple[int, ...]

# of a refresh, roughly, on any machine: only where both ways take about as long they are wrong
SECONDS_PER_CUBE = 1e-9  # a factorisation and an inverse of n x n numbers takes n^3 of these
SECONDS_PER_NUMBER = 8e-9  # that is sent
LATENCY = 1e-3  # of the exchange with one rank


class Place(NamedTuple):
    """Where the outputs of one forward pass stand in the global batch.

    Attributes:
        rank: of this process.
        shapes: of every rank's outputs `(n, *output)`; None for one that has no more data.
    """

    rank: int
    shapes: list[Shape | None]

    @property
    def sizes(self) -> list[int]:
        """Examples of every rank."""
        return [0 if shape is None else shape[0] for shape in self.shapes]

    @property
    def examples(self) -> int:
        """Examples of all ranks."""
        return sum(self.sizes)

    @property
    def before(self) -> int:
        """Examples of the ranks before this one."""
        return sum(self.sizes[: self.rank])


@dataclass
class Traffic:
    """What was summed or sent between the processes so far.

    Attributes:
        calls: collectives on tensors.
        nbytes: of their buffers on one rank.
    """

    calls: int = 0
    nbytes: int = 0


class Reductions:
    """The exchange of a training in one process: there is none, and nothing is copied."""

    ranks: Ranks = ALONE

    def places(self, shapes: Callable[[], list[Shape]], equal: bool) -> list[Place]:
        """The forward passes of a window.

        Args:
            shapes: of the outputs of each; raises where the window cannot be used.
            equal: whether all ranks must have as many examples, as for a step they must.
        """
        return [Place(0, [shape]) for shape in shapes()]

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of this rank, None for one that comes where only other ranks have any."""
        yield from batches

    def sample(
        self, likelihood: Likelihood, z: Tensor, generator: torch.Generator | None, place: Place
    ) -> Tensor:
        """A label for each of these outputs, as one process would draw it."""
        return likelihood.sample(z, generator)

    def batch_means(
        self, found: dict[str, Observed], layers: Mapping[str, Layer], place: Place
    ) -> dict[str, Observed]:
        """The batch-mean gradient of every layer as one example, times sqrt(N)."""
        means = {}
        for name, observed in found.items():
            means[name] = observed._replace(stats=of_batch_mean(observed.stats))
        return means

    def contributions(
        self, found: dict[str, Contribution], empty: Callable[[str], Contribution]
    ) -> dict[str, Contribution]:
        """What one forward pass gives to every layer.

        Args:
            found: of this rank's examples.
            empty: what a layer gives that was not used.
        """
        return found

    def totals(
        self, found: dict[str, dict[str, Tensor]], empty: Callable[[str], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Named sums of layers, of all ranks' examples.

        Args:
            found: of this rank's examples; a layer or a sum that it has nothing of is left out.
            empty: all sums of a layer over no example.
        """
        return found

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return x

    def all_ok(self, ok: Tensor) -> Tensor:
        """Whether something, a 0-d bool, holds on every rank."""
        return ok

    def owners(self, shapes: Mapping[str, Shape], asked: Refreshing | None) -> dict[str, int]:
        """The rank that factorises the matrices of each layer; empty where every rank does all.

        Args:
            shapes: of every layer's W.
            asked: by the user; None to choose what takes less time.
        """
        return {}

    def exchanged(self, own: dict[str, Any]) -> dict[str, Any]:
        """Plain containers of tensors of all ranks, by name."""
        return own

    def check_alike(self, parameters: Iterable[Tensor], step: int) -> None:
        """Refuse to go on where the ranks' parameters have parted; reads one number of each."""

    def share_buffers(self, module: nn.Module) -> None:
        """Give a module the buffers of rank 0 in place; BatchNorm's differ between ranks."""


ONE_PROCESS = Reductions()


class Several(Reductions):
    """The exchange of a training in several processes.

    Args:
        ranks: the processes.
        device: where the parameters are.
        dtype_of: precision of a layer's statistics.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, dtype_of: Callable[[Layer], torch.dtype]
    ) -> None:
        self.ranks = ranks
        self.device = device
        self.dtype_of = dtype_of
        self.traffic = Traffic()

    # -- what is agreed on the hosts ---------------------------------------------------------------
    def places(self, shapes: Callable[[], list[Shape]], equal: bool) -> list[Place]:
        """The forward passes of a window, of which every rank must have as many.

        Raises:
            ValueError: for windows that do not fit together, on every rank.
        """
        every = self.ranks.gathered(shapes)
        for rank, theirs in enumerate(every):
            if equal and len(theirs) != len(every[0]):
                raise ValueError(
                    f"Rank {rank} observed {len(theirs)} forward passes and rank 0 "
                    f"{len(every[0])}, expected as many on every rank."
                )
        passes = max(map(len, every))
        found = []
        for index in range(passes):
            of_rank = [theirs[index] if index < len(theirs) else None for theirs in every]
            place = Place(self.ranks.own, of_rank)
            if equal:
                _check_equal(place.sizes)
            found.append(place)
        return found

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """As many batches as the rank with most of them has."""
        own = iter(batches)
        while True:
            batch = None

            def more() -> bool:
                nonlocal batch
                batch = next(own, None)
                return batch is not None

            if not any(self.ranks.gathered(more)):
                return
            yield batch

    # -- labels of the global batch ----------------------------------------------------------------
    def sample(
        self, likelihood: Likelihood, z: Tensor, generator: torch.Generator | None, place: Place
    ) -> Tensor:
        """The labels that one process would draw for these examples of the global batch.

        Every rank draws for all of it, so that the random numbers are those of one process. Where
        the outputs of all are too many for that, each rank draws from a seed of its own.
        """
        n = len(z)
        shapes = [shape for shape in place.shapes if shape is not None]
        alike = len({shape[1:] for shape in shapes}) == 1
        numbers = sum(map(math.prod, shapes))
        if alike and numbers <= DRAWN_AT_ONCE:
            whole = z.new_zeros(place.examples, *shapes[0][1:])
            own = slice(place.before, place.before + n)
            whole[own] = z
            return likelihood.sample(self.summed(whole), generator)[own]
        device = z.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        apart = torch.Generator(device).manual_seed(int(seed) + self.ranks.own)
        return likelihood.sample(z, apart)

    # -- statistics --------------------------------------------------------------------------------
    def batch_means(
        self, found: dict[str, Observed], layers: Mapping[str, Layer], place: Place
    ) -> dict[str, Observed]:
        """The gradients of all examples are summed before anything is squared."""

        def counts() -> dict[str, int]:
            return {name: observed.stats.N for name, observed in found.items()}

        every = self.ranks.gathered(counts)
        buffer = Buffer(self)
        rows = {}
        for name, layer in layers.items():
            rows[name] = sum(counts.get(name, 0) for counts in every)
            if not rows[name]:
                continue
            if name in found:
                stats = found[name].stats
                (mean,) = of_batch_mean(stats).gradients()[0]
                W = mean.flatten(0, 1) * math.sqrt(stats.N)
                failed = (~found[name].ok).to(W.dtype)
            else:
                p = next(iter(layer.parameters.values()))
                W = p.detach().new_zeros(layer.shape, dtype=self.dtype_of(layer))
                failed = W.new_zeros(())
            buffer.add((name, "W"), W)
            buffer.add((name, "failed"), failed)
        sums = buffer.summed()
        means = {}
        for name, layer in layers.items():
            if not rows[name]:
                continue
            ok = sums[name, "failed"] == 0
            W = kept(ok, sums[name, "W"]) / math.sqrt(rows[name])
            stats = of_gradient(W, layer.groups, layer.kernel, layer.bias)
            means[name] = Observed(stats, ok, place.examples)
        return means

    def contributions(
        self, found: dict[str, Contribution], empty: Callable[[str], Contribution]
    ) -> dict[str, Contribution]:
        """Plain means are summed, times their numbers of examples; other moments are exchanged and
        mixed in the order of the ranks.
        """
        every = self.ranks.gathered(lambda: _travelling(found))
        buffer = Buffer(self)
        plain: dict[str, Contribution] = {}
        together: dict[str, Contribution] = {}
        for name in _union(every):
            if any(theirs.get(name) is not None for theirs in every):
                device = next(iter(found.values())).ok.device if found else torch.device("cpu")
                together[name] = _mixed([theirs.get(name) for theirs in every], device)
                continue
            plain[name] = found[name] if name in found else empty(name)
            together[name] = plain[name]  # keeps its place
            n = plain[name].examples
            buffer.add((name, "examples"), n)
            buffer.add((name, "failed"), _failed(plain[name], used=name in found))
            for key, m in plain[name].moments.tensors().items():
                buffer.add((name, "moments", key), m * n.to(m.dtype))
        sums = buffer.summed()
        for name, own in plain.items():
            n = sums[name, "examples"]
            ok = sums[name, "failed"] == 0
            means = {}
            for key in own.moments.tensors():
                means[key] = sums[name, "moments", key] / n.clamp(min=1)
            moments = own.moments.with_tensors(means).masked(ok)
            together[name] = Contribution(moments, n * ok, ok)
        return together

    # -- sums --------------------------------------------------------------------------------------
    def totals(
        self, found: dict[str, dict[str, Tensor]], empty: Callable[[str], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """What no rank has is left out."""
        every = self.ranks.gathered(lambda: {name: list(sums) for name, sums in found.items()})
        buffer = Buffer(self)
        for name in _union(every):
            nothing = empty(name)
            of_layer = found.get(name, {})
            for key in nothing:
                if any(key in theirs.get(name, ()) for theirs in every):
                    buffer.add((name, key), of_layer.get(key, nothing[key]))
        together: dict[str, dict[str, Tensor]] = {}
        for (name, key), x in buffer.summed().items():
            together.setdefault(name, {})[key] = x
        return together

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        self.traffic.calls += 1
        self.traffic.nbytes += x.numel() * x.element_size()
        return self.ranks.summed(x)

    def all_ok(self, ok: Tensor) -> Tensor:
        """Whether ok on every rank: no failure is counted anywhere."""
        failed = (~ok).to(torch.float32)
        return self.summed(failed) == 0

    # -- inverses ----------------------------------------------------------------------------------
    def owners(self, shapes: Mapping[str, Shape], asked: Refreshing | None) -> dict[str, int]:
        """Dealt by cost, where that was asked for or saves more than the exchange takes."""
        cubes = {}
        numbers = 0
        for name, (rows, columns) in shapes.items():
            cubes[name] = float(rows**3 + columns**3)
            numbers += 2 * (rows**2 + columns**2)  # of the matrix and its inverse
        share = 1 - 1 / self.ranks.count
        saved = share * sum(cubes.values()) * SECONDS_PER_CUBE
        spent = self.ranks.count * LATENCY + numbers * SECONDS_PER_NUMBER
        if asked is None:
            asked = "sharded" if saved > spent else "replicated"
        found = {}
        if asked == "sharded":
            for rank, names in enumerate(dealt(cubes, self.ranks.count)):
                found.update(dict.fromkeys(names, rank))
        return found

    def exchanged(self, own: dict[str, Any]) -> dict[str, Any]:
        """One buffer of each rank and precision; all ranks, the owner too, go on with what came out
        of it, so that the numbers lie in memory alike.
        """
        tensors: list[Tensor] = []
        skeleton = _taken_apart(own, tensors)
        about = [(x.shape, x.dtype) for x in tensors]
        every = self.ranks.gathered(lambda: (skeleton, about))
        found: dict[str, Any] = {}
        for rank, (bones, parts) in enumerate(every):
            here = tensors if rank == self.ranks.own else None
            received = self._broadcast(rank, parts, here)
            found.update(_put_together(bones, received))
        return found

    def _broadcast(self, rank: int, parts: Sequence[Any], own: list[Tensor] | None) -> list[Tensor]:
        """Tensors of one rank, on all.

        Args:
            rank: whose they are.
            parts: their shapes and precisions.
            own: themselves, on that rank.
        """
        found: list[Any] = [None] * len(parts)
        places: dict[torch.dtype, list[int]] = {}
        for place, (_, dtype) in enumerate(parts):
            places.setdefault(dtype, []).append(place)
        for dtype, members in places.items():
            sizes = [math.prod(parts[place][0]) for place in members]
            if own is None:
                flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            else:
                flat = torch.cat([own[place].reshape(-1) for place in members])
            self.traffic.calls += 1
            self.traffic.nbytes += flat.numel() * flat.element_size()
            source = torch.distributed.get_global_rank(self.ranks.group, rank)
            torch.distributed.broadcast(flat, source, group=self.ranks.group_of(flat))
            for place, piece in zip(members, flat.split(sizes), strict=True):
                found[place] = piece.view(parts[place][0])
        return found

    def check_alike(self, parameters: Iterable[Tensor], step: int) -> None:
        """One sum of every parameter tells.

        Raises:
            ValueError: on every rank.
        """
        sums = torch.stack([p.detach().sum(dtype=torch.float32) for p in parameters])
        every = self.ranks.gathered(lambda: repr(sums.tolist()))  # NaN is NaN
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                raise ValueError(
                    f"Rank {rank} has other parameters than rank 0 in step {step}, expected the "
                    "same on every rank; wrap the model in DistributedDataParallel."
                )

    def share_buffers(self, module: nn.Module) -> None:
        """Those of rank 0."""
        buffers = list(module.buffers())
        first = self.ranks.from_first(lambda: [b.cpu() for b in buffers])
        for own, theirs in zip(buffers, first, strict=True):
            own.copy_(theirs)


@dataclass
class Buffer:
    """Tensors that are summed over the ranks in one go, of each precision and device.

    Args:
        reductions: which sum.
    """

    reductions: Several
    parts: dict[Any, Tensor] = field(default_factory=dict)

    def add(self, key: Any, x: Tensor) -> None:
        """One more."""
        self.parts[key] = x

    def summed(self) -> dict[Any, Tensor]:
        """The sums over the ranks, by key."""
        kinds: dict[Any, list[Any]] = {}
        for key, x in self.parts.items():
            kinds.setdefault((x.dtype, x.device), []).append(key)
        found: dict[Any, Tensor] = {}
        for keys in kinds.values():
            xs = [self.parts[key] for key in keys]
            flat = torch.cat([x.reshape(-1) for x in xs])
            pieces = self.reductions.summed(flat).split([x.numel() for x in xs])
            for key, x, piece in zip(keys, xs, pieces, strict=True):
                found[key] = piece.view(x.shape)
        return found


def reductions_of(device: torch.device, dtype_of: Callable[[Layer], torch.dtype]) -> Reductions:
    """The exchange of the processes that train together: those of the default group.

    Args:
        device: where the parameters are.
        dtype_of: precision of a layer's statistics.
    """
    ranks = ranks_of(patient=False)
    if ranks.alone:
        return ONE_PROCESS
    return Several(ranks, device, dtype_of)


class _Bone(NamedTuple):
    """The place of a tensor in containers that were taken apart."""

    place: int


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """Plain containers with the places of their tensors, which are added to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Bone(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _taken_apart(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_taken_apart(item, tensors) for item in value]
    return value


def _put_together(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `_taken_apart`."""
    if isinstance(value, _Bone):
        return tensors[value.place]
    if isinstance(value, dict):
        return {key: _put_together(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_put_together(item, tensors) for item in value)
    return value


def _check_equal(sizes: Sequence[int]) -> None:
    """Refuse a step of unequal parts, whose averaged gradient is not that of the global batch."""
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"Rank {rank} has {size} examples in this step and rank 0 has {sizes[0]}, expected "
                "as many on every rank, whose gradients are averaged alike; leave out the last "
                "incomplete batch (drop_last=True)."
            )


def _union(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that any rank has, in an order that all of them find."""
    return list(dict.fromkeys(name for theirs in every for name in theirs))


def _travelling(found: Mapping[str, Contribution]) -> dict[str, Contribution | None]:
    """The contributions as the other ranks need them on the host: None for plain means, which are
    summed.
    """
    given: dict[str, Contribution | None] = {}
    for name, new in found.items():
        given[name] = None
        if type(new.moments).mix is not Means.mix:
            tensors = {key: x.cpu() for key, x in new.moments.tensors().items()}
            moments = new.moments.with_tensors(tensors)
            given[name] = Contribution(moments, new.examples.cpu(), new.ok.cpu())
    return given


def _mixed(every: Sequence[Contribution | None], device: torch.device) -> Contribution:
    """The contributions of all ranks as one, in their order."""
    mean = Mean()
    ok = torch.ones((), dtype=torch.bool, device=device)
    for new in every:
        if new is None:
            continue
        tensors = {key: x.to(device) for key, x in new.moments.tensors().items()}
        mean.add(new.moments.with_tensors(tensors), new.examples.to(device))
        ok = ok & new.ok.to(device)
    assert mean.moments is not None
    examples = torch.as_tensor(mean.examples, device=device)
    return Contribution(mean.moments.masked(ok), examples * ok, ok)


def _failed(new: Contribution, used: bool) -> Tensor:
    """1 for a layer whose own statistics are not finite; one that was not used has none."""
    failed = (~new.ok).to(new.examples.dtype)
    return failed if used else torch.zeros_like(failed)
