"""Hand-designed optimizers against plain loops and optax; searches and their files."""

import json
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import baselines
from baselines import (
    BASELINES,
    NADAMW_ORDER,
    as_theta,
    candidates,
    nadamw_config,
    nadamw_theta,
)
from experiments import tuning
from experiments.tuning import Settings, final_losses, load_tuned, tune, tuned_theta
from inner import curves
from store import run_command
from tasks import TASKS

STEPS = 20
START = np.array([0.5, -1.0, 2.0], np.float32)
GRADS = np.random.RandomState(0).normal(size=(STEPS, 3)).astype(np.float32)


def trajectory(optimizer, theta):
    """Parameters (STEPS, 3) after each of the updates with GRADS."""

    def one(carry, g):
        params, state = carry
        updates, state = optimizer.update(theta, {"w": g}, state, params)
        params = {"w": params["w"] + updates["w"]}
        return (params, state), params["w"]

    params = {"w": jnp.array(START)}
    return jax.lax.scan(one, (params, optimizer.init(params)), jnp.array(GRADS))[1]


@jax.jit
def nadamw_trajectory(theta):
    return trajectory(BASELINES["nadamw"], theta)


# --- optimizers


def plain_nadamw(c, quirks):
    """The recipe in float64, step by step, from a configuration as drawn."""
    b1, b2 = float(np.float32(c["b1"])), float(np.float32(c["b2"]))
    p, m, v, out = START.astype(np.float64), 0.0, 0.0, []
    constant = c["constant"] * STEPS
    warm = STEPS * (max if quirks else min)(c["warmup"], c["constant"])
    low = c["min_multiplier"] * c["learning_rate"]
    for s in range(STEPS):
        if c["warmup"] > 0 and s < warm:
            rate = c["learning_rate"] * s / warm
        elif s < constant:
            rate = c["learning_rate"]
        else:
            half = math.cos(math.pi * (s - constant) / (STEPS - constant)) / 2 + 0.5
            rate = low + (c["learning_rate"] - low) * half
        g = GRADS[s] + (-1 if quirks else 1) * c["l2"] * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        a = rate * math.sqrt(1 - b2 ** (s + 1)) / (1 - b1 ** (s + 1))
        u = b1 * m + (1 - b1) * g if c["nesterov"] else m
        p = p - a * (u / (np.sqrt(v) + c["eps"]) + c["weight_decay"] * p)
        out.append(p)
    return np.array(out)


EVERYTHING = {
    "learning_rate": 0.1,
    "b1": 0.8,
    "b2": 0.95,
    "eps": 1e-3,
    "nesterov": 1.0,
    "weight_decay": 0.1,
    "l2": 0.1,
    "warmup": 0.3,
    "min_multiplier": 0.2,
    "constant": 0.6,
}


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize(
    "config",
    [EVERYTHING, EVERYTHING | {"constant": 0.1, "nesterov": 0.0}]
    + [nadamw_config(NADAMW_ORDER[i]) for i in (0, 7, 35)],
    ids=["long", "short", "entry 0", "entry 7", "entry 35"],
)
def test_nadamw_is_the_plain_loop(config, quirks):
    """Update, warm-up, constant part and cosine, in the documented form and the code's."""
    theta = as_theta(nadamw_theta(config, STEPS, quirks))
    ours = nadamw_trajectory(theta)
    np.testing.assert_allclose(ours, plain_nadamw(config, quirks), rtol=2e-5, atol=2e-6)


def test_nadamw_quirks_change_the_run():
    """The two forms differ where a configuration has a warm-up and l2."""
    ends = [plain_nadamw(EVERYTHING, quirks)[-1] for quirks in (False, True)]
    assert np.abs(ends[0] - ends[1]).min() > 0.01


def test_nadamw_without_its_additions_is_adam():
    """No nesterov, no decay, no schedule, eps below all gradients: optax.adam."""
    values = baselines.NADAMW | {"nesterov": 0.0, "weight_decay": 0.0}
    adam = baselines.from_optax(optax.adam, {"learning_rate": 1e-3})
    expected = trajectory(adam, as_theta({"learning_rate": 1e-3}))
    np.testing.assert_allclose(
        nadamw_trajectory(as_theta(values)), expected, rtol=1e-5, atol=1e-6
    )


def test_nadamw_with_a_rate_alone_has_the_usual_values():
    """A theta may leave out all but what is searched."""
    full = as_theta(baselines.NADAMW | {"learning_rate": 0.01})
    short = trajectory(BASELINES["nadamw"], as_theta({"learning_rate": 0.01}))
    np.testing.assert_allclose(short, nadamw_trajectory(full), rtol=1e-5)


def test_adam8_is_adam_with_decays_and_penalties():
    """lr exp(-a s) (1 - b s) on the gradient + l1 sign(p) + l2 p; the rate alone: Adam."""
    theta = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3}
    more = {"exponential_decay": 0.05, "linear_decay": 0.06, "l1": 0.2, "l2": 0.3}
    p, m, v, expected = START.astype(np.float64), 0.0, 0.0, []
    for s in range(STEPS):
        g = GRADS[s] + 0.2 * np.sign(p) + 0.3 * p
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        m_hat, v_hat = m / (1 - 0.8 ** (s + 1)), v / (1 - 0.95 ** (s + 1))
        rate = 0.1 * math.exp(-0.05 * s) * max(1 - 0.06 * s, 0)
        p = p - rate * m_hat / (np.sqrt(v_hat) + 1e-3)
        expected.append(p)
    ours = trajectory(BASELINES["adam8"], as_theta(theta | more))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)
    adam = baselines.from_optax(optax.adam, {"learning_rate": 1e-3})
    rate = as_theta({"learning_rate": 1e-2})
    plain, expected = (trajectory(o, rate) for o in (BASELINES["adam8"], adam))
    np.testing.assert_allclose(plain, expected, rtol=1e-6)


# --- candidates

PUBLISHED = """
251 .0011948335721160095 .9360043452616368 .9989497406214962 5.875814422073298e-06
0 .010141964334059882 0 0 0 .747304046223346
25 .0005950867356750683 .8912956998774763 .9998316947284045 1.4834761018841103e-07
1 .04087020908564961 0 .008212683099401206 0 .37760078274486286
705 .18795824057466287 .9859737737254709 .5653089879816942 3.335463336449822
1 .0038678836056147293 1.2650873175731194e-05 0 .10792195362976087 .2050653689291535
865 .9171472159241931 .4506093382745956 .9924355626169975 .49453367594585734
0 0 .0012527326770919818 .009744274816923932 .0266978863112591 .8971019661114805
"""
FIELDS = (
    "learning_rate b1 b2 eps nesterov weight_decay l2 warmup min_multiplier constant"
).split()


def test_configurations_are_the_published_ones():
    """Four of the 1000, of every kind of decay, as the published list prints them."""
    for seed, *values in np.array(PUBLISHED.split(), float).reshape(-1, 11).tolist():
        config = nadamw_config(int(seed))
        ours = [config[name] for name in FIELDS]
        np.testing.assert_allclose(ours, values, rtol=1e-9, err_msg=str(seed))


def test_nadamw_candidates_are_the_learned_order_then_the_rest():
    """A budget is a prefix; all 1000 are the seeds 0 to 999, once each."""
    every = candidates("nadamw", 1000, 50)
    assert every[0] == nadamw_theta(nadamw_config(251), 50)
    assert candidates("nadamw", 7, 50) == every[:7]
    drawn = sorted(nadamw_config(seed)["learning_rate"] for seed in range(1000))
    assert sorted(theta["learning_rate"] for theta in every) == drawn
    assert all(theta["steps"] == 50 for theta in every)


@pytest.mark.parametrize(
    "optimizer, budget", [("lion", 1), ("adam", 0), ("nadamw", 1001)]
)
def test_candidates_that_do_not_exist(optimizer, budget):
    with pytest.raises(ValueError, match="candidates"):
        candidates(optimizer, budget, 10)


def test_adam8_candidates_are_fixed_draws_within_their_ranges():
    """The same for any budget; decays are relative to the length of the run."""
    few, many = candidates("adam8", 3, 100), candidates("adam8", 200, 100)
    assert many[:3] == few
    for name, low, high in (
        ("learning_rate", 1e-4, 1e-1),
        ("eps", 1e-8, 1e-2),
        ("exponential_decay", 1e-3, 1e-1),
        ("linear_decay", 1e-3, 1e-2),
    ):
        values = np.array([theta[name] for theta in many])
        assert low <= values.min() < low * 2 and high / 2 < values.max() <= high


# --- searches

ABOUT = {"dataset": "drawn", "dataset_checksum": "", "stand_in": False}
QUADRATIC = TASKS["quadratic"]


def search(rates, steps=300):
    """Losses (rates, steps) of SGD on the quadratic."""
    settings = Settings("quadratic", "sgd", len(rates), steps, 0)
    thetas = [{"learning_rate": rate} for rate in rates]
    return tuning.train_candidates(
        QUADRATIC.build, {}, BASELINES["sgd"], thetas, settings, lambda done: None
    )


def test_tuning_finds_the_better_rate_and_drops_the_diverged(monkeypatch):
    """Of a slow, a good and an unstable rate the good one; the unstable is None."""
    rates = [{"learning_rate": rate} for rate in (1e-5, 0.02, 100.0)]
    monkeypatch.setattr(tuning, "candidates", lambda *_: rates)
    done = []
    settings = Settings("quadratic", "sgd", 3, 300, 0)
    result = tune(settings, {}, ABOUT, done.append)
    slow, good, unstable = result["losses"]
    assert good < slow and unstable is None
    assert result["theta"] == rates[1] and result["loss"] == good
    assert done == [1, 2, 3]
    assert result["seed"] == 0 and result["versions"]["jax"] == jax.__version__
    json.dumps(result, allow_nan=False)


def test_search_losses_are_those_of_inner_curves():
    """The same initial parameters and batches; a run stops at its first nan or inf."""
    losses = search([0.02, 100.0])
    keys = jax.random.key(tuning.SEARCH_SEED)[None]
    thetas = baselines.rates([0.02, 100.0])
    expected = curves(QUADRATIC.build, {}, BASELINES["sgd"], thetas, keys, 300).losses
    np.testing.assert_allclose(losses[0], expected[0, 0], rtol=1e-5)
    finite = np.isfinite(losses[1])
    last = finite.argmin()
    assert 0 < last < 299 and not np.isfinite(expected[1, 0, last])
    assert np.isnan(losses[1, last + 1 :]).all()


def test_runs_side_by_side_are_those_one_by_one(monkeypatch):
    """As on an accelerator: two at once, the last pair filled up, one run diverging."""
    rates = [0.02, 100.0, 0.1]
    alone = search(rates)
    monkeypatch.setattr(jax, "default_backend", lambda: "other")
    monkeypatch.setattr(tuning, "AT_ONCE", 2)
    np.testing.assert_allclose(search(rates), alone, rtol=1e-5)


@given(st.lists(st.sampled_from([1.0, 2.0, 3e38, math.nan, math.inf]), min_size=1))
def test_a_diverged_run_is_never_the_best(ends):
    """nan and inf lose to any finite loss, however large, wherever they happen."""
    losses = np.ones((len(ends), 30), np.float32)
    losses[:, -3:] = np.array(ends, np.float32)[:, None]
    early = losses.copy()
    early[:, 5] = np.where(np.isfinite(early[:, -1]), 1.0, math.nan)
    finite = [x for x in ends if math.isfinite(x)]
    for final in (final_losses(losses), final_losses(early)):
        best = baselines.lowest(final)
        assert np.isfinite(final).sum() == len(finite)
        if finite:
            np.testing.assert_allclose(final[best], min(finite), rtol=1e-6)


def test_criterion_is_the_mean_of_the_last_tenth():
    losses = np.arange(40.0).reshape(2, 20)
    np.testing.assert_array_equal(final_losses(losses), [18.5, 38.5])
    np.testing.assert_array_equal(final_losses(losses[:, :3]), [2, 22])


def test_nothing_found_is_said(monkeypatch):
    """Where every run diverges there is no theta, and a warning."""
    monkeypatch.setattr(tuning, "train_candidates", lambda *_: np.full((11, 9), np.nan))
    result = tune(Settings("quadratic", "adam", 11, 9, 0), {}, ABOUT)
    assert result["theta"] is None and result["loss"] is None
    assert "diverged" in result["warning"] and "diverged" in tuning.line(result)


def test_edge_of_the_grid_is_said():
    """Only where a larger or smaller rate might be better still."""
    assert "1e-05, is the lowest" in tuning.edge_warning("adam", 0)
    assert "1, is the highest" in tuning.edge_warning("sgdm", 10)
    assert tuning.edge_warning("adam", 5) is None
    assert tuning.edge_warning("nadamw", 0) is None


def test_time_left_takes_the_mean_for_tasks_not_begun():
    assert tuning.time_left({"a": 2, "b": 1, "c": 3}, {"a": 1.0, "b": 5.0}) == 16


# --- the file and the command


def command(*argv):
    return run_command("tuning.py", tuning.main, argv)


TINY = ("--task", "quadratic", "--steps", "20", "--nadamw", "2")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A file with one task tuned for two optimizers."""
    path = tmp_path_factory.mktemp("tuned") / "new" / "tuned.json"
    assert command(*TINY, "--out", str(path)) == 0
    return path


def test_results_come_back_from_the_file(tuned):
    """What was found, by task, optimizer and steps; another length is another search."""
    results = load_tuned(tuned)
    assert sorted(results) == [("quadratic", "adam", 20), ("quadratic", "nadamw", 20)]
    theta = tuned_theta("quadratic", "nadamw", 20, tuned)
    assert theta in candidates("nadamw", 2, 20)
    assert tuned_theta("quadratic", "adam", 20, tuned) == {"learning_rate": 1.0}
    assert "highest" in results["quadratic", "adam", 20]["warning"]
    assert tuned_theta("quadratic", "adam", 21, tuned) is None
    assert tuned_theta("quadratic", "adam", 20, tuned.parent / "absent") is None


def test_what_is_there_is_not_run_again(tuned, monkeypatch, capsys):
    """The same settings: kept as they are. Other settings: only that search again."""
    before, ran = tuned.read_bytes(), []

    def fake(settings, *_):
        ran.append(settings)
        return load_tuned(tuned)[settings.task, settings.optimizer, settings.steps]

    monkeypatch.setattr(tuning, "tune", fake)
    assert command(*TINY, "--out", str(tuned)) == 0
    assert not ran and tuned.read_bytes() == before
    assert capsys.readouterr().out.count("already") == 2
    assert command(*TINY, "--nadamw", "3", "--out", str(tuned)) == 0
    assert ran == [Settings("quadratic", "nadamw", 3, 20, 0)]


def test_an_interrupt_keeps_what_was_found(tuned, monkeypatch):
    """The file is whole after every result."""
    before = tuned.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command(*TINY, "--seed", "1", "--out", str(tuned))
    assert tuned.read_bytes() == before


def test_progress_lines_have_the_pace_and_the_time_left(monkeypatch, capsys):
    """11 s a run, 2 of 4 done and 4 of another task: 66 s."""
    times = iter([0.0, 11.0, 22.0])
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(times))
    report = tuning.reporter("a adam", "a", 4, {"a": 4, "b": 4}, {})
    report(1), report(2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2/4" in last and "11.00 s a run" in last and "0:01:06 left" in last


@pytest.mark.parametrize(
    "argv",
    [
        ("--task", "imagenet"),
        ("--suite", "huge"),
        ("--optimizers", "adam,lion"),
        ("--optimizers", ""),
        ("--steps", "0"),
        ("--nadamw", "0"),
        ("--nadamw", "1001"),
        ("--adam8", "0"),
        ("--seed", "-1"),
        ("--out", "{files}/text"),
        ("--out", "{files}/other.json"),
        ("--out", "{files}/text/tuned.json"),
        ("--task", "fmnist", "--data", "real", "--data-dir", "{files}/absent"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_2(argv, tmp_path, capsys):
    """And a file that is not one of results stays as it was."""
    (tmp_path / "text").write_text("not json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    argv = [a.format(files=tmp_path) for a in argv]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "tuned.json")]
    argv = argv if "--task" in argv else ["--task", "quadratic", *argv]
    assert command(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("tuning.py: ") and len(error.splitlines()) == 1
    assert (tmp_path / "text").read_text() == "not json"
    assert (tmp_path / "other.json").read_text() == '{"a": 1}'


def test_shipped_results_are_searches_that_can_be_repeated():
    """Each theta is the candidate with the lowest loss, found on the real data."""
    results = load_tuned()
    assert ("fmnist", "nadamw", 2000) in results
    for (task, optimizer, steps), result in results.items():
        tried = candidates(optimizer, result["budget"], steps)
        losses = np.array(result["losses"], float)
        assert task in TASKS and len(losses) == len(tried)
        assert result["theta"] == tried[baselines.lowest(losses)]
        assert result["loss"] == np.nanmin(losses) and not result["stand_in"]
