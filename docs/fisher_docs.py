"""The mechanical parts of the documentation, from registries and docstrings; the gallery's
figures.
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
    results,
    training,
)
from fisher_lab._ground.memory import readable
from fisher_lab.likelihoods import TorchLoss

# Where a user finds what is public, the shortest name first.
PLACES = (
    fl,
    approximations,
    errors,
    fl.matrices,
    layers,
    likelihoods,
    optim,
    plots,
    problems,
    report,
    training,
)


def public(module, wanted) -> list:
    """What a module offers of one sort, by name."""
    found = []
    for name in sorted(dir(module)):
        thing = getattr(module, name)
        # not what the module itself imports from elsewhere
        own = getattr(thing, "__module__", "").startswith("fisher_lab.")
        if own and wanted(thing) and not name.startswith("_"):
            found.append(thing)
    return found


def structures() -> list:
    """The classes of matrices; the base class stands first."""
    found = [
        thing for thing in public(fl.matrices, inspect.isclass) if thing is not fl.FisherMatrix
    ]
    return [fl.FisherMatrix, *found]


API = {
    "Quantify": [
        fl.compare,
        fl.Comparison,
        results.Recommendation,
        results.Choice,
        fl.load_comparison,
        fl.exact_fisher,
        fl.estimate,
        fl.default_approximations,
    ],
    "The whole network": [fl.network, fl.NetworkFisher, fl.budget, fl.StepBudget],
    "Approximations": [approximations.Approximation, *approximations.registry().values()],
    "Matrices": structures(),
    "Statistics": [fl.LayerStats],
    "Likelihoods": [likelihoods.Likelihood, *likelihoods.registry().values(), TorchLoss],
    "Layers": [layers.Layer, layers.WeightBias, *dict.fromkeys(layers.registry().values())],
    "Error measures": [getattr(errors, name) for name in errors.MEASURES],
    "Figures": public(plots, inspect.isfunction),
    "Report": [report.write_report, report.answers],
    "Optimizers": public(optim, inspect.isclass),
    "Training": [
        training.fit,
        training.train_step,
        training.record_errors,
        training.load_metrics,
    ],
    "Problems": [
        problems.Problem,
        problems.load,
        problems.names,
        problems.describe,
        problems.problem,
    ],
}


def generate(source: Path) -> None:
    """Write `generated/` anew."""
    folder = source / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    parts = {
        "layers": layer_table(),
        "support": support.table(),
        "problems": problem_table(),
        "measures": measure_table(),
        "benchmarks": benchmarks(source / "benchmarks"),
    }
    for name, cls in registered().items():
        parts[name] = approximation(name, cls)
    (folder / "parts").mkdir(parents=True)
    for name, text in parts.items():
        (folder / "parts" / f"{name}.md").write_text(text, encoding="utf-8")
    for title, things in API.items():
        entries = [entry(thing) for thing in things]
        text = f"{title}\n{'=' * len(title)}\n\n" + "\n".join(entries)
        (folder / f"api-{slug(title)}.rst").write_text(text, encoding="utf-8")


def registered() -> dict:
    """The library's own approximations (a user's, or a test's, have no page)."""
    found = approximations.registry()
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("fisher_lab.")}


def slug(title: str) -> str:
    """A title as a file name."""
    return title.lower().replace(" ", "-")


def approximation(name: str, cls: type) -> str:
    """What an approximation is on a small layer, and where the reference has it."""
    base = fl.Corrected(fl.KFAC()) if name == "Corrected" else cls()
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    data = torch.randn(200, 20, dtype=torch.float64)
    model.double()
    exact = fl.exact_fisher(model, fl.Categorical(), data)[""]
    matrix = fl.estimate(base, model, fl.Categorical(), data)[""]
    dense = readable(8 * exact.dim**2)
    trace = fl.errors.trace(exact, matrix)
    frobenius = fl.errors.frobenius(exact, matrix)
    facts = {
        "structure (Linear)": f"`{type(matrix).__name__}`",
        "held for a 20x21 layer": f"{readable(matrix.nbytes)} (dense block: {dense})",
        "sweeps over the data": str(base.sweeps),
        "needs inputs and output gradients apart": "yes" if base.needs_factors else "no",
        "power that a trainer applies": f"{base.exponent:g}",
        "trace error on random data": f"{trace:.2g}",
        "Frobenius error on random data": f"{frobenius:.2g}",
    }
    table = table_of(["", ""], facts.items())
    tested = "\n".join(f"- {line}" for line in tests_of(name))
    definition = f"Signature, options and source: {{py:obj}}`fisher_lab.{name}`."
    return f"{definition}\n\n{table}\n\n## Where it is tested\n\n{tested}\n"


def tests_of(name: str) -> list[str]:
    """Lines with the tests of an approximation: naive twin, theorems, contracts."""
    tests = Path(__file__).resolve().parent.parent / "tests"
    definitions = (tests / "theorems" / "test_definitions.py").read_text(encoding="utf-8")
    found = []
    twin = re.search(rf"\"{name}\", .*naive\.(\w+)", definitions)
    if twin:
        found.append(
            "Its definition, written as plainly as the paper has it: "
            f"`{twin[1]}` of `tests/naive.py`, held in `tests/theorems/test_definitions.py`."
        )
    for number, statement in theorems().items():
        if re.search(rf"\b{name}\b", statement):
            files = " and ".join(f"`{file}`" for file in test_files(statement))
            found.append(f"{number} of the [theorems](../theorems.md): {files}.")
    found.append("What every approximation owes: `tests/contracts/test_approximations.py`.")
    return found


def theorems() -> dict[str, str]:
    """The text of every numbered statement of the page of theorems."""
    page = (Path(__file__).resolve().parent / "theorems.md").read_text(encoding="utf-8")
    parts = re.split(r"^([PX]\d+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_files(text: str) -> list[str]:
    """The test files that a text names, each once."""
    return list(dict.fromkeys(re.findall(r"tests/[\w/]+\.py", text)))


def table_of(head: list[str], rows) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def layer_table() -> str:
    """Which module types are understood, and how."""
    rows = []
    for kind, adapter in layers.registry().items():
        # a user's, or a test's, have no page
        if not kind.__module__.startswith("torch"):
            continue
        form = "inputs and output gradients"
        if adapter.gradient_form:
            form = "flattened parameters"
        rows.append([f"`nn.{kind.__name__}`", form, summary(adapter)])
    return table_of(["module", "form", "what the adapter says"], rows)


def problem_table() -> str:
    """The problems that come along."""
    rows = []
    for name, about in problems.describe().items():
        rows.append([f"`{name}`", about.summary])
    return table_of(["problem", "what it is"], rows)


def measure_table() -> str:
    """The error measures with their formulas."""
    rows = []
    for name, measure in errors.MEASURES.items():
        when = "by default" if measure.default else "on request"
        if measure.damped:
            when = "per damping, on request"
        if measure.network:
            when = "of the whole network, by name only"
        if measure.network and measure.damped:
            when = "of the whole network per damping, by name only"
        public = getattr(errors, name)
        symbol = formula(public)
        text = f"${symbol}$" if symbol else summary(public)
        link = f"{{py:obj}}`{name} <fisher_lab.errors.{name}>`"
        # a bar would end the cell
        rows.append([link, text.replace("|", "\\|"), when])
    return table_of(["error", "formula", "measured"], rows)


def benchmarks(folder: Path) -> str:
    """All tables under docs/benchmarks, one after the other."""
    found = sorted(folder.glob("*.md"))
    if not found:
        return "No benchmark was run yet.\n"
    texts = []
    for path in found:
        text = "\n" + path.read_text(encoding="utf-8")
        # links are relative to docs/benchmarks.md there, and headings one level lower
        text = re.sub(r"\]\((?!https?:|#)", "](benchmarks/", text)
        texts.append(re.sub(r"\n(#+ )", r"\n#\1", text))
    return "\n".join(texts)


def summary(thing) -> str:
    """First paragraph of a docstring, in one line."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def entry(thing) -> str:
    """Sphinx's directive for a public thing, with the public members of a class."""
    if not inspect.isclass(thing):
        return f".. autofunction:: {public_path(thing)}\n"
    names = []
    for name, member in members(thing).items():
        target = member.fget if isinstance(member, property) else member
        target = getattr(target, "__func__", target)
        documented = inspect.isfunction(target) and target.__doc__
        if documented and not name.startswith("_"):
            names.append(name)
    text = f".. autoclass:: {public_path(thing)}\n"
    if names:
        text += f"   :members: {', '.join(names)}\n"
    return text


def formula(thing) -> str:
    """The formula of an error measure in LaTeX; nothing of what has none."""
    row = errors.MEASURES.get(getattr(thing, "__name__", ""))
    ours = row is not None and getattr(errors, row.name, None) is thing
    if not ours or not row.symbol.startswith("$"):
        return ""
    return row.symbol.strip("$")


def with_formula(app, what, name, obj, options, lines) -> None:  # noqa: ARG001 - sphinx asks so
    """Put the formula of an error measure in front of its docstring."""
    symbol = formula(obj)
    if symbol:
        lines[:0] = [f".. math:: {symbol}", ""]


def public_path(thing) -> str:
    """The shortest name that a thing is imported by."""
    name = thing.__qualname__
    for module in PLACES:
        if getattr(module, name, None) is thing:
            return f"{module.__name__}.{name}"
    return f"{thing.__module__}.{name}"


def members(cls: type) -> dict[str, object]:
    """What a class defines, and what it has of bases that are no entry of their own."""
    listed = [thing for section in API.values() for thing in section]
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        ours = base.__module__.startswith("fisher_lab.")
        if base is cls or (ours and base not in listed):
            found |= vars(base)
    return found


def _get_sg_image_scraper():
    """The gallery asks for this: our figures, which belong to no window, are found by
    their names.
    """
    return scrape


def scrape(block, block_vars, gallery_conf) -> str:  # noqa: ARG001 - the gallery calls it so
    """Save the figures that a block of an example made."""
    from matplotlib.figure import Figure
    from sphinx_gallery.scrapers import figure_rst

    # a script begins with three quotes; its title is the line below
    title = Path(block_vars["src_file"]).read_text(encoding="utf-8").splitlines()[1]
    paths = []
    for name, value in list(block_vars["example_globals"].items()):
        if isinstance(value, Figure):
            paths.append(next(block_vars["image_path_iterator"]))
            plots.save(value, paths[-1])
            del block_vars["example_globals"][name]
    return figure_rst(paths, gallery_conf["src_dir"], fig_titles=title)
