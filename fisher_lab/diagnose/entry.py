"""compare(): the exact Fisher block of every layer against every approximation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fisher_lab import errors as measures
from fisher_lab._ground.files import check_output
from fisher_lab._ground.progress import Progress
from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation
from fisher_lab.diagnose.across import OFF_BLOCK, split
from fisher_lab.diagnose.asked import Matrices, all_settings, check_dampings, check_ready, named
from fisher_lab.diagnose.run import Run
from fisher_lab.errors import DAMPINGS
from fisher_lab.likelihoods import Likelihood
from fisher_lab.results.comparison import Comparison, load_unfinished


def compare(
    model: nn.Module,
    likelihood: Likelihood | nn.Module,
    data: Any,
    approximations: Sequence[Approximation] | Mapping[str, Approximation | Matrices] | None = None,
    *,
    fisher: FisherKind = "true",
    layers: Sequence[str] | None = None,
    errors: str | Sequence[str] = "default",
    dampings: Sequence[float] = DAMPINGS,
    exact: Literal["captured", "func"] = "captured",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    memory: float | None = None,
    on_unknown: Literal["error", "skip"] = "error",
    standard_errors: bool = False,
    progress: bool | None = None,
    resume: str | Path | None = None,
    problem: Mapping[str, Any] | None = None,
    labels: str = LABELS,
    output: Output | None = None,
) -> Comparison:
    """Measure approximations of every layer's Fisher block against the exact block.

    The exact block is built from captured inputs and output gradients and checked on every layer against torch.func
    along one random direction. Everything runs on a copy of the model.

    Args:
        model: any module that acts per example, in evaluation mode; it is not changed.
        likelihood: a Likelihood or a torch loss module (then: the Fisher that equals the loss's GGN).
        data: (x, y), x, a DataLoader or an iterable of batches.
        approximations: Approximations; or `{name: Approximation or {layer: FisherMatrix}}`, for matrices that are
            already there; None for all that are known.
        fisher: "true", "mc" (labels sampled from the model) or "empirical" (the labels given).
        layers: names of layers; None for all.
        errors: "default", "all", or names of measures; by name only "off_block", the share of the Frobenius norm of the
            whole network's Fisher outside the blocks of the layers, as one row of layer "(all)", approximation "Exact".
        dampings: for damped measures, relative to tr F / d.
        exact: "captured", or "func" to take the blocks from torch.func throughout.
        seed: of sampled labels and random directions.
        dtype: precision of the computation.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: "error", or "skip" to leave out modules without adapter and say so.
        standard_errors: also measure the standard error over examples of every undamped error but the spectrum's, and
            their covariances (see Comparison.difference); takes longer than the rest. None for eigenvalue-corrected
            approximations, whose bases have no usable derivative, and for errors below their noise floor.
        progress: show a progress bar; None: when stderr is a terminal.
        resume: file to save to after every layer, and to go on from if it exists: a regular file of your own, no link.
        problem: settings of the problem, kept in the result.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z: a name, an index or a function; None for a tensor, or `logits`.

    Returns:
        The Comparison.

    Raises:
        ValueError, TypeError: what cannot be measured, in one sentence, before anything is computed.

    See Also:
        estimate, for one approximation; exact_fisher, for the blocks.
    """
    started = time.perf_counter()
    candidates = named(approximations)
    of_layers, across = split(errors)
    wanted = measures.chosen(of_layers)
    dampings = check_dampings(dampings)
    if exact not in ("captured", "func"):
        raise ValueError(f'Got exact={exact!r}, expected "captured" or "func".')
    path = None if resume is None else check_output(resume, (".json",))
    earlier = None if path is None else load_unfinished(path)
    setup = Setup(
        model, likelihood, data, layers=layers, fisher=fisher, seed=seed, dtype=dtype, device=device,
        memory=memory, on_unknown=on_unknown, labels=labels, output=output,
    )  # fmt: skip
    source = Source(setup)
    check_ready(candidates, source)
    if standard_errors and (exact == "func" or not all(source.fits_at_once([name]) for name in source.layers)):
        raise ValueError(
            'standard_errors=True needs all examples at once and exact="captured", got data in pieces or exact="func"; '
            "pass the data as (x, y), use fewer examples or raise memory=."
        )
    run = Run(source, candidates, wanted, dampings, exact, standard_errors)
    steps = len(source.layers) * (len(candidates) + 2)
    with Progress(progress, steps) as bar, untouched_randomness():
        run.check.run(bar)
        run.settings = all_settings(source, candidates, wanted, dampings, exact, problem, run.check.fingerprint)
        run.settings["standard_errors"] = standard_errors
        run.settings["errors"] += [OFF_BLOCK] * across
        if path is not None and earlier is not None:
            run.take_over(earlier, path)
        for names in run.groups():
            run.measure(names, bar)
            if path is not None:
                run.comparison(started, complete=False).save(path)
        if across:
            bar.say("entries between layers")
            run.across()
    result = run.comparison(started, complete=True)
    if path is not None:
        result.save(path)
    return result
