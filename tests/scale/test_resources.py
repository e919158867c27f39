"""What only a process of its own shows: a killed run goes on, and memory stays within bounds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import sys, time, torch
from torch import nn
import fisher_lab as fl

class Slow(fl.KFAC):  # the third layer takes for ever
    calls = 0
    def assemble(self, moments, matrix=None):
        Slow.calls += 1
        if Slow.calls == 3 and sys.argv[2] == "stop":
            print("waiting", flush=True)
            time.sleep(600)
        return super().assemble(moments)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
x = torch.randn(20, 6)
found = fl.compare(model, nn.CrossEntropyLoss(), x,
                   [Slow(), fl.TN()], resume=sys.argv[1], progress=False, memory=1.0)
print(Slow.calls, [row.value for row in found.rows])
"""

MEMORY = """
import json, resource, sys, torch
from torch import nn
import fisher_lab as fl
width, N, memory = (int(v) for v in sys.argv[1:])
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).eval()
fl.compare(model, nn.CrossEntropyLoss(), torch.randn(2, 3, 12, 12), [fl.KFAC()], errors=["trace", "spectral"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = fl.compare(model, nn.CrossEntropyLoss(), torch.randn(N, 3, 12, 12), layers=["2"], fisher="mc",
                   errors=["trace", "frobenius", "spectral"], memory=memory / 2**10)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"grown": after - before, "route": found.settings["layers"]["2"]["route"]}))
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_a_run_killed_without_warning_goes_on_with_the_layers_it_had_finished(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.json"
    killed = python(KILLED, path, "stop")
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == "waiting"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    partial = json.loads(path.read_text(encoding="utf-8"))
    assert {row["layer"] for row in partial["rows"]} == {"0", "2"}
    resumed = output(python(KILLED, path, "go"))
    fresh = output(python(KILLED, tmp_path / "other.json", "go"))
    assert resumed.split(maxsplit=1)[0] == "1"  # only the third layer was built
    assert fresh.split(maxsplit=1)[0] == "3"
    assert resumed.split(maxsplit=1)[1] == fresh.split(maxsplit=1)[1]


@pytest.mark.parametrize(("width", "N", "memory"), [(32, 60, 200), (32, 60, 2000)])
def test_memory_stays_near_the_budget_and_small_budgets_choose_another_route(
    width: int, N: int, memory: int
) -> None:
    found = json.loads(output(python(MEMORY, width, N, memory)))
    assert found["grown"] < memory * 2**20 + 400e6  # working pieces of 64 MB each come on top
    assert found["route"] in (
        "columns, gradients formed once",
        "columns, gradients formed piece by piece",
    )


def test_columns_beyond_the_budget_are_read_anew_for_every_product() -> None:
    found = json.loads(output(python(MEMORY, 32, 150, 20)))
    assert found["grown"] < 420e6
    assert found["route"] == "columns, read anew for every product"
