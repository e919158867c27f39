"""Ranks: the processes that answer one question together, and how work is dealt to them.

What they exchange here are results, as Python objects; tensors of a training step are the business
of `optim.reductions`. A process that is alone exchanges nothing and waits for nobody.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisher_lab._ground.memory import budget_bytes

T = TypeVar("T")

# A rank with cheap layers waits for one with dear ones, for hours where need be. One that was
# killed is noticed at once, as its connections end.
PATIENCE = timedelta(days=1)
SHARED = "on rank "  # begins the note on an exception that every rank raises


def is_several() -> bool:
    """Whether a group of more than one process is initialised."""
    # some builds of torch have no distributed package at all
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or one that is alone."""
    return not is_several() or torch.distributed.get_rank() == 0


@dataclass(frozen=True)
class Ranks:
    """The processes that answer one question, seen from one of them.

    Attributes:
        own: the number of this one, from 0.
        count: how many there are.
        group: of torch.distributed; None for a process that is alone.
    """

    own: int = 0
    count: int = 1
    group: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.own == 0

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, in their order.

        Every rank must come here, also one without work. Where one of them raises, all raise what
        the lowest of these raised, so that none waits for a rank that is gone.

        Args:
            work: what this rank does.
        """
        if self.alone:
            return [work()]
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        return self._exchanged(result, error)

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once all ranks have done theirs without an exception."""
        kept = []

        def silently() -> None:
            kept.append(work())

        self.gathered(silently)
        return kept[0]

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, where alone it is done."""
        mine = work if self.first else _nothing
        return self.gathered(mine)[0]

    def _exchanged(self, result: Any, error: Exception | None) -> list[Any]:
        """The results of all ranks, or the exception of one of them."""
        found: list[Any] = [None] * self.count
        own = (result, None if error is None else _portable(error))
        torch.distributed.all_gather_object(found, own, group=self.group)
        for rank, (_, theirs) in enumerate(found):
            if theirs is None:
                continue
            if rank == self.own and error is not None:
                theirs = error  # with its own traceback
            theirs.add_note(f"{SHARED}{rank} of {self.count}")
            raise theirs
        return [of_rank for of_rank, _ in found]

    def summed(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if not self.alone:
            torch.distributed.all_reduce(x, group=self.group_of(x))
        return x

    def group_of(self, x: Tensor) -> Any:
        """The group whose backend takes a tensor: on the host, that of the objects."""
        return self.group if x.device.type == "cpu" else None

    def memory(self, asked: float | None) -> float | None:
        """The memory budget in GiB that all ranks use, so that all plan alike.

        Args:
            asked: by the user; None shares half of what is free among the ranks of each machine.
        """
        if self.alone or asked is not None:
            return asked
        here = socket.gethostname()
        found = self.gathered(lambda: (here, budget_bytes()))
        machines = [machine for machine, _ in found]
        shares = [free / machines.count(machine) for machine, free in found]
        return min(shares) / 2**30


ALONE = Ranks()


def _nothing() -> Any:
    """The work of a rank that has none."""
    return None


class LostRankError(RuntimeError):
    """A rank that others waited for is gone, or hangs."""


# words of the engines where a collective fails for want of a rank; they raise plain RuntimeErrors
_LOST = ("gloo", "nccl", "timed out", "connection closed", "connection reset", "connection refused")


@contextmanager
def none_lost(cure: str) -> Iterator[None]:
    """Say in a sentence that a collective failed because another rank is gone or hangs.

    Args:
        cure: what to do, as the end of the sentence.

    Raises:
        LostRankError: in place of what the engine of torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        engine = isinstance(error, torch.distributed.DistError)
        if not is_several() or not (engine or any(word in words for word in _LOST)):
            raise
        raise LostRankError(
            f"Rank {torch.distributed.get_rank()} waited in vain for another rank, expected all to "
            f"take the same steps: one has ended or hangs, and its own error tells why; {cure}."
        ) from error


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this exception, so that one of them may tell."""
    notes: list[str] = getattr(error, "__notes__", [])
    return any(note.startswith(SHARED) for note in notes)


def _portable(error: Exception) -> Exception:
    """An exception that the other ranks can raise: itself, or its words if it does not travel."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


# The patient channel of every group. It stays as long as the group: one that is ended and made anew
# would find what the first one left in the store.
_patient: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_prompt: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # with the group's own time-out


def ranks_of(group: Any = None, patient: bool = True) -> Ranks:
    """The processes of a group; all of them must come here.

    Args:
        group: of torch.distributed. None for the default group where there is one, or else for this
            process alone; `torch.distributed.new_group([rank])` is a process alone, too.
        patient: whether they wait for each other as long as it takes, or for the group's time-out.
    """
    if group is None:
        if not is_several():
            return ALONE
        group = torch.distributed.group.WORLD
    distributed = torch.distributed
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"Got group of type {type(group).__name__}, expected a group of torch.distributed, or "
            "None for the default one."
        )
    members = distributed.get_process_group_ranks(group)
    if len(members) == 1:
        return ALONE
    channels = _patient if patient else _prompt
    if group not in channels:
        # objects travel through the hosts, whatever the tensors of the group do
        channels[group] = distributed.new_group(
            members,
            backend="gloo",
            timeout=PATIENCE if patient else _timeout_of(group),
            use_local_synchronization=True,
        )
    channel = channels[group]
    return Ranks(distributed.get_rank(channel), len(members), channel)


def _timeout_of(group: Any) -> timedelta | None:
    """How long the collectives of a group wait; None for torch's default."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # which torch does not promise to tell
        return None


def dealt(costs: Mapping[str, float], ranks: int) -> list[list[str]]:
    """Work dealt to ranks, the dearest first, each to the rank that has least so far.

    At most 4/3 of the best possible time (Graham 1969); every rank deals alike.

    Args:
        costs: by name.
        ranks: how many.

    Returns:
        The names of every rank, in the order in which they were given.
    """
    load = [0.0] * ranks
    owner = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: ties in their order
        least = load.index(min(load))
        owner[name] = least
        load[least] += costs[name]
    found: list[list[str]] = [[] for _ in range(ranks)]
    for name in costs:
        found[owner[name]].append(name)
    return found


def in_order(names: Iterable[str], parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """What the ranks found by name, in the order of the names."""
    found: dict[str, T] = {}
    for part in parts:
        found.update(part)
    return {name: found[name] for name in names}


def check_alike(checksums: Sequence[int]) -> None:
    """Refuse ranks that were given different things.

    Args:
        checksums: of every rank.

    Raises:
        ValueError: where they differ, on every rank alike.
    """
    for rank, crc in enumerate(checksums):
        if crc != checksums[0]:
            raise ValueError(
                f"Rank {rank} got another model or other data than rank 0, expected the same on "
                "every rank; seed them alike, and pass all of the data without a distributed "
                "sampler."
            )
