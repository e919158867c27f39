"""Pages as tests read them, and comparison files in which every string is hostile."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HIT = "window.hit=1"
HOSTILE = {
    "script": f"<script>{HIT}</script>",
    "image": f'"><img src=x onerror={HIT}>',
    "load": f"' onload={HIT} x='",
    "focus": f'" tabindex=1 autofocus onfocus={HIT} x="',
    "svg": f"</svg><svg onload={HIT}>",
    "cdata": f"]]><script>{HIT}</script>",
    "comment": f"--!><script>{HIT}</script><!--",
    "elements": f"</title></style></textarea></select><script>{HIT}</script>",
    "end of script": f"</script><script>{HIT}</script>",
    "link": f"javascript:{HIT}",
    "outside": '"><img src="http://127.0.0.1:9/x.png"><link rel=stylesheet href="http://127.0.0.1:9/x.css">',
    "style": "x;background:url(http://127.0.0.1:9/x.png)",
    "template": "{{ 7*7 }}{0.__class__}%s${7*7}",
    "formula": r"$\undefined{$",
    "formulas": r"\$$\frac{1}{$ $x$",
    "controls": "\x00\x08\x1b[31m\x7f\x9b\r",
    "other way": "\u202egpj.exe",
    "folder": "../../escaped",
    "absolute": "/tmp/escaped",
    "empty": "",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.cdata_elem == "script":
            self.scripts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def hostile_file(path: Path, text: str, steps: int = 3) -> Path:
    """A comparison file with the text in front of every string, and as a further key of every table
    of settings.
    """
    body = _body(steps)
    version = {"format": body.pop("format"), "version": body.pop("version")}
    poisoned = {key: _poisoned(value, text) for key, value in body.items()}
    # a file with a text where numbers are expected is refused
    for number, quantity in enumerate(body["quantities"]):
        own = poisoned["quantities"][number]
        poisoned["quantities"][number] = {key: own[key] for key in quantity}
    path.write_text(json.dumps(version | poisoned))
    return path


def _poisoned(value: Any, text: str) -> Any:
    if isinstance(value, str):
        # The name of all layers together stays what it is, so that it is read as such.
        return value if value == "(all)" else text + value
    if isinstance(value, list):
        return [_poisoned(part, text) for part in value]
    if isinstance(value, dict):
        inner = {key: _poisoned(part, text) for key, part in value.items()}
        return inner | {text + key: part for key, part in inner.items()}
    return value


# a curve needs two dampings
MEASURED = (
    ("frobenius", None),
    ("damped_cosine", 0.1),
    ("damped_cosine", 1.0),
    ("spectral", 0.01),
    ("spectral", 0.1),
)


def _body(steps: int) -> dict[str, Any]:
    """What `compare` writes, by hand: a layer and all together, damped and undamped errors that
    have figures.
    """
    rows, costs, quantities, covariances = [], [], [], []
    places = [(layer, label) for layer in ("0", "(all)") for label in ("KFAC", "TN(modes=2)")]
    for index, (layer, label) in enumerate(places):
        for error, damping in MEASURED:
            row = {
                "layer": layer,
                "approximation": label,
                "error": error,
                "value": 0.1 * (index + 1),
                "noise": 1e-9,
            }
            rows.append(
                row | {"damping": damping, "checked": 1e-12, "fisher": "true", "stderr": 0.01}
            )
        if layer == "(all)":
            continue
        costs.append(
            {"layer": layer, "approximation": label, "seconds": 0.1, "bytes": 100 * (index + 1)}
        )
        traces = {"trace_exact": 2.0, "trace_approx": 2.1, "square": [1.0, 1e-9]}
        quantities.append({"layer": layer, "approximation": label, "damping": None, **traces})
        covariances.append(
            {"layer": layer, "error": "frobenius", "approximations": [label], "matrix": [[0.1]]}
        )
    about = {
        "type": "Linear",
        "shape": [3, 4],
        "bias": True,
        "route": "dense",
        "bytes": 8,
        "seconds": 0.1,
    }
    settings = {
        "problem": {"name": "toy", "steps": steps, "sha256": "0"},
        "model": "Sequential",
        "parameters": 27,
        "fisher": "true",
        "likelihood": "Categorical()",
        "N": 7,
        "R": 1,
        "output": [3],
        "seed": 0,
        "dtype": "float64",
        "device": "cpu",
        "exact": "captured",
        "layers": {"0": about},
        "left_out": {"norm": "no adapter"},
        "approximations": ["KFAC"],
        "candidates": {"KFAC": "KFAC()"},
        "errors": ["frobenius"],
        "dampings": [0.1],
        "fingerprint": "0",
        "versions": {"torch": "2"},
        "machine": "one",
        "date": "2024",
        "gradient": "of the data's labels",
        "complete": False,
        "note": "mine",
    }
    return {
        "format": "fisher_lab comparison", "version": 1, "settings": settings, "costs": costs,
        "quantities": quantities, "covariances": covariances, "rows": rows,
    }  # fmt: skip
