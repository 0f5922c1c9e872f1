"""The benchmark's arithmetic and its faults; no test measures a time."""

import types

import numpy as np
import pytest

import store
import tasks
from experiments import against, bench


def run(line: str) -> int:
    return store.run_command("bench.py", bench.main, line.split())


def test_slope_of_a_power_law():
    x = np.array([1.0, 10, 300])
    assert bench.log_slope(x, 7 * x**1.5) == pytest.approx(1.5)


def test_growth_with_parameters_leaves_small_tensors_out():
    updates = {
        "128": {"star": 1e9},
        "200x100": {"star": 2.0},
        "20x100x20": {"star": 4.0},
    }
    grown = bench.update_growth(updates)["parameters"]
    assert grown["values"] == [20_000, 40_000]
    assert grown["slope"] == pytest.approx(1)
    assert bench.update_growth({"128": {"star": 1.0}, "200x100": {"star": 2.0}}) == {}


def test_rounds_are_interleaved_and_the_first_is_not_timed(monkeypatch):
    clock, order = [0.0], []
    durations = {"a": iter([100.0, 3.0, 2.0]), "b": iter([100.0, 5.0, 7.0])}

    def call(name):
        def run():
            order.append(name)
            clock[0] += next(durations[name])

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    best = bench.best_times({"a": call("a"), "b": call("b")}, 2)
    assert best == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3


@pytest.mark.heavy
def test_estimators_are_timed_with_windows_longer_than_the_horizon():
    data, _ = tasks.TASKS["quadratic"].load()
    costs = bench.estimator_costs("quadratic", data, 2, 2500, 1)
    assert list(costs) == list(bench.TIMED)
    assert costs["pes"]["of_pes"] == 1
    assert all(row["seconds"] > 0 for row in costs.values())


@pytest.mark.parametrize(
    "line, said",
    [
        ("--particles 1", "--particles must be at least 2"),
        ("--truncation 0", "--truncation at least 1"),
        ("--task nowhere", "nowhere"),
        ("--against nowhere", "nowhere does not hold the package learned_optimization"),
    ],
)
def test_faults_are_one_line(line, said, capsys):
    assert run(line) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_library_that_does_not_import_is_one_line(tmp_path, monkeypatch):
    package = tmp_path / "learned_optimization"
    (package / "outer_trainers").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('too old')\n")
    for name in ("path", "modules"):
        monkeypatch.setattr(against.sys, name, getattr(against.sys, name).copy())
    against.check(tmp_path)
    with pytest.raises(store.UserError, match="does not import: too old"):
        against.import_release(tmp_path)


def test_names_gone_from_jax_are_put_back():
    module = types.SimpleNamespace(tree_map="its own", lib=types.SimpleNamespace())
    against.restore_names(module)
    assert module.tree_map == "its own"
    assert module.tree_multimap(lambda x, y: x + y, (1, 2), (3, 4)) == (4, 6)
    assert module.tree_leaves({"a": 1}) == [1]
