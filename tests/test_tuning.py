"""Hand-designed optimizers against plain loops and optax, searches, and files."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import baselines
import eval as evaluation
from baselines import BASELINES, as_theta, curves, ema
from experiments import tuning
from experiments.tuning import candidates, load_tuned, nadamw_config, nadamw_theta, tune
from store import run_command, write_atomically
from tasks import TASKS

STEPS = 20
START = np.array([0.5, -1.0, 2.0], np.float32)
GRADS = np.random.RandomState(0).normal(size=(STEPS, 3)).astype(np.float32)


def trajectory(optimizer, theta):
    """Parameters (STEPS, 3) after each of the updates with GRADS."""

    def one(carry, g):
        params, state = carry
        updates, state = optimizer.update(theta, g, state, params)
        return (params + updates, state), params + updates

    params = jnp.array(START)
    return jax.lax.scan(one, (params, optimizer.init(params)), jnp.array(GRADS))[1]


nadamw_trajectory = jax.jit(partial(trajectory, BASELINES["nadamw"]))
ADAM = baselines.from_optax(optax.adam, {"learning_rate": 0.01})
RATE = as_theta({"learning_rate": 0.01})


def plain_nadamw(c, quirks):
    """The recipe in float64, step by step, from a configuration as drawn."""
    b1, b2 = float(np.float32(c["b1"])), float(np.float32(c["b2"]))
    p, m, v, out = START.astype(np.float64), 0.0, 0.0, []
    constant = c["constant"] * STEPS
    warm = STEPS * (max if quirks else min)(c["warmup"], c["constant"])
    low = c["min_multiplier"] * c["learning_rate"]
    for s in range(STEPS):
        rate = c["learning_rate"]
        if c["warmup"] > 0 and s < warm:
            rate *= s / warm
        elif s >= constant:
            half = math.cos(math.pi * (s - constant) / (STEPS - constant)) / 2 + 0.5
            rate = low + (rate - low) * half
        g = GRADS[s] + (-1 if quirks else 1) * c["l2"] * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        a = rate * math.sqrt(1 - b2 ** (s + 1)) / (1 - b1 ** (s + 1))
        u = b1 * m + (1 - b1) * g if c["nesterov"] else m
        p = p - a * (u / (np.sqrt(v) + c["eps"]) + c["weight_decay"] * p)
        out.append(p)
    return np.array(out)


ALL = dict(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-3, nesterov=1.0, weight_decay=0.1)
ALL |= dict(l2=0.1, warmup=0.3, min_multiplier=0.2, constant=0.6)
SHORT = ALL | {"constant": 0.1, "nesterov": 0.0}


@pytest.mark.parametrize("config", [ALL, SHORT, *map(nadamw_config, (251, 25, 865))])
def test_nadamw_is_the_plain_loop(config):
    """Update, warm-up, constant part and cosine, in the documented form and the code's."""
    for quirks in (False, True):
        ours = nadamw_trajectory(as_theta(nadamw_theta(config, STEPS, quirks)))
        expected = plain_nadamw(config, quirks)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_nadamw_without_its_additions_is_adam():
    """No nesterov, no decay. What theta leaves out has values that do nothing."""
    ours = nadamw_trajectory(RATE | as_theta({"nesterov": 0.0, "weight_decay": 0.0}))
    np.testing.assert_allclose(ours, trajectory(ADAM, RATE), rtol=1e-5, atol=1e-6)


def test_adam8_is_adam_with_decays_and_penalties():
    """lr exp(-a s) (1 - b s) on the gradient + l1 sign(p) + l2 p. The rate alone: Adam."""
    theta = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3}
    more = {"exponential_decay": 0.05, "linear_decay": 0.06, "l1": 0.2, "l2": 0.3}
    ours = trajectory(tuning.OPTIMIZERS["adam8"], as_theta(theta | more))
    rates = [0.1 * math.exp(-0.05 * s) * max(1 - 0.06 * s, 0) for s in range(STEPS)]
    adam, p = optax.adam(jnp.array(rates).__getitem__, 0.8, 0.95, 1e-3), START
    state = adam.init(p)
    for g, expected in zip(GRADS, ours, strict=True):
        updates, state = adam.update(g + 0.2 * np.sign(p) + 0.3 * p, state)
        p = p + updates
        np.testing.assert_allclose(p, expected, rtol=2e-5, atol=2e-6)
    plain = trajectory(tuning.OPTIMIZERS["adam8"], RATE)
    np.testing.assert_allclose(plain, trajectory(ADAM, RATE), rtol=1e-6)


QUADRATIC = TASKS["quadratic"].build
KEYS = jax.random.split(jax.random.key(5), 2)


def quadratic_curves(optimizer, *rates, keys=KEYS, **options):
    thetas = [as_theta({"learning_rate": rate}) for rate in rates]
    return curves(QUADRATIC, {}, tuning.OPTIMIZERS[optimizer], thetas, keys, **options)


def test_curves_equal_a_plain_loop():
    """curves() is optax's own loop, for each learning rate and seed."""
    losses = quadratic_curves("adam", 1e-3, 1e-2, steps=5).losses
    init_key, run_key = jax.random.split(KEYS[1])
    task, adam = QUADRATIC({}, init_key), optax.adam(1e-2, eps_root=1e-8)
    params = task.init(init_key)
    state = adam.init(params)
    for t in range(5):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(run_key, t))
        batch = task.batch(batch_key, "train")
        loss, grads = jax.value_and_grad(task.loss)(params, loss_key, batch)
        np.testing.assert_allclose(losses[1, 1, t], loss, rtol=1e-4)
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)


def test_curves_report_every_chunk():
    """report sees the steps done every 500. Chunks do not change the curve."""
    seen = []
    whole = quadratic_curves("sgdm", 0.01, steps=1204, report=seen.append).losses
    short = quadratic_curves("sgdm", 0.01, steps=700).losses
    np.testing.assert_allclose(whole[..., :700], short, rtol=1e-5)
    assert seen == [500, 1000, 1204]


def test_runs_side_by_side_are_those_one_by_one(monkeypatch):
    """As on an accelerator, one of them diverging."""
    alone = quadratic_curves("sgdm", 0.02, 100.0, 0.1, steps=30).losses
    monkeypatch.setattr(jax, "default_backend", lambda: "other")
    together = quadratic_curves("sgdm", 0.02, 100.0, 0.1, steps=30).losses
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_ema_is_the_bias_corrected_running_mean():
    """ema of a constant is the constant. A step it forgets at the stated rate."""
    np.testing.assert_allclose(ema(np.ones(50), 0.98), 1)
    late = ema([0.0] * 200 + [1.0] * 35, 0.98)[-1]
    assert late == pytest.approx(1 - 0.98**35, abs=0.02)


PUBLISHED = """
251 .0011948335721160095 .9360043452616368 .9989497406214962 5.875814422073298e-06
0 .010141964334059882 0 0 0 .747304046223346
705 .18795824057466287 .9859737737254709 .5653089879816942 3.335463336449822
1 .0038678836056147293 1.2650873175731194e-05 0 .10792195362976087 .2050653689291535
865 .9171472159241931 .4506093382745956 .9924355626169975 .49453367594585734
0 0 .0012527326770919818 .009744274816923932 .0266978863112591 .8971019661114805
"""


def test_configurations_are_the_published_ones():
    """Three of the 1000, of every kind of decay, as the published list prints them."""
    for seed, *values in np.array(PUBLISHED.split(), float).reshape(-1, 11).tolist():
        ours = list(nadamw_config(int(seed)).values())
        np.testing.assert_allclose(ours, values, rtol=1e-9, err_msg=str(seed))


def test_nadamw_candidates_are_the_learned_order_then_the_rest():
    """A budget is a prefix. All 1000 are the seeds 0 to 999, once each."""
    every = candidates("nadamw", 1000, 50)
    assert every[0] == nadamw_theta(nadamw_config(251), 50)
    assert candidates("nadamw", 7, 50) == every[:7]
    drawn = sorted(nadamw_config(seed)["learning_rate"] for seed in range(1000))
    assert sorted(theta["learning_rate"] for theta in every) == drawn
    assert all(theta["steps"] == 50 for theta in every)


def test_adam8_candidates_are_fixed_draws_within_their_ranges():
    """The same for any budget. Decays are relative to the length of the run."""
    many = candidates("adam8", 200, 100)
    assert many[:3] == candidates("adam8", 3, 100)
    for name, low, high in (("eps", 1e-8, 1e-2), ("exponential_decay", 1e-3, 1e-1)):
        values = np.array([theta[name] for theta in many])
        assert low <= values.min() < low * 2 and high / 2 < values.max() <= high


def search(optimizer, budget, steps):
    asked = dict(task="quadratic", optimizer=optimizer, budget=budget, steps=steps)
    return tune(asked | {"seed": 0}, {})


def test_tuning_finds_the_better_rate_and_drops_the_diverged(monkeypatch):
    """Of a slow, a good and an unstable rate the good one. The unstable is None."""
    tried = [{"learning_rate": rate} for rate in (1e-5, 0.02, 100.0)]
    monkeypatch.setattr(tuning, "candidates", lambda *_: tried)
    result = search("sgd", 3, 300)
    slow, good, unstable = result["losses"]
    assert good < slow and unstable is None
    assert result["theta"] == tried[1] and result["loss"] == good
    keys = jax.random.key(tuning.SEARCH_SEED)[None]
    expected = quadratic_curves("sgd", 0.02, keys=keys, steps=300).losses[0, 0, -30:]
    assert good == pytest.approx(float(expected.mean()), rel=1e-5)


@given(st.lists(st.sampled_from([1.0, 2.0, 3e38, math.nan, math.inf]), min_size=1))
def test_a_diverged_run_is_never_the_best(ends):
    """nan and inf lose to any finite loss, however large, wherever they happen."""
    losses = np.ones((len(ends), 30), np.float32)
    losses[:, -3:] = np.array(ends, np.float32)[:, None]
    early = losses.copy()
    early[:, 5] = np.where(np.isfinite(early[:, -1]), 1.0, math.nan)
    best = min([x for x in ends if math.isfinite(x)], default=math.inf)
    for final in map(tuning.final_losses, (losses, early)):
        assert np.isfinite(final).sum() == np.isfinite(ends).sum()
        np.testing.assert_allclose(final.min(), best, rtol=1e-6)


def test_criterion_is_the_mean_of_the_last_tenth():
    """Of fewer than ten steps the last."""
    losses = np.arange(40.0).reshape(2, 20)
    np.testing.assert_array_equal(tuning.final_losses(losses), [18.5, 38.5])
    np.testing.assert_array_equal(tuning.final_losses(losses[:, :3]), [2, 22])


def test_warnings_are_said(monkeypatch):
    """Where a larger or smaller rate might be better still, and where there is no theta."""
    losses = 1.0 - np.eye(11)
    assert "1e-05, is the lowest" in tuning.warning_of("adam", losses[0])
    assert "1, is the highest" in tuning.warning_of("sgdm", losses[10])
    assert not tuning.warning_of("adam", losses[5])
    assert not tuning.warning_of("nadamw", losses[0])
    nothing = baselines.Curves(np.full((11, 1, 9), np.nan), {}, 0.0)
    monkeypatch.setattr(tuning, "curves", lambda *_, report: nothing)
    result = search("adam", 11, 9)
    assert result["theta"] is result["loss"] is None
    assert "every run diverged" in tuning.line(result)


def command(line, path):
    line = f"--task quadratic --steps 20 --nadamw 2 --out {path} {line}"
    return run_command("tuning.py", tuning.main, line.split())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A file with one task tuned for two optimizers."""
    path = tmp_path_factory.mktemp("tuned") / "new" / "tuned.json"
    assert command("", path) == 0
    return path


def test_results_come_back_from_the_file(tuned):
    """What was found, by task, optimizer and steps."""
    results = load_tuned(tuned)
    assert list(results) == [("quadratic", "adam", 20), ("quadratic", "nadamw", 20)]
    adam, nadamw = results.values()
    assert nadamw["theta"] in candidates("nadamw", 2, 20)
    assert adam["theta"] == {"learning_rate": 1.0} and "highest" in adam["warning"]


def test_what_is_there_is_not_run_again(tuned, monkeypatch, capsys):
    """The same settings: kept as they are. Others: only that search, and the file is whole
    if it is interrupted."""
    before, interrupted = tuned.read_bytes(), Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(tuning, "tune", interrupted)
    assert command("", tuned) == 0
    assert capsys.readouterr().out.count("already") == 2
    assert command("--nadamw 3", tuned) == 130
    ((asked, *_), _) = interrupted.call_args
    assert (asked["optimizer"], asked["budget"]) == ("nadamw", 3)
    assert tuned.read_bytes() == before


def test_two_tunings_at_once_both_remain(tmp_path, monkeypatch):
    """One that begins and ends while another searches loses nothing."""
    path, search = tmp_path / "tuned.json", tuning.tune

    def interrupted(asked, *rest):
        if asked["optimizer"] == "adam":
            assert command("--optimizers sgd", path) == 0
        return search(asked, *rest)

    monkeypatch.setattr(tuning, "tune", interrupted)
    assert command("--optimizers adam", path) == 0
    assert [name for _, name, _ in load_tuned(path)] == ["adam", "sgd"]


def test_results_saved_at_the_same_moment_all_remain(tmp_path, monkeypatch):
    """Whoever has read the file writes before the next one reads it."""

    def slowly(*args):
        time.sleep(0.05)
        write_atomically(*args)

    monkeypatch.setattr(tuning, "write_atomically", slowly)
    path = tmp_path / "tuned.json"
    found = [dict(task="quadratic", optimizer="sgd", steps=n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(tuning.save_tuned, path), found))
    assert list(load_tuned(path).values()) == found


def test_progress_has_the_time_left(monkeypatch, capsys):
    """22 s for 2 of 8 steps: 66 s left."""
    times = iter([0.0, 22.0])
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(times))
    evaluation.counter("a", 8, 1)(2)
    assert "a: 2/8, 0 steps/s, 0:01:06 left" in capsys.readouterr().out


BAD_INPUT = """--task imagenet
--suite huge
--optimizers adam,lion
--optimizers=
--steps 0
--nadamw 1001
--seed -1
--out {files}/text
--out {files}/other.json
--out {files}/text/tuned.json
--task fmnist --data real --data-dir {files}/absent"""


@pytest.mark.parametrize("line", BAD_INPUT.splitlines())
def test_bad_input_is_one_line_and_exit_code_2(line, tuned, tmp_path, capsys):
    """And a file that is not one of results stays as it was."""
    (tmp_path / "text").write_text("not json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert command(line.format(files=tmp_path), tuned) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("tuning.py: ") and len(error.splitlines()) == 1
    assert (tmp_path / "text").read_text() == "not json"
    assert (tmp_path / "other.json").read_text() == '{"a": 1}'


def test_shipped_results_are_searches_that_can_be_repeated():
    """Each theta is the candidate with the lowest loss, found on the real data."""
    results = load_tuned(evaluation.TUNED)
    assert {("fmnist", name, 2000) for name in BASELINES} <= set(results)
    for (task, optimizer, steps), result in results.items():
        tried = candidates(optimizer, result["budget"], steps)
        losses = np.array(result["losses"], float)
        assert task in tuning.TASKS and len(losses) == len(tried)
        assert result["theta"] == tried[np.nanargmin(losses)]
        assert result["loss"] == np.nanmin(losses) and not result["stand_in"]
