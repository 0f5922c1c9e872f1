"""Many recipes at once: each run is the run that train.py makes alone."""

import json

import jax
import numpy as np
import pytest

import store
import train
from experiments import search
from tasks import TASKS

FIXED = {"task": "quadratic", "steps": 10, "horizon": 20, "truncation": 5}


def test_candidates_share_a_program_unless_its_shape_differs():
    """Numbers among TRACED are data of one program. The estimator makes another."""
    candidates = [FIXED, FIXED | {"sigma": 0.1}, FIXED | {"estimator": "pes"}]
    groups = search.groups_of(candidates)
    assert list(groups.values()) == [candidates[:2], candidates[2:]]
    numbers = search.numbers_of(candidates[:2], 2)
    np.testing.assert_allclose(numbers["sigma"], [0.02, 0.02, 0.1, 0.1])
    assert numbers["seed"].tolist() == [0, 1, 0, 1]


def test_a_nominal_term_is_refused():
    with pytest.raises(store.UserError, match="nominal"):
        search.groups_of([FIXED | {"nominal": "sgd"}])


@pytest.mark.heavy
def test_a_run_among_many_is_that_of_train_py(tmp_path):
    """Theta after ten meta-steps, of the second candidate on seed 1, and a row for each."""
    lines = [FIXED, FIXED | {"sigma": 0.1, "beta3": 1e-4}]
    lines += [FIXED | {"optimizer": "blackbox"}]  # of another shape
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = [str(tmp_path / "c.jsonl"), "--task", "quadratic", "--seeds", "2"]
    assert search.main([*argv, "--out", str(tmp_path)]) == 0
    recipe = train.Recipe(**lines[1], seed=1)
    made = train.parts(recipe, TASKS["quadratic"].build)
    state, key = train.init_state(recipe, made, {}), train.run_keys(recipe)[2]
    step = jax.jit(lambda state: train.meta_step(recipe, made, {}, key, state)[0])
    for _ in range(10):
        state = step(state)
    alone = store.unravel_of(made.optimizer)(state.theta)
    found = np.load(tmp_path / "thetas-0.npz")
    for name, x in alone.items():
        np.testing.assert_allclose(found[name][3], x, rtol=1e-4, atol=1e-6)
    text = (tmp_path / "results.json").read_text()
    rows = json.loads(text)["rows"]
    based = '{"base": {"a": 1, "b": 1}, "rows": [{"candidate": {"b": 2}}]}'
    assert search.read_candidates(based) == [{"a": 1, "b": 2}]
    again = search.read_candidates(text)
    assert sorted(map(str, again)) == sorted(str(row["candidate"]) for row in rows)
    assert len(rows) == 3 and all(len(row["loss"]) == 2 for row in rows)
