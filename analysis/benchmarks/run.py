"""All benchmarks, or those named:
`python -m analysis.benchmarks.run [beside growth large vocabulary rates]`; `make benchmarks`.

Every measurement is a process of its own. Results, table and figure go to docs/benchmarks.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from analysis.benchmarks.pages import write

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
SAME = ["KFAC", "EKFAC"]  # what all three libraries know
TIMEOUT = 7200


def measure(repeats: int = 1, **asked: Any) -> dict[str, Any]:
    """Medians over processes of one measurement."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, "-m", "analysis.benchmarks.contender", json.dumps(asked)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{asked}: stopped after {TIMEOUT} s", flush=True)
            return {"asked": asked, "failed": f"stopped after {TIMEOUT} s"}
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"{asked}: {reason}", flush=True)
            return {"asked": asked, "failed": reason}
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    result = {"asked": asked, "values": runs[0]["values"], "routes": runs[0].get("routes")}
    for name in ("versions", "machine"):
        if name in runs[0]:
            result[name] = runs[0][name]
    for name in ("seconds", "processor", "whole", "peak_bytes", "product_rate"):
        result[name] = statistics.median(run[name] for run in runs)
    print(f"{asked}: {result['seconds']:.2f} s, {result['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return result


def beside() -> dict[str, Any]:
    """The Martens-Grosse network beside nngeometry and curvlinops."""
    found = {
        "fisher_lab, all approximations": measure(3, library="fisher_lab", case="martens_grosse"),
        "fisher_lab, KFAC and EKFAC": measure(
            3, library="fisher_lab", case="martens_grosse", approximations=SAME
        ),
    }
    for library in ("nngeometry", "curvlinops"):
        found[library] = measure(library=library, case="martens_grosse")
    # with torch's own norm of dense matrices, where the rows above use that these are symmetric
    options = {"norm": "singular values"}
    found["nngeometry, matrix_norm(2)"] = measure(
        library="nngeometry", case="martens_grosse", options=options
    )
    return found


def growth() -> dict[str, Any]:
    """Time and memory with width, examples and classes, of all approximations."""
    sweeps: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
        "width": ((250, 500, 1000), {"N": 500, "C": 10}),
        "N": ((250, 500, 1000, 2000), {"width": 250, "C": 10}),
        "C": ((5, 10, 20, 40), {"width": 250, "N": 250}),
    }
    return {
        name: [
            measure(library="fisher_lab", case="mlp", sizes={**fixed, name: value})
            for value in values
        ]
        for name, (values, fixed) in sweeps.items()
    }


def large() -> dict[str, Any]:
    """A million parameters a layer, a convolution, a whole ResNet-18."""
    return {
        "MLP 784-1000-1000-10, N = 1000": measure(library="fisher_lab", case="mlp"),
        "convolution 128 -> 128, 3x3 on 16x16, N = 200": measure(
            library="fisher_lab", case="conv", layers=["2"]
        ),
        "ResNet-18, 11 million parameters, N = 64, mc": measure(
            library="fisher_lab", case="resnet18", options={"fisher": "mc", "memory": 4.0}
        ),
    }


def vocabulary() -> dict[str, Any]:
    """A small GPT-2 with a vocabulary of real size, and such a head that is tied to nothing."""
    found = {}
    names = {"gpt2": "GPT-2 of two layers, tied", "head": "head of width 256, with a bias"}
    for case, V in (("gpt2", 5000), ("gpt2", 50_257), ("head", 50_257)):
        found[f"{names[case]}, V = {V:,}"] = measure(
            library="fisher_lab",
            case=case,
            sizes={"V": V},
            approximations=["KFAC", "EKFAC", "TN", "TKFAC"],
            options={"fisher": "mc", "memory": 3.0},
        )
    return found


def rates() -> dict[str, Any]:
    """How near the dominant phases of a layer with a million parameters come to the machine's
    matrix products.
    """
    return {"phases": measure(library="phases", case="mlp")}


PARTS = {
    "beside": beside,
    "growth": growth,
    "large": large,
    "vocabulary": vocabulary,
    "rates": rates,
}


def main() -> None:
    """Measure the named parts, keep the others' last results, and write the pages."""
    DOCS.mkdir(parents=True, exist_ok=True)
    path = DOCS / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in sys.argv[1:] or PARTS:
        results[name] = PARTS[name]() | {"load": os.getloadavg()[0], "cores": os.cpu_count()}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results, DOCS)


if __name__ == "__main__":
    main()
