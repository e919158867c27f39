"""What the installed wheel does, far from the repository: run by the Python of the environment it
was installed into.

    python .ci/installed.py SOURCE [EXTRA ...]

SOURCE is the folder fisher_lab/ that the wheel was built from.

With the extra `data` everything works; without it, what needs its libraries says so in one
sentence. With `dev` the types of the package are seen by mypy.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

BIN = Path(sys.executable).parent
CURE = "pip install 'fisher-lab[data]'"
OWN = """
import torch
from torch import nn

def toy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    return net, nn.MSELoss(), torch.randn(20, 4)
"""
TO_FRAME = "import fisher_lab as fl; print(len(fl.load_comparison('{}').to_frame()) > 0)"
EVERY_PROBLEM = """
from fisher_lab import problems
for name in problems.describe():
    try:
        # as far as the problem has these settings
        problems.load(name, {"steps": 0, "examples": 20})
    except ValueError as error:
        print(error)
"""


def run(*command: str | Path, code: int = 0) -> str:
    """Run a command to the exit code it should have; what it printed, without any traceback."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    shown = " ".join(map(str, command))
    assert done.returncode == code, f"{shown}: exit code {done.returncode}, expected {code}\n{said}"
    assert "Traceback" not in said, f"{shown}:\n{said}"
    return said


def python(code: str) -> str:
    """What a few lines of Python print."""
    return run(sys.executable, "-c", code).strip()


def check_files(source: Path) -> None:
    """Every file of the package is installed: code, py.typed, the template, style and script of the
    report.
    """
    installed = Path(python("import fisher_lab; print(fisher_lab.__path__[0])"))
    assert installed.is_relative_to(sys.prefix), f"{installed} is not the installed package"
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    wanted = {path for path in wanted if path.suffix != ".pyc"}
    missing = [str(path) for path in sorted(wanted) if not (installed / path).is_file()]
    assert not missing, f"not in the wheel: {', '.join(missing)}"


def check_commands() -> None:
    """The command line starts, names its version and works on a problem of the user's own."""
    expected = f"fisher-lab {version('fisher-lab')}\n"
    assert run(BIN / "fisher-lab", "--version") == expected
    assert run(sys.executable, "-m", "fisher_lab", "--version") == expected
    assert "usage: fisher-lab" in run(BIN / "fisher-lab", "--help")
    assert "digits_mlp" in run(BIN / "fisher-lab", "problems")
    Path("own.py").write_text(OWN, encoding="utf-8")
    run(
        BIN / "fisher-lab",
        "compare",
        "--problem",
        "own.py:toy",
        "--errors",
        "all",
        "--output",
        "toy.json",
    )
    run(BIN / "fisher-lab", "report", "toy.json", "--output", "toy.html")
    assert "<style>" in Path("toy.html").read_text(encoding="utf-8")


def check_with_data() -> None:
    """The bundled problems and data frames work."""
    small = (
        "--approximations",
        "KFAC",
        "--steps",
        "2",
        "--examples",
        "20",
        "--output",
        "digits.json",
    )
    assert "saved to digits.json" in run(
        BIN / "fisher-lab", "compare", "--problem", "digits_mlp", *small
    )
    assert python(TO_FRAME.format("digits.json")) == "True"


def check_without_data() -> None:
    """What needs the extra says so in one line; nothing else needs it."""
    said = run(BIN / "fisher-lab", "compare", "--problem", "digits_mlp", code=2)
    print(said, end="")
    assert said.count("\n") == 1
    assert CURE in said
    refusals = python(EVERY_PROBLEM).splitlines()
    assert refusals
    assert all(CURE in line for line in refusals), refusals
    to_frame = TO_FRAME.format("toy.json")
    said = python(f"try:\n    {to_frame}\nexcept ValueError as error:\n    print(error)")
    print(said)
    assert said.startswith("Got no pandas")
    assert CURE in said


def check_problems() -> None:
    """The extra `data` is all that the bundled problems need."""
    assert python(EVERY_PROBLEM) == ""


def check_types() -> None:
    """A user's mypy sees the types of the package: a wrong argument is an error in her file."""
    Path("typed.py").write_text(
        "import fisher_lab as fl\nfl.NaturalGradient(model=3)\n", encoding="utf-8"
    )
    said = run(BIN / "mypy", "typed.py", code=1)
    assert "typed.py:2: error" in said
    assert "py.typed" not in said


def main(source: str, *extras: str) -> None:
    """Check the environment of this Python, which has these extras."""
    folder = Path(source).resolve()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        check_files(folder)
        if not extras:
            check_commands()
            check_without_data()
        else:
            check_with_data()
        if extras == ("data",):
            check_problems()
        if "dev" in extras:
            check_types()
        os.chdir("/")  # so that the folder can be removed


if __name__ == "__main__":
    main(*sys.argv[1:])
    print(f"the installed wheel works with the extras {', '.join(sys.argv[2:]) or '(none)'}")
