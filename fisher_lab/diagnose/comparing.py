"""compare(): the exact Fisher block of every layer against every approximation."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fisher_lab import errors as measures
from fisher_lab._ground.arguments import number
from fisher_lab._ground.code import fingerprint
from fisher_lab._ground.files import check_output
from fisher_lab._ground.memory import peak_bytes
from fisher_lab._ground.progress import Progress
from fisher_lab._ground.ranks import Ranks, ranks_of
from fisher_lab._passes.batches import LABELS
from fisher_lab._passes.labels import FisherKind
from fisher_lab._passes.model import Output, untouched_randomness
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation
from fisher_lab.diagnose.candidates import Candidate, Matrices, named
from fisher_lab.diagnose.chance import over_all
from fisher_lab.diagnose.check import Check
from fisher_lab.diagnose.cost import of_check, told, work_of
from fisher_lab.diagnose.dealing import measure_dealt
from fisher_lab.diagnose.inside import precision_inside
from fisher_lab.diagnose.layer import Asked, LayerResult, layer_about
from fisher_lab.diagnose.network import of_network
from fisher_lab.diagnose.resuming import check_same_run, finished, is_whole, with_influences
from fisher_lab.diagnose.standard_errors import StandardErrors
from fisher_lab.diagnose.steps import NetworkSteps, check_names, is_of_steps
from fisher_lab.diagnose.totals import over_layers, worst_check
from fisher_lab.errors import DAMPING, DAMPINGS, Measure
from fisher_lab.estimation.memory import check_fits
from fisher_lab.likelihoods import Likelihood
from fisher_lab.results import ALL, Comparison, Cost, Row, Settings, load_unfinished
from fisher_lab.results.rows import plain
from fisher_lab.statistics.pieces import within


def compare(
    model: nn.Module,
    likelihood: Likelihood | nn.Module,
    data: Any,
    approximations: Sequence[Approximation] | Mapping[str, Approximation | Matrices] | None = None,
    *,
    fisher: FisherKind = "true",
    layers: Sequence[str] | None = None,
    errors: str | Sequence[str] = "default",
    dampings: Sequence[float] | None = None,
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
    group: Any = None,
) -> Comparison:
    """Measure approximations of every layer's Fisher block against the exact block.

    The exact block is built from captured inputs and output gradients and checked on every layer
    against torch.func along one random direction. Everything runs on a copy of the model.

    Args:
        model: any module that acts per example, in evaluation mode; it is not changed.
        likelihood: a Likelihood or a torch loss module (then: the Fisher that equals the loss's
            GGN).
        data: (x, y), x, a DataLoader or an iterable of batches.
        approximations: Approximations; or `{name: Approximation or {layer: FisherMatrix}}`, for
            matrices that are already there; None for all that are known.
        fisher: "true", "mc" (labels sampled from the model) or "empirical" (the labels given).
        layers: names of layers; None for all.
        errors: "default", "all", or names of measures; by name only "off_block", the share of the
            Frobenius norm of the whole network's Fisher outside the blocks of the layers, as one
            row of layer "(all)", approximation "Exact", and "network_efficiency", the share of the
            best decrease of the whole network's damped quadratic model that each approximation's
            step keeps, as rows of layer "(all)" beside those of the exact blocks ("Exact") and of
            the gradient itself ("(gradient)").
        dampings: for damped measures, relative to tr F / d; None for 0.01 with errors="default",
            else from 0.0001 to 1.
        exact: "captured", or "func" to take the blocks from torch.func throughout.
        seed: of sampled labels and random directions.
        dtype: precision of the computation.
        device: where to compute; None for the model's own.
        memory: budget in GiB; None for half of what is free.
        on_unknown: "error", or "skip" to leave out modules without adapter and say so.
        standard_errors: also measure the standard error over examples of every undamped error but
            the spectrum's, and their covariances (see Comparison.difference); takes longer than the
            rest. None for eigenvalue-corrected approximations, whose bases have no usable
            derivative, for errors of TENGraD but its traces, for KPSVD's trace, for spectral
            norms of which no eigenvalue is ahead by more than chance, and for errors below their
            noise floor.
        progress: False for none; else a bar where stderr is a terminal, a line now and then
            elsewhere, and about how long it takes before anything that takes longer than ten
            seconds.
        resume: file to save to after every layer, and to go on from if it exists: a regular file of
            your own, no link.
        problem: settings of the problem, kept in the result.
        labels: the key of y where batches are mappings.
        output: what of the model's output is z: a name, an index or a function; None for a tensor,
            or `logits`.
        group: the processes of torch.distributed that share the work, each with all of the data.
            All of them must call this, and get the same Comparison; the first one alone writes and
            shows progress. None for the default group where one is initialised, else one process.

    Returns:
        The Comparison.

    Raises:
        ValueError, TypeError: what cannot be measured, in one sentence, before anything is
            computed.

    See Also:
        estimate, for one approximation; exact_fisher, for the blocks.

    Example:
        >>> found = fl.compare(model, loss, (x, y), [fl.KFAC(), fl.TKFAC()], progress=False)
        >>> found.value("0", "TKFAC", "frobenius") < 1
        True
    """
    started = time.perf_counter()
    ranks = ranks_of(group)
    setup = Setup.of(locals(), memory=ranks.memory(memory))
    # 1. what is asked, refused before anything is computed
    ask = partial(
        _question,
        setup,
        approximations,
        errors=errors,
        dampings=dampings,
        exact=exact,
        standard_errors=standard_errors,
        problem=problem,
        resume=resume,
    )
    question = ranks.agreed(ask)
    return _measured(question, ranks, progress, started)


def _approximations(candidates: Mapping[str, Candidate]) -> list[Approximation]:
    """What is to be built."""
    found = []
    for candidate in candidates.values():
        if candidate.approximation is not None:
            found.append(candidate.approximation)
    return found


class Kinds(NamedTuple):
    """Measures by what they read."""

    of_layers: list[Measure]
    of_all: list[Measure]  # the columns of all layers at once
    of_steps: list[Measure]  # the steps of all layers


class Question(NamedTuple):
    """What is asked, checked.

    Attributes:
        source: model and data.
        candidates: by label.
        kinds: the measures.
        dampings: relative to tr F / d.
        exact: "captured" or "func".
        standard_errors: whether they are asked for.
        problem: settings of the problem.
        path: of the file to go on from; None for none.
    """

    source: Source
    candidates: dict[str, Candidate]
    kinds: Kinds
    dampings: tuple[float, ...]
    exact: Literal["captured", "func"]
    standard_errors: bool
    problem: dict[str, Any]
    path: Path | None

    @property
    def of_network(self) -> list[Measure]:
        """Measures of all layers at once."""
        return [*self.kinds.of_all, *self.kinds.of_steps]

    @property
    def of_each_layer(self) -> bool:
        """Whether layers are measured one by one."""
        return bool(self.kinds.of_layers or self.kinds.of_steps)

    @property
    def damped(self) -> int:
        """Number of dampings, 0 where no measure of the layers has any."""
        if any(m.damped for m in self.kinds.of_layers):
            return len(self.dampings)
        return 0


def _question(
    setup: Setup,
    approximations: Any,
    *,
    errors: str | Sequence[str],
    dampings: Sequence[float] | None,
    exact: Literal["captured", "func"],
    standard_errors: bool,
    problem: Mapping[str, Any] | None,
    resume: str | Path | None,
) -> Question:
    """Everything that `compare` was given, checked."""
    candidates = named(approximations)
    kinds = _by_what_they_read(measures.chosen(errors))
    check_names(candidates, [*kinds.of_all, *kinds.of_steps])
    chosen = _asked_dampings(errors, dampings)
    if exact not in ("captured", "func"):
        raise ValueError(f'Got exact={exact!r}, expected "captured" or "func".')
    about = plain(problem or {}, "problem")
    path = None
    if resume is not None:
        path = check_output(resume, (".json",))
    # what else reads columns needs them whole
    whole = bool(kinds.of_all or kinds.of_steps or standard_errors or exact == "func")
    source = Source(setup, vocabularies=not whole)
    _check_layer_names(source)
    for candidate in candidates.values():
        candidate.check(source)
    check_fits(_approximations(candidates), source)
    if standard_errors:
        _check_standard_errors(source, exact)
    return Question(source, candidates, kinds, chosen, exact, standard_errors, about, path)


def _measured(
    question: Question, ranks: Ranks, progress: bool | None, started: float
) -> Comparison:
    """The Comparison of a question, the work shared among the ranks."""
    source, candidates, kinds, dampings, exact, _, problem, path = question
    earlier = ranks.from_first(lambda: None if path is None else load_unfinished(path))
    shown = progress if ranks.first else False
    work = work_of(source, len(candidates), question.damped)
    check_work = of_check(source)
    total = len(work) * check_work
    if question.of_each_layer:
        total += sum(work.values())
    with (
        Progress(shown, total / ranks.count) as bar,
        untouched_randomness(),
        within(source.limit),
    ):
        if bar.every < math.inf:
            _announce(bar, question, earlier, ranks)
        bar.weigh(check_work)
        # 2. one pass for the independent check and the fingerprint
        check = Check(source)
        check.run(bar, ranks)
        collector = StandardErrors(kinds.of_layers) if question.standard_errors else None
        steps = NetworkSteps(source, kinds.of_steps, dampings)
        asked = Asked(
            source, candidates, kinds.of_layers, dampings, exact, check, collector, steps, work
        )
        settings = _settings(asked, problem, question.of_network)
        if not ranks.alone:
            settings["machine"] += f", {ranks.count} processes"
        # 3. layers that an earlier run finished, and the others in groups
        results: dict[str, LayerResult] = {}
        if path is not None and earlier is not None:
            check_same_run(earlier, settings, path)
            if is_whole(earlier, asked):
                return replace(earlier, settings=Settings(earlier.settings, problem=problem))
            results = finished(asked, earlier)

        def save() -> None:
            if path is not None and ranks.first:
                _comparison(asked, settings, results, [], started, complete=False).save(path)

        measure_dealt(asked, results, ranks, bar, save)

        # 4. over all layers
        def conclude() -> Comparison:
            bar.say("the whole network")
            rows = _of_all_layers(asked, results, kinds.of_all)
            found = _comparison(asked, settings, results, rows, started, complete=True)
            # in the order of the layers, whichever rank measured them: sums are rounded
            in_order = [results[name] for name in source.layers if name in results]
            by_chance = [*over_all(in_order, rows), *steps.covariances]
            found = replace(found, covariances=(*found.covariances, *by_chance))
            if path is not None:
                found.save(path)
            return found

        return ranks.from_first(conclude)


def _announce(bar: Progress, question: Question, earlier: Comparison | None, ranks: Ranks) -> None:
    """Say about how long it takes, if it takes long."""
    done = set()
    if earlier is not None:
        done = {row.layer for row in earlier.rows}
    source = question.source
    todo = [name for name in source.layers if name not in done]
    if not todo or not question.of_each_layer:
        return
    line = told(source, todo, len(question.candidates), question.damped, ranks.count)
    if line is not None:
        bar.announce(line)


def _by_what_they_read(chosen: Sequence[Measure]) -> Kinds:
    kinds = Kinds([], [], [])
    for m in chosen:
        if is_of_steps(m):
            kinds.of_steps.append(m)
        elif m.network:
            kinds.of_all.append(m)
        else:
            kinds.of_layers.append(m)
    return kinds


def _asked_dampings(errors: Any, dampings: Any) -> tuple[float, ...]:
    """Those given, else one for the default errors, and several for errors asked for by name."""
    if dampings is None:
        return (DAMPING,) if errors == "default" or list(errors) == ["default"] else DAMPINGS
    return check_dampings(dampings)


def check_dampings(dampings: Any) -> tuple[float, ...]:
    """Dampings as positive finite numbers, each once."""
    alone = not math.isnan(number(dampings)) or not isinstance(dampings, Iterable)
    values = [dampings] if alone else list(dampings)
    valid = all(0 < number(damping) < math.inf for damping in values)
    if not values or not valid:
        raise ValueError(
            f"Got dampings={dampings!r}, expected positive finite numbers relative to tr F / d."
        )
    return tuple(dict.fromkeys(float(damping) for damping in values))


def _check_layer_names(source: Source) -> None:
    """The rows over all layers are told by their name alone."""
    if ALL in source.layers:
        raise ValueError(
            f"Got a layer named {ALL!r}, which is what the rows over all layers are called, "
            "expected another name; rename the module, or leave it out with layers=[...]."
        )


def _check_standard_errors(source: Source, exact: str) -> None:
    """Standard errors need the columns of all examples at once."""
    if exact == "func" or not all(source.fits_at_once([name]) for name in source.layers):
        raise ValueError(
            'standard_errors=True needs all examples at once and exact="captured", got data in '
            'pieces or exact="func"; '
            "pass the data as (x, y), use fewer examples or raise memory=."
        )


def _of_all_layers(
    asked: Asked, results: Mapping[str, LayerResult], of_all: Sequence[Measure]
) -> list[Row]:
    """Rows of layer "(all)"."""
    in_order = [results[name] for name in asked.source.layers if name in results]
    rows = []
    if len(in_order) > 1:
        rows += over_layers(asked, in_order)
    rows += of_network(asked, of_all)
    rows += asked.steps.rows(worst_check(in_order))
    return rows


# -- what is kept beside the numbers ---------------------------------------------------------------
def _settings(asked: Asked, problem: Mapping[str, Any], beside: Sequence[Measure]) -> Settings:
    """Everything that is needed to trust the result later.

    Args:
        asked: the question.
        problem: its settings.
        beside: measures of the whole network, beside those of the layers.
    """
    source = asked.source
    names = [m.name for m in (*asked.wanted, *beside)]
    libraries = ("fisher-lab", "torch", "numpy", "scipy")
    versions = {name: _version(name) for name in libraries}
    versions["python"] = platform.python_version()
    settings = Settings(
        problem=problem,
        model=type(source.model).__name__,
        parameters=sum(p.numel() for p in source.model.parameters()),
        fisher=source.fisher,
        likelihood=repr(source.likelihood),
        N=source.N,
        R=source.R,
        output=list(source.outputs),
        seed=source.seed,
        dtype=str(source.dtype).removeprefix("torch."),
        device=str(next(source.model.parameters()).device),
        exact=asked.exact,
        layers={name: layer_about(layer) for name, layer in source.layers.items()},
        left_out=dict(source.selection.left_out),
        approximations=list(asked.candidates),
        candidates={label: candidate.description for label, candidate in asked.candidates.items()},
        code=_code(asked.candidates),
        own=[label for label, candidate in asked.candidates.items() if candidate.is_own(source.N)],
        errors=names,
        dampings=list(asked.dampings),
        standard_errors=asked.standard_errors is not None,
        fingerprint=asked.check.fingerprint,
        versions=versions,
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    own_code = _own_code(asked, beside)
    if own_code is not None:
        settings["own_code"] = own_code
    if source.precision != source.dtype:
        settings["precision"] = f"{precision_inside(source)} inside the model"
    if asked.damped or asked.steps.measures:
        labelled = source.batches.first().y is not None
        settings["gradient"] = (
            "of the data's labels" if labelled else "of labels sampled from the model"
        )
    return settings


def _code(candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """What builds the candidates for an optimizer."""
    found = {}
    for label, candidate in candidates.items():
        code = candidate.code
        if code is not None:
            found[label] = code
    return found


def _own_code(asked: Asked, beside: Sequence[Measure]) -> str | None:
    """Of the approximations, measures, likelihood and layers that are not the library's."""
    things: list[Any] = [m.formula for m in (*asked.wanted, *beside)]
    things += [candidate.approximation for candidate in asked.candidates.values()]
    things.append(asked.source.likelihood)
    things += asked.source.layers.values()
    return fingerprint(*things)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _comparison(
    asked: Asked,
    settings: Settings,
    results: Mapping[str, LayerResult],
    of_all: Sequence[Row],
    started: float,
    complete: bool,
) -> Comparison:
    """What is measured so far, in the order of the layers."""
    in_order = [results[name] for name in asked.source.layers if name in results]
    rows: list[Row] = []
    costs: list[Cost] = []
    quantities: list[dict[str, Any]] = []
    covariances: list[dict[str, Any]] = []
    left_out = dict(settings.left_out or {})
    layers = dict(settings.layers or {})
    for result in in_order:
        rows += result.rows
        left_out |= result.left_out
        layers[result.layer] = result.about
        costs += result.costs
        quantities += result.quantities
        covariances += result.covariances
    if asked.standard_errors is not None:
        for found in asked.standard_errors.covariances:
            if found["layer"] == ALL:
                covariances.append(found)
        if not complete:
            quantities = with_influences(quantities, asked.standard_errors)
    spent = Settings(
        settings,
        layers=layers,
        left_out=left_out,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        complete=complete,
    )
    return Comparison(
        rows=(*rows, *of_all),
        costs=tuple(costs),
        settings=spent,
        quantities=tuple(quantities),
        covariances=tuple(covariances),
    )
