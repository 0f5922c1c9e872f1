"""Figures 1 and 2 of the STAR paper: the noisy quadratic model (section 4, app. B.1)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure

import estimators
import nqm
from baselines import LEGEND, counted_seeds, ema
from data import about_formula

HORIZONS = (1, 2, 3, 4, 5, 10, 25, 50, 100, 150, 200, 250, 300, *range(400, 1001, 100))
STABLE_ALPHA = nqm.theorem_1(nqm.H, 0.0)[1]  # 2 / lambda_max(H)
UNROLL = 50  # T of figures 2b and 2c
QUADRATIC = about_formula("noisy quadratic model, drawn from its formula")
ANGLE = np.linspace(0, 2 * np.pi, 400)
UNIT_CIRCLE = np.cos(ANGLE), np.sin(ANGLE)


def compute_1(points: int) -> dict:
    """Eigenvalues of A = I - U H while an intervention grows from nothing to full.

    The paper gives no numbers. Here H has 6 eigenvalues from 0.1 to 5. P has entries
    N(0, 0.6^2 / 6) and its antisymmetric part doubled, so that A has complex eigenvalues:
    P turns the gradient. With s from 0 to 1:
        (a) U = P + 0.3 s I               (b) U = (1 - 0.7 s) P
        (c) U = H^(-s/2) P                (d) U = H^(-s/2) ((1 - 0.6 s) P + 0.5 s I)
    Returns curves (4, points, 6, 2), real and imaginary parts, each eigenvalue followed
    from point to point, and the spectral radius (4, 2) before and after.
    """
    rng, eye, updates = np.random.default_rng(29), np.eye(6), []
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    h = basis * np.geomspace(0.1, 5, 6) @ basis.T
    p = rng.normal(size=(6, 6)) * 0.6 / np.sqrt(6)
    p = p + (p - p.T) / 2
    for s in np.linspace(0, 1, points):
        softer = nqm.power(h, -s / 2)
        all_three = softer @ ((1 - 0.6 * s) * p + 0.5 * s * eye)
        updates.append((p + 0.3 * s * eye, (1 - 0.7 * s) * p, softer @ p, all_three))

    path = np.linalg.eigvals(eye - np.array(updates) @ h)  # (points, 4, 6)
    for t, panel in np.ndindex(points - 1, 4):
        left = list(path[t + 1, panel])
        for i, value in enumerate(path[t, panel]):  # it goes on to the nearest one left
            path[t + 1, panel, i] = left.pop(np.argmin(np.abs(np.array(left) - value)))
    return {
        "intervention": ("nominal term", "weight decay", "preconditioner", "all three"),
        "radius_before_after": np.abs(path[[0, -1]]).max(-1).T,
        "curves": np.stack([path.real, path.imag], -1).swapaxes(0, 1),
    }


def plot_1(figure: Figure, result: dict) -> None:
    """Figure 1: red circles before, blue crosses after, arrows, the unit circle."""
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        axis.plot(*UNIT_CIRCLE, "k", lw=0.8)
        for path in result["curves"][i].swapaxes(0, 1):  # (points, 2)
            axis.plot(*path.T, "0.6", lw=1)
            to, arrow = len(path) // 2, {"arrowstyle": "->", "color": "0.4"}
            axis.annotate("", path[to], path[to - 1], arrowprops=arrow)
            axis.plot(*path[0], "o", mfc="none", mec="C3")
            axis.plot(*path[-1], "x", color="C0")
        rho = "{:.2f} to {:.2f}".format(*result["radius_before_after"][i])
        title = f"({'abcd'[i]}) {result['intervention'][i]}\nspectral radius {rho}"
        axis.set(title=title, aspect="equal", xlim=(-1.2, 2.2), ylim=(-1.6, 1.6))
        axis.set(xlabel="real part", ylabel="imaginary part")
        axis.label_outer()
    labels = {"before": axis.lines[-2], "after": axis.lines[-1]}
    figure.legend(labels.values(), labels, **LEGEND)


def compute_2a(horizons: Sequence[int], alphas: int, draws: int) -> dict:
    """Trace of the covariance of the meta-gradient at P = 0 against alpha (equation A.32).

    Returns alpha (A,) from 0 to 2 / lambda_max(H), horizon (T,), variance (T, A) of `draws`
    sampled gradients (divided by their number, as in A.32; one set serves all), exact
    (T, A) in closed form, the exact variance at alpha = 0 over its least, and the alpha of
    the least over 2 / lambda_max(H).
    """
    horizons, model = np.array(horizons), nqm.paper_model()
    shares, steps, at = np.linspace(0, 1, alphas), int(horizons.max()), horizons - 1

    def one_alpha(alpha):
        u = alpha * jnp.eye(2)

        def one_draw(key):
            return nqm.sampled_meta_gradients(u, model, *nqm.draw(key, model, steps))

        sampled = jax.vmap(one_draw)(jax.random.split(jax.random.key(0), draws))[:, at]
        return sampled.var(0).sum((1, 2)), nqm.gradient_variance(u, model, steps)[at]

    with jax.enable_x64(True):
        run = jax.jit(lambda alphas: jax.lax.map(one_alpha, alphas, batch_size=5))
        sampled, exact = (np.asarray(x).T for x in run(shares * STABLE_ALPHA))
    return {
        "alpha": shares * STABLE_ALPHA,
        "horizon": horizons,
        "variance": sampled,
        "exact": exact,
        "ratio_at_zero_to_best": exact[:, 0] / exact.min(1),
        "best_share": shares[exact.argmin(1)],
    }


def plot_2a(figure: Figure, result: dict) -> None:
    """Figure 2a: dots sampled, lines exact; green for T = 1 to blue for the longest."""
    axis, horizons = figure.subplots(), result["horizon"]
    colors = colormaps["winter_r"](np.linspace(0.1, 1, len(horizons)))
    for i, color in enumerate(colors):
        label = f"T = {horizons[i]}" if i % 3 == 0 or i == len(colors) - 1 else None
        axis.plot(result["alpha"], result["exact"][i], color=color, lw=1, label=label)
        axis.plot(result["alpha"], result["variance"][i], ".", color=color, ms=3)
    axis.set(xlabel="alpha, up to 2 / lambda_max(H)", yscale="log")
    axis.set_ylabel("variance of the meta-gradient\n(lines exact, dots sampled)")
    axis.legend()


def best_step(model: nqm.Model, steps: int) -> tuple[np.ndarray, float]:
    """(U* (2, 2), its loss): the least expected meta-loss over U, by Newton's method."""
    with jax.enable_x64(True):
        loss = jax.jit(lambda u: nqm.expected_loss(u.reshape(2, 2), model, steps))
        gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
        u = 0.5 / nqm.spectral_radius(model.h) * jnp.eye(2).ravel()
        for _ in range(15):
            u -= jnp.linalg.solve(hessian(u), gradient(u))
        return np.asarray(u).reshape(2, 2), float(loss(u))


def nqm_problem(model: nqm.Model, steps: int) -> estimators.Problem:
    """The noisy quadratic model with theta = U (n, n); losses at t = 1 ... T."""
    root = nqm.power(model.noise, 0.5)

    def fresh(key):
        phi, xi = nqm.draw(key, model, 0)
        return phi, xi[0]

    def step(u, carry, key):
        phi, xi = carry
        phi = phi - u @ (model.h @ (phi - xi))  # equation 5
        xi = root @ jax.random.normal(key, xi.shape)
        return (phi, xi), nqm.loss(phi, xi, model.h)

    return estimators.unroll(fresh, step, steps)


def meta_train(start, clip, key, meta_steps: int) -> jax.Array:
    """U by meta-step (M, 2, 2), from `start` (2, 2).

    Training P beside a nominal step alpha is training U = alpha I + P from alpha I + P_0.
    ES with one antithetic pair, over the whole trajectory (PES with K = T, appendix B.1).
    AdamW without weight decay, learning rate 1e-3, on the gradient clipped by value.
    """
    model = nqm.Model(*map(np.float32, nqm.paper_model()))
    estimator = estimators.pes(nqm_problem(model, UNROLL), windows=1, sigma=0.01)
    optimizer = optax.chain(optax.clip(clip), optax.adamw(1e-3, weight_decay=0.0))

    def meta_step(carry, k):
        u, state = carry
        start_key, run_key = jax.random.split(jax.random.fold_in(key, k))
        pair = estimator.init(start_key, u)
        grad, _, _ = estimator.estimate(run_key, u, pair)
        updates, state = optimizer.update(grad, state, u)
        return (optax.apply_updates(u, updates), state), u

    carry = start, optimizer.init(start)
    return jax.lax.scan(meta_step, carry, jnp.arange(meta_steps))[1]


def magnitudes(u: np.ndarray) -> np.ndarray:
    """|eigenvalues| of A, least first, of U (..., 2, 2)."""
    return np.sort(np.abs(np.linalg.eigvals(nqm.system(u, nqm.H).a)), -1)


def compute_2bc(meta_steps: int, seeds: int, alphas: Sequence[float]) -> dict:
    """Meta-training P of the noisy quadratic model, for each alpha.

    The paper leaves out the meta-learning rate (here 1e-3), the pairs a meta-step (one),
    where P starts (0, or entries N(0, 0.5^2)), and whether the meta-gradient is clipped (by
    value at 1.0, appendix B, or not at all). The last two choices make four settings.
    Arrays are (4 settings, A alphas, S seeds, M meta-steps). The loss in curves is the
    exact expected meta-loss (equation 8) of P; magnitudes (..., 2) are those of A's
    eigenvalues, least first.
    """
    settings = [(0.0, 1.0), (0.0, np.inf), (0.5, 1.0), (0.5, np.inf)]
    stds, clips = np.array(settings, np.float32).T
    keys, start_keys = (jax.random.split(jax.random.key(i), seeds) for i in (0, 1))
    starts = jax.vmap(lambda key: jax.random.normal(key, (2, 2)))(start_keys)
    starts = np.multiply.outer(stds, starts)[:, None]  # (4, 1, S, 2, 2)
    starts = starts + np.multiply.outer(alphas, np.eye(2))[:, None]  # (4, A, S, 2, 2)
    train = partial(meta_train, meta_steps=meta_steps)
    train = jnp.vectorize(train, signature="(n,n),(),()->(m,n,n)")
    u = jax.jit(train)(starts, clips[:, None, None], keys[None, None])
    u = np.asarray(u, float)  # (4, A, S, M, 2, 2)

    best, best_loss = best_step(nqm.paper_model(), UNROLL)
    with jax.enable_x64(True):
        exact = jax.vmap(lambda u: nqm.expected_loss(u, nqm.paper_model(), UNROLL))
        loss = jax.jit(lambda u: jax.lax.map(exact, u))(u.reshape(-1, meta_steps, 2, 2))
    loss = np.nan_to_num(loss, nan=np.inf, posinf=np.inf).reshape(u.shape[:-2])
    lost = ~np.isfinite(u).all((-2, -1), keepdims=True)  # the gradient overflowed: nan
    sizes = np.where(lost[..., 0], np.inf, magnitudes(np.where(lost, 0, u)))
    near = np.where(loss <= 1.1 * best_loss, np.arange(meta_steps), np.inf).min(-1)
    return {
        "alpha": np.array(alphas),
        "start_std_and_clip": settings,
        "optimum": best_loss,
        "optimum_magnitudes": magnitudes(best),
        "meta_steps_until_within_10_percent": near,
        "last_loss": loss[..., -1],
        "curves": {"loss": loss, "magnitudes": sizes},
    }


def draw_mean(axis, x, lines, undo: Callable, color: str, **style) -> None:
    """`undo` of the mean of lines (n, points) and of one standard error around it."""
    mean, error = lines.mean(0), lines.std(0, ddof=1) / len(lines) ** 0.5
    band = undo(mean - error), undo(mean + error)
    axis.fill_between(x, *band, color=color, alpha=0.2, lw=0)
    axis.plot(x, undo(mean), color=color, **style)


def draw_settings(figure, result: dict, curves: dict, optimum, undo=lambda x: x) -> Any:
    """A panel for each setting, a color for each alpha; curves: style -> (4, A, S, M).

    EMA 0.95. Where seeds start apart, each is a thin line, and the thick one their median.
    """
    axes = figure.subplots(2, 2, sharey="row")
    at = np.arange(1, result["curves"]["loss"].shape[-1] + 1)
    for panel, (std, clip) in enumerate(result["start_std_and_clip"]):
        axis = axes.flat[panel]
        for i, alpha in enumerate(result["alpha"]):
            for style, values in curves.items():
                label = f"alpha = {alpha / STABLE_ALPHA:.3g} * 2 / lambda_max(H)"
                label = label if style == "-" else None
                options = dict(color=f"C{i}", ls=style, label=label)
                lines = ema(values[panel, i], 0.95)
                if std:
                    axis.plot(at, undo(lines).T, f"C{i}{style}", lw=0.4)
                    axis.plot(at, undo(np.median(lines, 0)), **options)
                else:
                    draw_mean(axis, at, lines, undo, **options)
        axis.axhline(optimum, color="k", ls="--", lw=0.8, label="optimum")
        start = f"P from N(0, {std:g}^2), seeds and median" if std else "P from 0"
        clipped = f"clipped at {clip:g}" if np.isfinite(clip) else "not clipped"
        axis.set_title(f"{start}\ngradient {clipped}")
        axis.set(xlabel="meta-steps", xscale="log")
    figure.legend(*axis.get_legend_handles_labels(), **LEGEND)
    return axes


def plot_2b(figure: Figure, result: dict) -> None:
    """Figure 2b: magnitudes of A's eigenvalues, larger dotted, smaller solid."""
    smaller, larger = np.moveaxis(result["curves"]["magnitudes"], -1, 0)
    curves, best = {"-": smaller, ":": larger}, result["optimum_magnitudes"][-1]
    axes = draw_settings(figure, result, curves, best)
    for axis in axes.flat:
        axis.axhline(1, color="k", lw=0.8)
    axes[0, 0].set_ylabel("|eigenvalues of A| (EMA 0.95)")
    axes[1, 0].set(ylabel="|eigenvalues of A| (EMA 0.95)", ylim=(0, 2.5))


def plot_2c(figure: Figure, result: dict) -> None:
    """Figure 2c: the meta-loss; mean, error and EMA are of its logarithm."""
    curves = {"-": np.log(result["curves"]["loss"])}
    axes = draw_settings(figure, result, curves, result["optimum"], np.exp)
    for axis, highest in zip(axes[:, 0], (20, 1e4), strict=True):
        axis.set(ylabel="expected meta-loss, T = 50\n(EMA 0.95)")
        axis.set(ylim=(1, highest), yscale="log")


def figure_1(args: Any) -> tuple[dict, str, dict]:
    result = compute_1(points=41 if args.quick else 201)
    return result, "Figure 1: eigenvalues of A before and after", QUADRATIC


def figure_2a(args: Any) -> tuple[dict, str, dict]:
    horizons = [t for t in HORIZONS if t <= 100] if args.quick else HORIZONS
    alphas, draws = (20, 100) if args.quick else (50, 500)
    result = compute_2a(horizons, alphas, draws)
    return result, f"Figure 2a: {draws} draws of the meta-gradient", QUADRATIC


def figure_2bc(args: Any) -> tuple[dict, str, dict]:
    unit = 1 / STABLE_ALPHA if args.literal_alpha else STABLE_ALPHA
    meta_steps, seeds = (1000, 2) if args.quick else (20_000, 5)
    result = compute_2bc(meta_steps, seeds, alphas=unit * np.arange(5) / 10)
    title = f"Figure {args.figure}: meta-training P, {counted_seeds(seeds)}"
    return result, title, QUADRATIC


FIGURES = {
    "1": (figure_1, plot_1, 7),
    "2a": (figure_2a, plot_2a, 4.6),
    "2b": (figure_2bc, plot_2b, 5.8),
    "2c": (figure_2bc, plot_2c, 5.8),
}
