"""The benchmark's arithmetic and its faults. No test measures a time."""

import pytest

import store
from experiments import against, bench


def test_rounds_are_interleaved_and_the_first_is_not_timed(monkeypatch):
    """A busy minute slows all calls. Compiling on the first call slows none."""
    clock, order = [0.0], []
    durations = {"a": iter([100.0, 3.0, 2.0]), "b": iter([100.0, 5.0, 7.0])}

    def call(name):
        order.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    calls = {name: lambda name=name: call(name) for name in "ab"}
    assert bench.best_times(calls, 2) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3


@pytest.mark.heavy
def test_estimators_are_timed_with_windows_longer_than_the_horizon():
    """Each of the three, in multiples of PES."""
    build = bench.TASKS["quadratic"].build
    costs = bench.estimator_costs(build, {}, 2, 2500, 1)
    assert list(costs) == ["pes", "truncated_bptt", "merged"]
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
    """On stderr, with exit code 2, before anything is measured."""
    assert store.run_command("bench.py", bench.main, line.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "error, expected",
    [("ImportError", store.UserError), ("RuntimeError", RuntimeError)],
)
def test_library_that_does_not_import_is_one_line(
    error, expected, tmp_path, monkeypatch
):
    """Its own reason is kept. Other errors, as in JAX, are not blamed on it."""
    package = tmp_path / "learned_optimization"
    (package / "outer_trainers").mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error}('too old')\n")
    for name in ("path", "modules"):
        monkeypatch.setattr(against.sys, name, getattr(against.sys, name).copy())
    with pytest.raises(expected, match="^too old|does not import: too old$"):
        against.import_library(tmp_path, "tasks.base")
