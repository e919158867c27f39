"""The mechanical parts of the documentation, from the registries and docstrings, and the gallery's
figure scraper.
"""

import inspect
import re
import shutil
from pathlib import Path

import support
import torch

import fisher_lab as fl
from fisher_lab import (
    approximations,
    errors,
    layers,
    likelihoods,
    optim,
    plots,
    problems,
    report,
    training,
)
from fisher_lab._ground.memory import readable
from fisher_lab.likelihoods import TorchLoss

API = {
    "Quantify": [
        fl.compare, fl.Comparison, fl.load_comparison, fl.exact_fisher, fl.estimate, fl.default_approximations,
    ],
    "The whole network": [fl.network, fl.NetworkFisher, fl.budget, fl.StepBudget],
    "Approximations": [approximations.Approximation, *approximations.registry().values()],
    "Matrices": [
        fl.FisherMatrix,
        *(getattr(fl.matrices, n) for n in sorted(dir(fl.matrices)) if n[0].isupper() and n != "FisherMatrix"),
    ],
    "Statistics": [fl.LayerStats],
    "Likelihoods": [likelihoods.Likelihood, *likelihoods.registry().values(), TorchLoss],
    "Layers": [layers.Layer, layers.WeightBias, *dict.fromkeys(layers.registry().values())],
    "Error measures": [getattr(errors, name) for name in errors.MEASURES],
    "Figures": [getattr(plots, name) for name in sorted(dir(plots)) if inspect.isfunction(getattr(plots, name))],
    "Report": [report.write_report, report.answers],
    "Optimizers": [getattr(optim, name) for name in sorted(dir(optim)) if inspect.isclass(getattr(optim, name))],
    "Training": [training.fit, training.train_step, training.record_errors],
    "Problems": [problems.Problem, problems.load, problems.names, problems.describe, problems.problem],
}  # fmt: skip


def generate(source: Path) -> None:
    """Write `generated/` anew."""
    folder = source / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    for name, cls in registered().items():
        (folder / "parts" / f"{name}.md").write_text(approximation(name, cls), encoding="utf-8")
    (folder / "parts" / "layers.md").write_text(layer_table(), encoding="utf-8")
    (folder / "parts" / "support.md").write_text(support.table(), encoding="utf-8")
    (folder / "parts" / "problems.md").write_text(problem_table(), encoding="utf-8")
    (folder / "parts" / "measures.md").write_text(measure_table(), encoding="utf-8")
    (folder / "parts" / "benchmarks.md").write_text(
        benchmarks(source / "benchmarks"), encoding="utf-8"
    )
    for title, things in API.items():
        text = f"# {title}\n\n" + "\n".join(entry(thing) for thing in things)
        (folder / f"api-{slug(title)}.md").write_text(text, encoding="utf-8")


def registered() -> dict:
    """The library's own approximations (a user's, or a test's, have no page)."""
    found = approximations.registry()
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("fisher_lab.")}


def slug(title: str) -> str:
    """A title as a file name."""
    return title.lower().replace(" ", "-")


def approximation(name: str, cls: type) -> str:
    """Formula and text of an approximation from its docstrings, and what it is on a small layer."""
    module, text = inspect.getdoc(inspect.getmodule(cls)), inspect.getdoc(cls)
    base = fl.Corrected(fl.KFAC()) if name == "Corrected" else cls()
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    data = torch.randn(200, 20, dtype=torch.float64)
    model.double()
    exact = fl.exact_fisher(model, fl.Categorical(), data)[""]
    matrix = fl.estimate(base, model, fl.Categorical(), data)[""]
    facts = [
        ("signature", f"`fl.{signature(cls)}`"),
        ("structure (Linear)", f"`{type(matrix).__name__}`"),
        (
            "held for a 20x21 layer",
            f"{readable(matrix.nbytes)} (dense block: {readable(8 * exact.dim**2)})",
        ),
        ("sweeps over the data", str(base.sweeps)),
        ("needs inputs and output gradients apart", "yes" if base.needs_factors else "no"),
        ("power that a trainer applies", f"{base.exponent:g}"),
        ("trace error on random data", f"{fl.errors.trace(exact, matrix):.2g}"),
        ("Frobenius error on random data", f"{fl.errors.frobenius(exact, matrix):.2g}"),
    ]
    lines = "\n".join(f"| {key} | {value} |" for key, value in facts)
    return f"```text\n{module}\n```\n\n```text\n{text}\n```\n\n|  |  |\n| --- | --- |\n{lines}\n"


def layer_table() -> str:
    """Which module types are understood, and how."""
    lines = ["| module | form | what the adapter says |", "| --- | --- | --- |"]
    for kind, adapter in layers.registry().items():
        if kind.__module__.startswith("torch"):
            form = (
                "flattened parameters" if adapter.gradient_form else "inputs and output gradients"
            )
            lines.append(f"| `nn.{kind.__name__}` | {form} | {summary(adapter)} |")
    return "\n".join(lines) + "\n"


def problem_table() -> str:
    """The problems that come along."""
    lines = ["| problem | what it is |", "| --- | --- |"]
    return (
        "\n".join(
            lines
            + [f"| `{name}` | {about.summary} |" for name, about in problems.describe().items()]
        )
        + "\n"
    )


def measure_table() -> str:
    """The error measures with their formulas."""
    lines = ["| error | formula | measured |", "| --- | --- | --- |"]
    for name, measure in errors.MEASURES.items():
        when = "by default" if measure.default else "on request"
        if measure.damped:
            when = "per damping, on request"
        if measure.network:
            when = "of the whole network, by name only"
        if measure.network and measure.damped:
            when = "of the whole network per damping, by name only"
        formula = summary(getattr(errors, name)).replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {when} |")
    return "\n".join(lines) + "\n"


def benchmarks(folder: Path) -> str:
    """All tables under docs/benchmarks, one after the other."""
    found = sorted(folder.glob("*.md"))
    if not found:
        return "No benchmark was run yet.\n"
    texts = ["\n" + path.read_text(encoding="utf-8") for path in found]
    # relative to docs/benchmarks.md
    texts = [re.sub(r"\]\((?!https?:|#)", "](benchmarks/", text) for text in texts]
    return "\n".join(re.sub(r"\n(#+ )", r"\n#\1", text) for text in texts)


def summary(thing) -> str:
    """First paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def entry(thing) -> str:
    """Signature and docstring, and the public methods of a class."""
    parts = [f"## {thing.__qualname__}\n", fence(signature(thing), inspect.getdoc(thing))]
    if inspect.isclass(thing):
        for name, member in members(thing).items():
            target = (
                member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            )
            if not name.startswith("_") and inspect.isfunction(target) and target.__doc__:
                what = name if isinstance(member, property) else signature(target, name)
                parts.append(fence(what, inspect.getdoc(target)))
    return "\n".join(parts)


def members(cls: type) -> dict[str, object]:
    """What a class defines, and what it has of bases that are no entry of their own."""
    listed = [thing for section in API.values() for thing in section]
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        ours = base.__module__.startswith("fisher_lab.")
        if base is cls or (ours and base not in listed):
            found |= vars(base)
    return found


def signature(thing, name: str = "") -> str:
    """Name and arguments."""
    name = name or thing.__qualname__
    try:
        found = inspect.signature(thing)
    except (ValueError, TypeError):
        return name
    kinds = [parameter.kind for parameter in found.parameters.values()]
    parameters = [unquoted(str(parameter)) for parameter in found.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    end = (
        ")"
        if found.return_annotation in (inspect.Signature.empty, None, "None")
        else unquoted(f") -> {found.return_annotation}")
    )
    line = f"{name}({', '.join(parameters)}{end}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + f"\n{end}"


def unquoted(text: str) -> str:
    """Without the quotes around annotations that are kept as text."""
    return re.sub(
        r"(: |-> )'([^']*)'|(: |-> )\"(.*)\"(?= = |$)",
        lambda m: (m[1] or m[3]) + (m[2] or m[4]),
        text,
    )


def fence(head: str, text: str | None) -> str:
    """A docstring as it is: it is written to be read as plain text."""
    body = "\n".join(f"    {line}".rstrip() for line in (text or "").splitlines())
    return f"````text\n{head}\n{body}\n````\n"


def _get_sg_image_scraper():
    """The gallery asks for this; our figures belong to no window, so they are found among the
    example's variables.
    """
    return scrape


def scrape(block, block_vars, gallery_conf) -> str:  # noqa: ARG001 - the gallery calls it so
    """Save the figures that a block of an example made."""
    from matplotlib.figure import Figure
    from sphinx_gallery.scrapers import figure_rst

    paths = []
    for name, value in list(block_vars["example_globals"].items()):
        if isinstance(value, Figure):
            paths.append(next(block_vars["image_path_iterator"]))
            plots.save(value, paths[-1])
            del block_vars["example_globals"][name]
    return figure_rst(paths, gallery_conf["src_dir"])
