"""`torchrun -m fisher_lab`: one output, one file, one sentence."""

import json
import subprocess
import sys

import pytest

import fisher_lab as fl
from fisher_lab.cli import main

COMPARE = ["compare", "--problem", "iris_regression", "--approximations", "KFAC()", "TN()"]


def torchrun(*arguments, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--standalone", "-m", "fisher_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def test_compare_prints_and_writes_once(tmp_path):
    run = torchrun(*COMPARE, "--output", str(tmp_path / "two.json"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("saved to") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two.json"]
    main([*COMPARE, "--output", str(tmp_path / "one.json")])
    two = fl.load_comparison(tmp_path / "two.json")
    one = fl.load_comparison(tmp_path / "one.json")
    assert two.rows == one.rows
    assert two.settings.machine.endswith(", 2 processes")
    assert run.stdout.count("true Fisher") == 1


def test_a_refusal_is_told_once(tmp_path):
    run = torchrun(*COMPARE, "--errors", "nothing")
    assert run.returncode != 0
    assert run.stderr.count("fisher-lab: ") == 1
    assert "nothing" in run.stderr


def test_train_writes_once_what_one_process_writes(tmp_path):
    asked = ["train", "--problem", "iris_regression", "--optimizer", "KFAC", "--epochs", "2"]
    asked += ["--batch", "20", "--output"]
    run = torchrun(*asked, str(tmp_path / "two.jsonl"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.jsonl", "two.pt"]
    main([*asked, str(tmp_path / "one.jsonl")])
    two, one = (losses(tmp_path / f"{name}.jsonl") for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)  # in float32


def losses(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]
