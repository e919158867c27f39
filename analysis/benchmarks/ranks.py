"""Several processes, measured and on paper: `python -m analysis.benchmarks.ranks WHAT`.

compare    one process of one thread against two: torchrun is started by this command
refresh    factorisations of the autoencoder by every rank, or dealt out: under torchrun
paper      memory and traffic of a transformer of 7 billion parameters on 8, 64 and 1024 ranks
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisher_lab as fl
from fisher_lab import problems
from fisher_lab.training.commands import start

REPEATS = int(os.environ.get("REPEATS", "5"))


# -- compare ---------------------------------------------------------------------------------------
def small() -> tuple:
    """The network of the command line's default problem."""
    problem = problems.load("digits_mlp")
    return problem.model, problem.likelihood, problem.data


def million() -> tuple:
    """A million parameters in four layers."""
    torch.manual_seed(0)
    widths = (400, 600, 600, 600, 10)
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), nn.Tanh()]
    model = nn.Sequential(*modules[:-1])
    x, y = torch.randn(200, 400), torch.randint(10, (200,))
    return model, nn.CrossEntropyLoss(), (x, y)


NETS = {"default": small, "million": million}


def compare_once(net: str) -> None:
    """Print the seconds of a comparison, the second one in this process."""
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    options = {"fisher": "mc", "progress": False}
    fl.compare(*small(), [fl.KFAC()], **options)  # loads what the first one loads
    started = time.perf_counter()
    fl.compare(*NETS[net](), **options)
    if os.environ.get("RANK", "0") == "0":
        print(f"seconds {time.perf_counter() - started:.3f}")


def compare() -> None:
    """The quotient of both, the best of some runs of each in turn."""
    one = [sys.executable, "-m", "analysis.benchmarks.ranks", "once"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two += ["-m", "analysis.benchmarks.ranks", "once"]
    for net in NETS:
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(REPEATS):
            for name, command in (("one", one), ("two", two)):
                seconds[name].append(_seconds([*command, net]))
        best = {name: min(found) for name, found in seconds.items()}
        print(f"{net}: {best['one']:.2f} s in one process, {best['two']:.2f} s in two: ", end="")
        print(f"{best['one'] / best['two']:.2f} times as fast", flush=True)


def _seconds(command: list[str]) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("seconds ")]
    return float(line.split()[1])


# -- refresh ---------------------------------------------------------------------------------------
def refresh() -> None:
    """Seconds of a refresh of the autoencoder's inverses, both ways, under torchrun."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    problem = start("mnist_autoencoder", full=True)
    x, y = problem.data
    for name in ("KFAC", "EKFAC"):
        times = {}
        for way in ("replicated", "sharded"):
            model = problem.model.float()
            opt = getattr(fl.optim, name)(model, problem.likelihood, 0.01, refresh=way)
            wrapped = DistributedDataParallel(model)
            with opt.observing():
                z = wrapped(x.float())
            problem.likelihood.loss(z, y.float()).backward()
            found = []
            for _ in range(REPEATS):
                torch.distributed.barrier()
                started = time.perf_counter()
                opt._refresh()
                found.append(time.perf_counter() - started)
            times[way] = statistics.median(found)
        if torch.distributed.get_rank() == 0:
            share = times["sharded"] / times["replicated"]
            print(
                f"{name}: {times['replicated']:.3f} s by every rank, {times['sharded']:.3f} s ",
                end="",
            )
            print(f"dealt out: {share:.2f}", flush=True)


# -- on paper --------------------------------------------------------------------------------------
class Weight(NamedTuple):
    """A Linear layer, and how many there are of its kind."""

    name: str
    d_out: int
    d_in: int
    count: int


TRANSFORMER = (
    Weight("query, key, value, output", 4096, 4096, 4 * 32),
    Weight("gate and up", 11008, 4096, 2 * 32),
    Weight("down", 4096, 11008, 32),
)
RANKS = (8, 64, 1024)
BYTES = 4  # float32
BANDWIDTH = 25e9  # bytes per second and rank, each way
FLOPS = 1e13  # sustained by a factorisation in float32
CUBE = 3  # flops of a factorisation and an inverse over n^3
GIB = 2**30


def paper() -> None:
    """Print the tables of the documentation."""
    weights = sum(w.count * w.d_out * w.d_in for w in TRANSFORMER)
    factors = sum(w.count * (w.d_out**2 + w.d_in**2) for w in TRANSFORMER)
    cubes = sum(w.count * (w.d_out**3 + w.d_in**3) for w in TRANSFORMER)
    largest = max(w.d_out**3 + w.d_in**3 for w in TRANSFORMER)
    print(f"{weights / 1e9:.2f} billion weights, {factors / 1e9:.2f} billion numbers of factors\n")
    print("| ranks | inverses | GiB held | s to factorise | s to send them | s per step to send |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks in RANKS:
        share = max(cubes / ranks, largest)
        dealt = CUBE * share / FLOPS
        sending = factors * BYTES / BANDWIDTH
        ways = {
            "replicated": (3 * factors, CUBE * cubes / FLOPS, 0.0, 0.0),
            "dealt": (3 * factors, dealt, 2 * sending, 0.0),
            "owner only": (factors + 2 * factors / ranks, dealt, 0.0, weights * BYTES / BANDWIDTH),
        }
        for name, (numbers, factorising, sent, stepwise) in ways.items():
            held = numbers * BYTES / GIB
            print(f"| {ranks} | {name} | {held:.0f} | {factorising:.2f} | {sent:.2f} ", end="")
            print(f"| {stepwise:.2f} |")
    print("\n| statistics | GiB per observation | s on 8 | s on 1024 |")
    print("| --- | --- | --- | --- |")
    summed = {"per_example (KFAC, EKFAC)": factors, "mean (TNT, MBF)": weights}
    for name, numbers in summed.items():
        size = numbers * BYTES
        # a ring sends twice what is summed, but for one part
        seconds = [2 * (1 - 1 / ranks) * size / BANDWIDTH for ranks in (8, 1024)]
        print(f"| {name} | {size / GIB:.0f} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


if __name__ == "__main__":
    what = sys.argv[1]
    if what == "once":
        compare_once(sys.argv[2])
    else:
        {"compare": compare, "refresh": refresh, "paper": paper}[what]()
