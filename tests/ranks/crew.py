"""Processes that stand ready for tests: gloo on the CPU, a file as store, one thread each.

A crew is started once and runs one function after the other, on all ranks at once, since starting a
process costs more than most tests. A function that does not come back in time costs its crew.
"""

import importlib
import multiprocessing
import os
import pickle
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch

STARTING = 240  # seconds: importing torch beside busy neighbours
TIMEOUT = 60  # of one function
COLLECTIVE = timedelta(seconds=30)  # after which a collective that waits for a rank fails


class RankError(AssertionError):
    """What went wrong on a rank, with its traceback."""


class Crew:
    """`world` processes that are one group of torch.distributed.

    Args:
        world: how many.
        folder: for their store.
        collective: how long a collective waits.
    """

    def __init__(self, world, folder, collective=COLLECTIVE):
        self.world = world
        context = multiprocessing.get_context("spawn")
        store = folder / f"store-{world}-{os.urandom(4).hex()}"
        self.pipes = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, str(store), theirs, collective)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.answers(STARTING)

    def run(self, function, *arguments, timeout=TIMEOUT):
        """What a function gives on every rank; it must be found by its name in a module."""
        outcomes = self.outcomes(function, *arguments, timeout=timeout)
        for rank, (kind, value) in enumerate(outcomes):
            if kind != "result":
                raise RankError(f"rank {rank} of {self.world}: {value}")
        return [value for _, value in outcomes]

    def errors(self, function, *arguments, timeout=TIMEOUT):
        """What a function raises on every rank, as text with its traceback; None where nothing."""
        found = []
        for kind, value in self.outcomes(function, *arguments, timeout=timeout):
            found.append(value if kind == "error" else None)
        return found

    def outcomes(self, function, *arguments, timeout=TIMEOUT):
        """As `run`: ("result", value), ("error", text) or ("gone", text) of every rank."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        return self.answers(timeout)

    def answers(self, timeout):
        found = []
        for pipe in self.pipes:
            if not pipe.poll(timeout):
                self.end()
                raise RankError(f"a rank of {self.world} did not answer in {timeout} s")
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                found.append(("gone", "the process ended"))
        return found

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def end(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
            process.join()


def serve(rank, world, store, pipe, collective):
    """The life of a process of a crew."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which the first measurement loads, for seconds
    wait_for_all(world, rank, store)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=collective
    )
    pipe.send_bytes(pickle.dumps(("result", None)))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = ("result", function(*arguments))
            pickled = pickle.dumps(answer)
        except BaseException:
            pickled = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(pickled)


def wait_for_all(world, rank, store):
    """Until all processes have loaded torch: they start apart by more than a short time-out."""
    Path(f"{store}-{rank}").touch()
    until = time.monotonic() + STARTING
    while not all(Path(f"{store}-{other}").exists() for other in range(world)):
        assert time.monotonic() < until
        time.sleep(0.05)


class Crews:
    """A crew of each size, started when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.known = {}

    def of(self, world):
        crew = self.known.get(world)
        if crew is None or not crew.alive:
            crew = Crew(world, self.folder)
            self.known[world] = crew
        return crew

    def end(self):
        for crew in self.known.values():
            crew.end()


def rank():
    """The number of the process that asks."""
    return torch.distributed.get_rank()


@pytest.fixture(scope="session")
def crews(tmp_path_factory):
    """`crews.of(2).run(function, ...)` runs a function on two ranks."""
    found = Crews(tmp_path_factory.mktemp("ranks"))
    yield found
    found.end()
