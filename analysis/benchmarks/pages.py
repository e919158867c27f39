"""The benchmarks' table and figure."""

from pathlib import Path
from typing import Any

from fisher_lab.plots.output import save
from fisher_lab.plots.style import EXACT, Style, new_figure, styled, styles

HEAD = """# Benchmarks

Every row is a process of its own; time is that of the work, memory the peak of the whole process,
the rate that of a 2000 x 2000 float64 matrix product measured in the same process just after.
`make benchmarks` writes this page anew.
"""


def _row(name: str, found: dict[str, Any], base: dict[str, Any] | None = None) -> str:
    if "failed" in found:
        return f"| {name} | failed: {found['failed'][:80]} | | | |"
    ratio = ""
    if base and "seconds" in base and base is not found:
        times, memory = found["seconds"] / base["seconds"], found["peak_bytes"] / base["peak_bytes"]
        ratio = f"{times:.1f} x time, {memory:.1f} x memory"
    rate = found["product_rate"] / 1e9
    seconds = f"{found['seconds']:.2f} s"
    peak = f"{found['peak_bytes'] / 1e6:.0f} MB"
    return f"| {name} | {seconds} | {peak} | {rate:.0f} Gflop/s | {ratio} |"


def _table(rows: list[str]) -> str:
    return "\n".join(
        [
            "| | time | peak memory | machine | against the first row |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _alike(found: dict[str, Any]) -> str:
    """The others against ours with the same two approximations, and the largest difference of the
    errors.
    """
    ours = found["fisher_lab, KFAC and EKFAC"]
    lines = []
    for name, theirs in found.items():
        if name.startswith("fisher_lab") or "failed" in ours or "failed" in theirs:
            continue
        time, memory = (
            theirs["seconds"] / ours["seconds"],
            theirs["peak_bytes"] / ours["peak_bytes"],
        )
        worst = max(abs(ours["values"][key] - value) for key, value in theirs["values"].items())
        lines.append(
            f"- {name}: {time:.0f} x the time and {memory:.1f} x the memory of the same two "
            f"approximations; its {len(theirs['values'])} errors and ours differ by at most "
            f"{worst:.1e}."
        )
    return "\n".join(lines)


def _vocabulary(results: dict[str, Any]) -> list[str]:
    """The section of large vocabularies."""
    found = {name: row for name, row in results.items() if isinstance(row, dict)}
    rows = []
    for name, row in found.items():
        processor = f"{row['processor']:.0f} s of processors" if "processor" in row else ""
        rows.append(_row(name, row).removesuffix("|") + f"{processor} |")
    parts = [
        "## Vocabularies: all layers, fisher=mc, KFAC, EKFAC, TN and TKFAC, three errors\n",
        "64 sequences of 128 tokens, memory=3 GiB. Factors over the vocabulary are diagonals.\n",
        _table(rows) + "\n",
    ]
    measured = next((row for row in found.values() if "versions" in row), None)
    if measured is not None:
        versions = ", ".join(f"{name} {text}" for name, text in measured["versions"].items())
        parts.append(f"{measured['machine']}; {versions}.\n")
    return parts


def write(results: dict[str, Any], folder: Path) -> None:
    """README.md and growth.svg."""
    parts = [HEAD]
    if "beside" in results:
        found = {k: v for k, v in results["beside"].items() if isinstance(v, dict)}
        first = next(iter(found.values()))
        parts += [
            "## Beside other libraries: 256-20-20-20-20-20-10, N = 1000, C = 10\n",
            "Exact blocks, approximations (the others: KFAC and EKFAC), trace, Frobenius and "
            "spectral error.\n",
            _table([_row(name, row, first) for name, row in found.items()]) + "\n",
            _alike(found) + "\n",
        ]
    if "large" in results:
        found = {k: v for k, v in results["large"].items() if isinstance(v, dict)}
        rows = [_row(name, row) for name, row in found.items()]
        parts += ["## Large layers: all approximations, three errors\n", _table(rows) + "\n"]
    if "vocabulary" in results:
        parts += _vocabulary(results["vocabulary"])
    if "rates" in results:
        found = results["rates"]["phases"]
        rows = [
            f"| {name} | {rate / 1e9:.0f} Gflop/s | {rate / found['product_rate']:.2f} |"
            for name, rate in found["values"].items()
        ]
        head = [
            "| phase, layer 1000 x 1001, N = 1000 | rate | of the machine's matrix product |",
            "|---|---|---|",
        ]
        parts += ["## Rates of the dominant phases\n", "\n".join([*head, *rows]) + "\n"]
    if "growth" in results:
        parts += ["## Growth: 784-width-width-C, all approximations, three errors\n"]
        for name in ("width", "N", "C"):
            rows = [_row(f"{name} = {row['asked']['sizes'][name]}", row, results["growth"][name][0])
                    for row in results["growth"][name]]  # fmt: skip
            parts += [_table(rows) + "\n"]
        _figure(results["growth"], folder / "growth.svg")
        parts += ["![Time and memory as width, N and C grow](growth.svg)\n"]
    loads = ", ".join(
        f"{name}: load {part['load']:.1f} on {part['cores']} cores"
        for name, part in results.items()
    )
    parts += [f"Machine while measuring: {loads}.\n"]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


@styled
def _figure(growth: dict[str, Any], path: Path) -> Any:
    figure = new_figure(10, 3.2)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(panels, ("width", "N", "C"), strict=True):
        rows = [row for row in growth[name] if "seconds" in row]
        sizes = [row["asked"]["sizes"][name] for row in rows]
        axes.loglog(sizes, [row["seconds"] for row in rows], "o-", color="#0072B2", label="seconds")
        axes.loglog(
            sizes,
            [row["peak_bytes"] / 1e9 for row in rows],
            "s--",
            color="#D55E00",
            label="peak memory, GB",
        )
        axes.set_xlabel(name)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yticks(ticks := [0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    panels[0].legend()
    save(figure, path)
    return figure


@styled
def training_figure(finals: dict[str, Any], path: Path) -> Any:
    """Training losses of the tuned optimizers against epochs and against seconds."""
    measured = {"TNT": "TN", "MBF": "MiniBlock"}  # drawn as the approximation behind them
    chosen: dict[str, Style] = styles(measured.get(name, name) for name in finals)
    plain = {"SGD momentum": EXACT._replace(line="--"), "Adam": EXACT._replace(line=":")}
    figure = new_figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for name, row in finals.items():
        style = plain.get(name) or chosen[measured.get(name, name)]
        losses = [loss if loss < 1e3 else float("nan") for loss in row["losses"]]
        epochs = range(1, len(losses) + 1)
        for axes, x in zip(panels, (epochs, row["seconds"]), strict=True):
            every = {"marker": style.marker, "markevery": max(1, len(losses) // 10)}
            axes.plot(x, losses, style.line, color=style.color, label=name, **every)
    for axes, label in zip(panels, ("epochs", "seconds of training"), strict=True):
        axes.set(xlabel=label, yscale="log")
        axes.set_yticks(ticks := [50, 70, 100, 150, 200, 300, 500], [str(tick) for tick in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("training loss per image")
    panels[1].legend(ncols=2)
    save(figure, path)
    return figure
