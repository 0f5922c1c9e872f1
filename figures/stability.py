"""Figures 1 and 2 of the STAR paper: the noisy quadratic model (section 4, appendix B.1).

`python -m figures 1`, `2a`, `2b`, `2c` (figures.py keeps the list).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import estimators
import nqm
from data import about_formula
from inner import ema

HORIZONS = (1, 2, 3, 4, 5, 10, 25, 50, 100, 150, 200, 250, 300, *range(400, 1001, 100))
PAPER_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)  # of alpha, in figures 2b and 2c
INTERVENTIONS = ("nominal term", "weight decay", "preconditioner", "all three")


def compute_1(points: int, seed: int = 29) -> dict:
    """Eigenvalues of A = I - U H while an intervention grows from nothing to full.

    The paper gives no numbers. Here H has 6 eigenvalues from 0.1 to 5; P has entries
    N(0, 0.6^2 / 6) and then its antisymmetric part doubled: it turns the gradient, hence
    the complex eigenvalues. With s from 0 to 1:
        (a) U = P + 0.3 s I               (b) U = (1 - 0.7 s) P
        (c) U = H^(-s/2) P                (d) U = H^(-s/2) ((1 - 0.6 s) P + 0.5 s I)
    Returns curves (4, points, 6, 2), real and imaginary parts, each eigenvalue followed
    from point to point, and the spectral radius (4, 2) before and after.
    """
    n, rng = 6, np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    h = basis * np.geomspace(0.1, 5, n) @ basis.T
    p = rng.normal(size=(n, n)) * 0.6 / np.sqrt(n)
    p = p + (p - p.T) / 2

    def steps(s):
        softer = nqm.power(h, -s / 2)
        both = nqm.nominal_plus((1 - 0.6 * s) * p, 0.5 * s)
        return (
            nqm.nominal_plus(p, 0.3 * s),
            (1 - 0.7 * s) * p,
            softer @ p,
            softer @ both,
        )

    updates = np.array([steps(s) for s in np.linspace(0, 1, points)])
    path = np.linalg.eigvals(np.eye(n) - updates @ h)  # (points, 4, 6)
    for t in range(1, points):
        for panel in range(4):
            path[t, panel] = _nearest(path[t - 1, panel], path[t, panel])
    radius = np.abs(path[[0, -1]]).max(-1).T
    path = path.transpose(1, 0, 2)
    return {
        "intervention": INTERVENTIONS,
        "radius_before_after": radius,
        "curves": np.stack([path.real, path.imag], -1),
    }


def _nearest(before: np.ndarray, after: np.ndarray) -> list:
    """`after`, reordered so that each follows the eigenvalue it is closest to."""
    left, out = list(after), []
    for value in before:
        out.append(left.pop(int(np.argmin(np.abs(np.array(left) - value)))))
    return out


def plot_1(result: dict, plt: Any) -> Any:
    """Figure 1: red circles before, blue crosses after, arrows, the unit circle."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 4.2), layout="constrained")
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    for i, axis in enumerate(axes):
        axis.plot(circle.real, circle.imag, "k", lw=0.8)
        for x, y in result["curves"][i].transpose(1, 2, 0):
            axis.plot(x, y, "0.6", lw=1)
            middle = len(x) // 2
            arrow = {"arrowstyle": "->", "color": "0.4"}
            start, end = (x[middle - 1], y[middle - 1]), (x[middle], y[middle])
            axis.annotate("", end, start, arrowprops=arrow)
            axis.plot(x[0], y[0], "o", mfc="none", mec="C3")
            axis.plot(x[-1], y[-1], "x", color="C0")
        before, after = result["radius_before_after"][i]
        axis.set(
            title=f"({'abcd'[i]}) {result['intervention'][i]}\n"
            f"spectral radius {before:.2f} to {after:.2f}",
            xlabel="real part",
            aspect="equal",
            xlim=(-1.2, 2.2),
            ylim=(-1.6, 1.6),
        )
    axes[0].set_ylabel("imaginary part")
    return figure


def compute_2a(horizons: Sequence[int], alphas: int, draws: int) -> dict:
    """Trace of the covariance of the meta-gradient at P = 0 against alpha (equation A.32).

    Returns alpha (A,) from 0 to 2 / lambda_max(H), horizon (T,), variance (T, A) of `draws`
    sampled gradients (dividing by their number, as A.32 does; one set of draws serves
    every horizon and alpha), exact (T, A) in closed form, and the ratio of the exact one
    at alpha = 0 to its least over alpha, with that alpha over 2 / lambda_max(H).
    """
    horizons, model = np.array(horizons), nqm.paper_model()
    limit = 2 / nqm.largest(nqm.H)
    shares = np.linspace(0, 1, alphas)
    steps, at = int(horizons.max()), horizons - 1

    def one_alpha(alpha):
        u = nqm.nominal_plus(jnp.zeros((2, 2)), alpha)

        def one_draw(key):
            phi, xi = nqm.draw(key, model, steps)
            return nqm.sampled_meta_gradients(u, model, phi, xi)[at]

        keys = jax.random.split(jax.random.key(0), draws)
        sampled = jax.vmap(one_draw)(keys).var(0).sum((1, 2))
        return sampled, nqm.gradient_variance(u, model, steps)[at]

    with jax.enable_x64(True):
        run = jax.jit(lambda alphas: jax.lax.map(one_alpha, alphas, batch_size=5))
        sampled, exact = jax.tree.map(lambda x: np.asarray(x).T, run(shares * limit))
    return {
        "alpha": shares * limit,
        "horizon": horizons,
        "variance": sampled,
        "exact": exact,
        "ratio_at_zero_to_best": exact[:, 0] / exact.min(1),
        "best_share": shares[exact.argmin(1)],
    }


def plot_2a(result: dict, plt: Any) -> Any:
    """Figure 2a: dots sampled, lines exact; green for T = 1 to blue for the longest."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    horizons = result["horizon"]
    colors = plt.get_cmap("winter_r")(np.linspace(0.1, 1, len(horizons)))
    for i, (horizon, color) in enumerate(zip(horizons, colors, strict=True)):
        label = f"T = {horizon}" if i % 3 == 0 or i == len(horizons) - 1 else None
        axis.plot(result["alpha"], result["exact"][i], color=color, lw=1, label=label)
        axis.plot(result["alpha"], result["variance"][i], ".", color=color, ms=3)
    axis.set(
        xlabel="alpha, up to 2 / lambda_max(H)",
        ylabel="trace of the meta-gradient's covariance\n(lines exact, dots sampled)",
        yscale="log",
    )
    axis.legend(fontsize=8)
    return figure


def best_step(model: nqm.Model, steps: int) -> tuple[np.ndarray, float]:
    """(U*, its loss): the minimum over U (n, n) of the expected meta-loss, equation 8.

    By L-BFGS from the diagonal, in float64. At any alpha, P* = U* - alpha I reaches it.
    """

    def loss(u):
        return nqm.expected_loss(u, model, steps)

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry, _):
        u, state = carry
        value, grad = value_and_grad(u, state=state)
        updates, state = optimizer.update(
            grad, state, u, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(u, updates), state), None

    with jax.enable_x64(True):
        u = 0.5 / nqm.largest(model.h) * jnp.eye(len(model.h))
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60)[0])
        u = run((u, optimizer.init(u)))[0]
        return np.asarray(u), float(loss(u))


def nqm_unroll(model: nqm.Model, alpha: Any, steps: int) -> estimators.Unroll:
    """The noisy quadratic model with theta = P as an unroll; losses at t = 1 ... T."""
    root = nqm.power(model.noise, 0.5)

    def fresh(key):
        phi, xi = nqm.draw(key, model, 0)
        return phi, xi[0]

    def step(p, carry, key):
        phi, xi = carry
        phi = phi - nqm.nominal_plus(p, alpha) @ (model.h @ (phi - xi))  # equation 5
        xi = root @ jax.random.normal(key, xi.shape)
        return (phi, xi), nqm.loss(phi, xi, model.h)

    return estimators.unroll(fresh, step, steps)


def meta_train_nqm(
    meta_steps: int, steps: int, meta_learning_rate: float, sigma: float
) -> Callable:
    """Jitted, over lanes: (alpha, start (2, 2), clip, key) -> P by meta-step (M, 2, 2).

    ES with one antithetic pair, over the whole trajectory (PES with K = T, appendix B.1);
    AdamW without weight decay; the gradient clipped by value at `clip` before it.
    """
    model = nqm.Model(*(np.asarray(x, np.float32) for x in nqm.paper_model()))

    def run(alpha, start, clip, key):
        problem = nqm_unroll(model, alpha, steps)
        estimator = estimators.pes(problem, windows=1, sigma=sigma)
        optimizer = optax.chain(
            optax.clip(clip), optax.adamw(meta_learning_rate, weight_decay=0.0)
        )

        def meta_step(carry, k):
            p, state = carry
            start_key, run_key = jax.random.split(jax.random.fold_in(key, k))
            particle = estimator.init(start_key, p)
            grad, _, _ = estimator.estimate(run_key, p, particle)
            updates, state = optimizer.update(grad, state, p)
            return (optax.apply_updates(p, updates), state), p

        carry = start, optimizer.init(start)
        return jax.lax.scan(meta_step, carry, jnp.arange(meta_steps))[1]

    return jax.jit(jax.vmap(run))


def compute_2bc(
    meta_steps: int, seeds: int, alphas: Sequence[float], sigma: float = 0.01
) -> dict:
    """Meta-training P of the noisy quadratic model at T = 50, for each alpha.

    What the paper leaves out: meta-learning rate 1e-3, one antithetic pair a meta-step, P
    at first 0 or N(0, 0.5^2) for each entry; the meta-gradient clipped by value at 1.0
    (appendix B) or not at all. All four settings, in one program: arrays are
    (setting, alpha, seed, meta-step).
    Returns in curves the exact expected meta-loss (equation 8) of P at every meta-step,
    not the noisy one the estimator saw, and magnitudes (..., 2) of A's eigenvalues, least
    first; both for the optimum; the meta-steps until the loss is first within 10 % of the
    optimum (setting, alpha, seed), inf for never; and the loss at the end.
    """
    settings, steps = [(0.0, 1.0), (0.0, np.inf), (0.5, 1.0), (0.5, np.inf)], 50
    keys = jax.random.split(jax.random.key(0), seeds)
    starts = jax.vmap(lambda key: jax.random.normal(key, (2, 2)))(
        jax.random.split(jax.random.key(1), seeds)
    )
    grid = [
        (alpha, scale * starts[s], clip, keys[s])
        for scale, clip in settings
        for alpha in alphas
        for s in range(seeds)
    ]
    alpha, start, clip, key = (jnp.stack(x) for x in zip(*grid, strict=True))
    p = meta_train_nqm(meta_steps, steps, 1e-3, sigma)(alpha, start, clip, key)
    u = p + alpha[:, None, None, None] * jnp.eye(2)[None, None]  # U = alpha I + P

    with jax.enable_x64(True):
        exact = jax.vmap(lambda u: nqm.expected_loss(u, nqm.paper_model(), steps))
        loss = jax.jit(lambda u: jax.lax.map(exact, u))(jnp.asarray(u, jnp.float64))
    best, best_loss = best_step(nqm.paper_model(), steps)
    u = np.asarray(u, np.float64)
    lost = ~np.isfinite(u).all((-2, -1))  # the gradient overflowed: P is nan from there
    values = np.linalg.eigvals(
        np.eye(2) - np.where(lost[..., None, None], 0, u) @ nqm.H
    )
    magnitudes = np.where(lost[..., None], np.inf, np.sort(np.abs(values), -1))

    shape = len(settings), len(alphas), seeds, meta_steps
    loss = np.asarray(loss).reshape(shape)
    near = np.where(loss <= 1.1 * best_loss, np.arange(meta_steps), np.inf).min(-1)
    return {
        "alpha": np.array(alphas),
        "start_std_and_clip": settings,
        "optimum": best_loss,
        "optimum_magnitudes": np.sort(
            np.abs(np.linalg.eigvals(nqm.system(best, nqm.H).a))
        ),
        "meta_steps_until_within_10_percent": near,
        "last_loss": loss[..., -1],
        "curves": {
            "loss": np.where(np.isnan(loss), np.inf, loss),
            "magnitudes": magnitudes.reshape(*shape, 2),
        },
    }


def _draw_seeds(
    axis: Any,
    values: np.ndarray,
    color: str,
    style: str = "-",
    label: str | None = None,
    transform: Callable = lambda x: x,
) -> None:
    """Curves (seeds, M), EMA 0.95: mean and one standard error, of what `transform` undoes.

    Where seeds start apart, each as a thin line instead, and their median.
    """
    at, smooth = np.arange(1, values.shape[1] + 1), ema(values, 0.95)
    if np.ptp(values[:, 0]) < 1e-6:
        mean = smooth.mean(0)
        error = smooth.std(0, ddof=1) / len(smooth) ** 0.5
        band = transform(mean - error), transform(mean + error)
        axis.fill_between(at, *band, color=color, alpha=0.2, lw=0)
        axis.plot(at, transform(mean), style, color=color, lw=1.3, label=label)
        return
    axis.plot(at, transform(smooth).T, style, color=color, lw=0.4)
    axis.plot(
        at, transform(np.median(smooth, 0)), style, color=color, lw=1.5, label=label
    )


def _settings_grid(result: dict, plt: Any, draw_alpha: Callable) -> tuple[Any, Any]:
    """A panel for each setting of `compute_2bc`, a color for each alpha."""
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7.5), layout="constrained", sharey="row"
    )
    shares = result["alpha"] * nqm.largest(nqm.H) / 2
    settings = zip(axes.flat, result["start_std_and_clip"], range(4), strict=True)
    for axis, (scale, clip), panel in settings:
        for i, share in enumerate(shares):
            draw_alpha(axis, (panel, i), f"C{i}", f"{share:.3g}")
        start = f"P from N(0, {scale:g}^2), seeds and median" if scale else "P from 0"
        clipped = f"clipped at {clip:g}" if np.isfinite(clip) else "not clipped"
        axis.set(
            title=f"{start}; gradient {clipped}", xscale="log", xlabel="meta-steps"
        )
    return figure, axes


def plot_2b(result: dict, plt: Any) -> Any:
    """Figure 2b: magnitudes of A's eigenvalues, larger dotted, smaller solid."""
    magnitudes = result["curves"]["magnitudes"]

    def draw_alpha(axis, at, color, label):
        _draw_seeds(axis, magnitudes[at][..., 0], color, "-", label)
        _draw_seeds(axis, magnitudes[at][..., 1], color, ":")

    figure, axes = _settings_grid(result, plt, draw_alpha)
    for axis in axes.flat:
        axis.axhline(1, color="k", lw=0.8)
        best = result["optimum_magnitudes"][-1]
        axis.axhline(best, color="k", ls="--", lw=0.8, label="at the optimum, both")
    for axis in axes[:, 0]:
        axis.set_ylabel("|eigenvalues of A| (EMA 0.95)")
    axes[1, 0].set_ylim(0, 2.5)
    axes[0, 0].legend(title="alpha / (2 / lambda_max(H))", fontsize=8)
    return figure


def plot_2c(result: dict, plt: Any) -> Any:
    """Figure 2c: the meta-loss; mean, error and EMA are of its logarithm."""
    logs = np.log(result["curves"]["loss"])

    def draw_alpha(axis, at, color, label):
        _draw_seeds(axis, logs[at], color, "-", label, np.exp)

    figure, axes = _settings_grid(result, plt, draw_alpha)
    for axis in axes.flat:
        axis.axhline(result["optimum"], color="k", ls="--", lw=0.8, label="optimum")
        axis.set(yscale="log")
    for axis in axes[:, 0]:
        axis.set_ylabel("expected meta-loss, T = 50 (EMA 0.95)")
    axes[0, 0].set_ylim(1, 20)
    axes[1, 0].set_ylim(1, 1e4)
    axes[0, 0].legend(title="alpha / (2 / lambda_max(H))", fontsize=8)
    return figure


QUADRATIC = about_formula("noisy quadratic model, drawn from its formula")


def _figure_1(args: Any) -> tuple[dict, str, dict]:
    result = compute_1(points=41 if args.quick else 201)
    return result, "Figure 1: eigenvalues of A before and after", QUADRATIC


def _figure_2a(args: Any) -> tuple[dict, str, dict]:
    horizons = [t for t in HORIZONS if t <= 100] if args.quick else HORIZONS
    alphas, draws = (20, 100) if args.quick else (50, 500)
    result = compute_2a(horizons, alphas, draws)
    return result, f"Figure 2a: {draws} draws of the meta-gradient", QUADRATIC


def _figure_2bc(args: Any) -> tuple[dict, str, dict]:
    limit = 2 / nqm.largest(nqm.H)
    unit = 1 / limit if args.literal_alpha else limit
    alphas = [share * unit for share in PAPER_SHARES]
    meta_steps, seeds = (1000, 2) if args.quick else (20_000, 5)
    result = compute_2bc(meta_steps, seeds, alphas)
    title = f"Figure {args.figure}: meta-training P, {seeds} seeds"
    return result, title, QUADRATIC


FIGURES = {
    "1": (_figure_1, plot_1),
    "2a": (_figure_2a, plot_2a),
    "2b": (_figure_2bc, plot_2b),
    "2c": (_figure_2bc, plot_2c),
}
