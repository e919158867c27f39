"""compare, estimate and exact_fisher on several ranks: what one process says, bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._ground.ranks import dealt
from tests.ranks.crew import rank

WORLDS = (2, 3)


def question(layers=3, N=12):
    torch.manual_seed(0)
    modules = []
    for _ in range(layers):
        modules += [nn.Linear(5, 5), nn.Tanh()]
    model = nn.Sequential(*modules, nn.Linear(5, 3)).double()
    x = torch.randn(N, 5, dtype=torch.float64)
    y = torch.randint(0, 3, (N,))
    return model, nn.CrossEntropyLoss(), (x, y)


CASES = {
    "default": {},
    "all errors, sampled labels": {"errors": "all", "fisher": "mc"},
    "standard errors": {"standard_errors": True, "dampings": (0.1,)},
    "steps of the network": {"errors": ["network_efficiency", "off_block"], "dampings": (0.1,)},
    "func": {"exact": "func"},
    "in pieces": {"memory": 3e-5, "errors": ["frobenius", "trace"]},
    "empirical": {"fisher": "empirical"},
}
APPROXIMATIONS = (fl.KFAC(), fl.TN(), fl.EKFAC())


def measured(case):
    return fl.compare(*question(), APPROXIMATIONS, **CASES[case])


def numbers(comparison):
    """Everything but times and places."""
    return comparison.rows, comparison.quantities, comparison.covariances, comparison.layers


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_returns_what_one_process_returns_bit_for_bit(crews, world):
    for case in CASES:
        alone = measured(case)
        for found in crews.of(world).run(measured, case):
            assert repr(numbers(found)) == repr(numbers(alone)), case
            assert list(found.settings.layers) == list(alone.settings.layers)
            assert found.settings.fingerprint == alone.settings.fingerprint
            assert found.settings.machine.endswith(f", {world} processes")


def measured_with_log():
    """The layers that this rank measured itself."""
    from fisher_lab.diagnose import dealing

    seen = []
    plain = dealing.measure_group

    def watched(asked, group, *rest):
        seen.extend(group.names)
        yield from plain(asked, group, *rest)

    dealing.measure_group = watched
    try:
        measured("default")
    finally:
        dealing.measure_group = plain
    return seen


def test_every_layer_is_measured_by_one_rank(crews):
    parts = crews.of(3).run(measured_with_log)
    together = [name for part in parts for name in part]
    assert sorted(together) == ["0", "2", "4", "6"]
    assert all(parts)


def test_a_rank_without_a_layer_takes_part(crews):
    found = crews.of(3).run(one_layer)
    assert [repr(numbers(c)) for c in found] == [repr(numbers(one_layer()))] * 3


def one_layer():
    return fl.compare(*question(), [fl.KFAC()], layers=["2"])


def estimated(world_of_one=False):
    model, loss, data = question()
    found = fl.estimate(fl.EKFAC(), model, loss, data)
    truth = fl.exact_fisher(model, loss, data)
    return {name: (found[name].dense(), truth[name].dense()) for name in list(found)}, list(truth)


def test_estimates_and_exact_blocks_are_those_of_one_process(crews):
    alone, order = estimated()
    for found, names in crews.of(2).run(estimated):
        assert list(found) == list(alone)
        assert names == order
        for name, pair in found.items():
            assert torch.equal(pair[0], alone[name][0])
            assert torch.equal(pair[1], alone[name][1])


def other_data(function):
    model, loss, (x, y) = question()
    return function(model, loss, (x + rank(), y))


def compare_other_data():
    return other_data(lambda *given: fl.compare(*given, [fl.KFAC()]))


def estimate_other_data():
    return other_data(lambda *given: fl.estimate(fl.KFAC(), *given))


@pytest.mark.parametrize("function", [compare_other_data, estimate_other_data])
def test_ranks_with_different_data_are_refused(crews, function):
    for error in crews.of(2).errors(function):
        assert "Rank 1 got another model or other data than rank 0" in error


class OwnError(RuntimeError):
    """Of a user's own."""


def one_raises(phase):
    from fisher_lab.diagnose import dealing

    plain = dealing.measure_group

    def exploding(*given):
        raise OwnError("no matrix today")

    approximation = fl.KFAC()
    if rank() == 1 and phase == "before":
        approximation = "no approximation"
    if rank() == 1 and phase == "measuring":
        dealing.measure_group = exploding
    try:
        return fl.compare(*question(), {"A": approximation})
    finally:
        dealing.measure_group = plain


@pytest.mark.parametrize(
    ("phase", "words"), [("before", "no approximation"), ("measuring", "no matrix today")]
)
def test_an_exception_on_one_rank_ends_all_with_its_sentence(crews, phase, words):
    for error in crews.of(2).errors(one_raises, phase):
        sentence, note = error.splitlines()[-2:]
        assert words in sentence
        assert note == "on rank 1 of 2"
    # the group goes on
    assert len(crews.of(2).run(one_layer)) == 2


def resumed(path):
    found = fl.compare(*question(), APPROXIMATIONS, resume=path)
    with open(path) as file:
        return repr(found.rows), json.load(file)["settings"]["complete"]


def test_a_file_is_written_by_rank_0_and_gone_on_with(crews, tmp_path):
    path = tmp_path / "partial.json"
    alone = repr(measured("default").rows)
    for world in (2, 3):  # then what is whole is read by all
        for found, complete in crews.of(world).run(resumed, str(path)):
            assert found == alone
            assert complete
    path.unlink()
    stopped = fl.compare(*question(), APPROXIMATIONS, resume=path)
    text = path.read_text()
    assert stopped.settings.complete
    # an unfinished file: the rows of two layers
    rows = tuple(row for row in stopped.rows if row.layer in ("0", "4"))
    settings = type(stopped.settings)(stopped.settings, complete=False)
    replace(stopped, rows=rows, settings=settings).save(path)
    assert path.read_text() != text
    for found, complete in crews.of(2).run(resumed, str(path)):
        assert found == alone
        assert complete


def alone_in_a_group():
    group = torch.distributed.new_group([rank()], use_local_synchronization=True)
    if rank() == 0:  # the other one does not come
        return repr(numbers(fl.compare(*question(), [fl.KFAC()], group=group)))
    return None


def test_a_group_of_one_rank_measures_alone(crews):
    found, nothing = crews.of(2).run(alone_in_a_group)
    assert nothing is None
    assert found == repr(numbers(fl.compare(*question(), [fl.KFAC()])))


def test_the_dearest_work_is_dealt_first():
    costs = {"a": 1.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 3.0}
    assert dealt(costs, 2) == [["b", "e"], ["a", "c", "d"]]
    assert dealt(costs, 1) == [["a", "b", "c", "d", "e"]]
    assert dealt({"a": 1.0}, 3) == [["a"], [], []]
