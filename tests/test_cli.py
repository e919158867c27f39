"""The command line: what it prints, saves and refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fisher_lab as fl
from fisher_lab import cli

OWN = '''
import torch
from torch import nn

def toy(n: int = 30):
    """A toy."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval(), nn.MSELoss(), torch.randn(n, 4)

def held():
    import time, fisher_lab as fl
    from pathlib import Path
    here = Path(__file__).parent
    class Held(fl.KFAC):
        def assemble(self, moments, matrix=None):
            # The second layer does not end before the test lets it.
            while (here / "hold").exists() and (here / ".run.partial.json").exists():
                time.sleep(0.02)
            return super().assemble(moments)
    return toy()
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:toy"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of one command."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    found = capsys.readouterr()
    return code, found.out, found.err


def test_compare_prints_a_table_time_and_memory_and_saves(capsys, tmp_path, own) -> None:
    path = tmp_path / "runs" / "own.json"
    code, out, _ = run(capsys, "compare", "--problem", own, "--set", "n=20", "--output", str(path))
    assert code == 0
    for word in ("frobenius", "KFAC", "LNGD", "(all)", "peak memory", "saved to", "N = 20"):
        assert word in out
    found = fl.load_comparison(path)
    assert found.settings["N"] == 20
    assert found.settings["complete"] is True
    assert [p.name for p in path.parent.iterdir()] == ["own.json"]


@pytest.mark.parametrize("left", ["", '{"rows": [', '{"note": "mine"}', "another run"])
def test_a_file_that_the_run_cannot_go_on_from_is_kept_and_said(
    capsys, tmp_path, own, left
) -> None:
    partial, aside = tmp_path / ".run.partial.json", tmp_path / ".run.partial.json.2"
    (tmp_path / ".run.partial.json.1").write_text("of an earlier time")
    common = ["compare", "--problem", own, "--approximations", "KFAC", "--quiet", "--output"]
    if left == "another run":
        run(capsys, *common, str(tmp_path / "other.json"), "--seed", "4")
        left = (tmp_path / "other.json").read_text()
    partial.write_text(left)
    code, _, err = run(capsys, *common, str(tmp_path / "run.json"))
    assert (code, err.count("\n")) == (0, 1)
    assert f"{partial} " in err
    assert f"kept as {aside.name}" in err
    assert (aside.read_text(), (tmp_path / ".run.partial.json.1").read_text()) == (
        left,
        "of an earlier time",
    )
    assert not partial.exists()
    assert fl.load_comparison(tmp_path / "run.json").settings["complete"] is True


def forged(path: Path) -> str:
    """A saved run with another number in it."""
    body = json.loads(path.read_text())
    for row in body["rows"]:
        row["value"] = 123.0
    return json.dumps(body)


def test_a_file_in_the_folder_for_temporary_files_is_not_trusted(
    capsys, tmp_path, monkeypatch, own
) -> None:
    temporary, saved = tmp_path / "temporary", tmp_path / "run.json"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    common = ["compare", "--problem", own, "--approximations", "KFAC"]
    run(capsys, *common, "--output", str(saved), "--quiet")
    foreseen = temporary / f"fisher-lab-{os.getpid()}.json"
    foreseen.write_text(forged(saved))
    code, out, _ = run(capsys, *common)
    assert code == 0
    assert "KFAC" in out
    assert "123" not in out
    assert [path.name for path in temporary.iterdir()] == [foreseen.name]


@pytest.mark.parametrize("what", ["link", "dangling link", "folder", "pipe", "of another user"])
def test_a_run_goes_on_from_a_regular_file_of_the_users_own_only(
    capsys, tmp_path, monkeypatch, own, what
) -> None:
    saved, partial, elsewhere = (
        tmp_path / "run.json",
        tmp_path / ".run.partial.json",
        tmp_path / "elsewhere.json",
    )
    common = [
        "compare",
        "--problem",
        own,
        "--approximations",
        "KFAC",
        "--output",
        str(saved),
        "--quiet",
    ]
    run(capsys, *common)
    content = forged(saved)
    saved.unlink()
    elsewhere.write_text(content)
    if what == "folder":
        partial.mkdir()
    elif what == "pipe":
        os.mkfifo(partial)
    elif what == "of another user":
        partial.write_text(content)
        monkeypatch.setattr("os.geteuid", lambda: partial.stat().st_uid + 1)
    else:
        partial.symlink_to(tmp_path / "nothing" if what == "dangling link" else elsewhere)
    code, out, err = run(capsys, *common)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "expected a regular file of your own" in err
    assert not saved.exists()
    assert elsewhere.read_text() == content
    assert not (tmp_path / "nothing").exists()
    assert os.path.lexists(partial)


def test_a_report_of_saved_runs_leaves_a_stopped_run_alone(capsys, tmp_path, own) -> None:
    saved, partial = tmp_path / "run.json", tmp_path / ".page.partial.json"
    run(
        capsys,
        "compare",
        "--problem",
        own,
        "--approximations",
        "KFAC",
        "--quiet",
        "--output",
        str(saved),
    )
    partial.write_text(saved.read_text())
    assert run(capsys, "report", str(saved), "--output", str(tmp_path / "page.html"))[0] == 0
    assert partial.exists()


def test_options_reach_compare(capsys, tmp_path, own) -> None:
    path = tmp_path / "own.csv"
    code, _, _ = run(
        capsys,
        "compare",
        "--problem",
        own,
        "--output",
        str(path),
        "--approximations",
        "KFAC",
        "MiniBlock(linear=col)",
        "--layers",
        "2",
        "--errors",
        "trace",
        "damped_spectral",
        "--dampings",
        "0.5",
        "--fisher",
        "mc",
        "--seed",
        "4",
        "--dtype",
        "float32",
        "--exact",
        "func",
        "--quiet",
    )
    assert code == 0
    found = fl.load_comparison(path)
    assert (found.layers, found.approximations) == (["2"], ["KFAC", "MiniBlock(linear=col)"])
    assert found.errors == ["trace", "damped_spectral"]
    assert {r.damping for r in found.rows} == {None, 0.5}
    settings = found.settings
    assert [settings[k] for k in ("fisher", "seed", "dtype", "exact")] == [
        "mc",
        4,
        "float32",
        "func",
    ]


def test_common_settings_reach_the_problem(capsys, tmp_path) -> None:
    path = tmp_path / "d.json"
    run(
        capsys,
        "compare",
        "--problem",
        "digits_mlp",
        "--steps",
        "3",
        "--examples",
        "25",
        "--output",
        str(path),
        "--quiet",
    )
    problem = json.loads(path.read_text())["settings"]["problem"]
    assert (problem["name"], problem["steps"], problem["examples"]) == ("digits_mlp", 3, 25)


def test_plot_and_report_read_saved_runs(capsys, tmp_path) -> None:
    files = []
    for steps in ("0", "5"):
        files.append(str(tmp_path / f"at{steps}.json"))
        run(
            capsys,
            "compare",
            "--problem",
            "iris_regression",
            "--steps",
            steps,
            "--approximations",
            "KFAC",
            "TN",
            "--output",
            files[-1],
            "--quiet",
        )
    code, out, _ = run(
        capsys, "plot", *files, "--output", str(tmp_path / "figures"), "--form", "png"
    )
    assert code == 0
    made = {Path(line).name for line in out.split()}
    assert {"at0-errors-frobenius.png", "at5-cost.png", "training-frobenius.png"} <= made
    assert all((tmp_path / "figures" / name).stat().st_size > 1000 for name in made)
    code, out, _ = run(capsys, "report", *files, "--output", str(tmp_path / "report.html"))
    assert (code, out.strip()) == (0, str(tmp_path / "report.html"))
    assert "iris_regression" in (tmp_path / "report.html").read_text()
    code, out, _ = run(
        capsys,
        "report",
        "--problem",
        "iris_regression",
        "--steps",
        "0",
        "--output",
        str(tmp_path / "b.html"),
    )
    assert code == 0
    assert "damped" in (tmp_path / "b.html").read_text()
    assert run(capsys, "plot")[0] == 2
    assert (
        run(capsys, "report", str(tmp_path / "nothing.json"), "--output", str(tmp_path / "c.html"))[
            0
        ]
        == 2
    )


def test_train_writes_metrics_and_goes_on(capsys, tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    common = [
        "train",
        "--problem",
        "digits_mlp",
        "--optimizer",
        "EKFAC",
        "--option",
        "observe_every=2",
    ]
    code, out, _ = run(capsys, *common, "--epochs", "2", "--output", str(path))
    assert (code, out.count("epoch")) == (0, 2)
    code, out, _ = run(capsys, *common, "--epochs", "3", "--output", str(path), "--resume")
    assert (code, out.count("epoch")) == (0, 3)
    straight = tmp_path / "straight.jsonl"
    run(capsys, *common, "--epochs", "3", "--output", str(straight), "--quiet")
    losses = [
        [json.loads(line)["loss"] for line in p.read_text().splitlines()] for p in (path, straight)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_tune_lists_the_best_first(capsys, tmp_path) -> None:
    arguments = [
        "tune",
        "--problem",
        "digits_mlp",
        "--optimizer",
        "KFAC",
        "--lrs",
        "1e-5",
        "0.05",
        "--dampings",
        "1",
    ]
    code, out, _ = run(capsys, *arguments, "--epochs", "2", "--output", str(tmp_path / "t.json"))
    assert code == 0
    assert "lr 0.05" in out.splitlines()[0]


@pytest.mark.parametrize(
    "arguments", [["--optimizer", "nope"], ["--problem", "nope"], ["--epochs", "0"]]
)
def test_bad_training_is_refused(capsys, arguments) -> None:
    code, out, err = run(capsys, "train", "--problem", "digits_mlp", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_problems_lists_all(capsys) -> None:
    code, out, _ = run(capsys, "problems")
    assert code == 0
    for name in ("martens_grosse", "digits_mlp", "mnist_autoencoder", "iris_regression"):
        assert name in out


def test_the_version_is_that_of_the_package(capsys) -> None:
    assert run(capsys, "--version") == (0, f"fisher-lab {fl.__version__}\n", "")
    assert "--version" in run(capsys, "--help")[1]


def test_help_explains_itself(capsys) -> None:
    code, out, _ = run(capsys, "compare", "--help")
    assert code == 0
    for word in ("--problem", "--output", "--steps", "--errors", "exact Fisher"):
        assert word in out


def test_a_message_commands_no_terminal(capsys, tmp_path) -> None:
    (tmp_path / "own.py").write_text("def red():\n    raise ValueError('\\x1b[31mred')\n")
    code, _, err = run(capsys, "compare", "--problem", f"{tmp_path / 'own.py'}:red")
    assert code == 1
    assert "ValueError: \N{REPLACEMENT CHARACTER}[31mred\n" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("command", ["compare", "report", "train", "tune"])
def test_help_says_that_a_file_given_as_problem_runs(capsys, command) -> None:
    _, out, _ = run(capsys, command, "--help")
    assert "the last two run that code" in " ".join(re.sub("[│╭╰─╮╯]", " ", out).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "nope"], "no problem named 'nope'"),
        (["--problem", "digits_mlp", "--approximations", "FKAC"], "Got approximation 'FKAC'"),
        (["--problem", "digits_mlp", "--approximations", "KFAC(spatial=x)"], "spatial='x'"),
        (
            ["--problem", "digits_mlp", "--approximations", "KFAC(color=red)"],
            "options that KFAC has",
        ),
        (
            ["--problem", "digits_mlp", "--output", "run.txt"],
            "expected one ending in .json or .csv",
        ),
        (["--problem", "digits_mlp", "--set", "steps"], "expected name=value"),
        (["--problem", "digits_mlp", "--set", "colour=red"], "no setting 'colour'"),
        (["--problem", "digits_mlp", "--errors", "wrong"], "Got error 'wrong'"),
        (["--problem", "digits_mlp", "--layers", "99"], "Got layer '99'"),
        (["--problem", "digits_mlp", "--output", "/proc/nowhere/run.json"], "cannot be"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, arguments, message) -> None:
    code, out, err = run(capsys, "compare", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def heed_interrupts() -> None:
    """A shell starts what runs in its background with interrupts ignored, and children
    inherit it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_stopped_run_keeps_what_it_finished_and_goes_on(tmp_path, own) -> None:
    path = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "fisher_lab",
        "compare",
        "--problem",
        own.replace(":toy", ":held"),
        "--output",
        str(path),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fl.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    hold = tmp_path / "hold"
    hold.touch()
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=heed_interrupts,
    )
    partial = tmp_path / ".run.partial.json"
    for _ in range(2000):
        if partial.exists() and fl.load_comparison(partial).layers == ["0"]:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert not path.exists()
    assert fl.load_comparison(partial).layers == ["0"]
    hold.unlink()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert fl.load_comparison(path).layers == ["0", "2"]
    assert not partial.exists()


def test_the_result_is_saved_though_nobody_listens(own: str, tmp_path: Path) -> None:
    """Output that cannot be written costs no result: the file comes first."""
    path = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "fisher_lab",
        "compare",
        "--problem",
        own,
        "--output",
        str(path),
    ]
    with open("/dev/full", "w", encoding="utf-8") as full:
        subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False)
    assert fl.load_comparison(path).rows


@pytest.mark.parametrize("command", ["--version", "problems"])
def test_a_reader_that_leaves_early_sees_no_traceback(command: str) -> None:
    """As in `fisher-lab problems | head -1`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fl.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fisher_lab", command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (1, 141)  # 1 where rich was the one who wrote
    assert said == b""


# -- mistakes and their nearest names --------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["--approximations", "kfac"], "did you mean 'KFAC'?"),
        (["--approximations", "Miniblock(linear=col)"], "did you mean 'MiniBlock'?"),
        (["--errors", "frobenus"], "did you mean 'frobenius'?"),
        (["--sort", "spectra"], "did you mean 'spectral'?"),
        (["--problem", "martens_gross"], "did you mean 'martens_grosse'?"),
        (["--problem", "iris_regression", "--set", "step=3"], "did you mean 'steps'?"),
    ],
)
def test_the_nearest_name_is_suggested(capsys, arguments, guess) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", *arguments])
    assert guess in capsys.readouterr().err


def test_a_debugged_mistake_keeps_its_traceback(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--errors", "frobenus", "--debug"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "did you mean 'frobenius'?" in said


def test_an_error_of_other_code_keeps_its_traceback(capsys, tmp_path) -> None:
    """It was printed as a sentence, as if the user had given something wrong."""
    own = tmp_path / "own.py"
    own.write_text("def broken():\n    return int('seven')\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--problem", f"{own}:broken"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert 'own.py", line 2, in broken' in said
    assert "ValueError: invalid literal" in said
