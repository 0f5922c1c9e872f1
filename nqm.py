"""The noisy quadratic model: why learned optimizers diverge (STAR, section 4, appendix A).

A linear learned optimizer P and a nominal gradient step alpha train a quadratic whose
minimum xi jumps at every step. Everything is known exactly: mean and covariance of the
parameters, the meta-loss and its gradient, the noise of that gradient, stability. From
the model to the claims, in the paper's order:

    phi' = phi - U H (phi - xi),  U = alpha I + P        update, equations 5 and 6
    phi' = A phi + (I - A) xi,    A = I - U H            `system`
    spectral radius of A below 1                         `theorem_1`, `lemma_2`, `lemma_3`

U is the matrix that multiplies the gradient; whatever an intervention does (nominal term,
preconditioner, disturbance, weight decay) it does to U, so that most functions take U.

Functions are written for one problem; `jax.vmap` them over U, alpha or keys. Those of
linear algebra alone (`system`, the bounds) answer numpy with numpy, in float64; for the
jax ones enable x64 where digits matter. The file stands alone: copy it.

`python nqm.py --h "[[2, 0], [0, 1]]" --p "[[.5, -3], [0, .6]]"` checks an H and P of yours.
Left out: Nesterov momentum; what a network's Hessian does while it trains.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

H = np.array([[1.11, 0.596], [0.596, 0.486]])  # equation A.30


class Model(NamedTuple):
    """A noisy quadratic: loss (phi - xi)' H (phi - xi) / 2, all float arrays."""

    h: jax.Array  # (n, n) symmetric, positive definite
    noise: jax.Array  # (n, n) Sigma_xi, covariance of the jumping minimum
    start_mean: jax.Array  # (n,) of phi_0
    start_cov: jax.Array  # (n, n) of phi_0; zeros for a known start


class System(NamedTuple):
    """s' = a s + b xi, a linear system driven by noise; phi is the first n of s."""

    a: jax.Array  # (d, d)
    b: jax.Array  # (d, n)


class Interval(NamedTuple):
    """low <= every eigenvalue of P <= high."""

    low: float
    high: float


def paper_model() -> Model:
    """Appendix B.1: H of A.30, xi ~ N(0, I), phi_0 ~ N(0, 10 I)."""
    return Model(H, np.eye(2), np.zeros(2), 10 * np.eye(2))


def noiseless(model: Model) -> Model:
    """The deterministic model of Lemma 4: Sigma_xi = 0."""
    return model._replace(noise=0 * model.noise)


# --- the model, simulated (equations 4 to 6)


def loss(phi: jax.Array, xi: jax.Array, h: jax.Array) -> jax.Array:
    """(phi - xi)' H (phi - xi) / 2, equation 4."""
    return 0.5 * (phi - xi) @ h @ (phi - xi)


def nominal_plus(p: np.ndarray | jax.Array, alpha: Any) -> np.ndarray | jax.Array:
    """U = alpha I + P: the nominal term g = alpha grad beside the learned P (eq. 5, 6)."""
    return alpha * np.eye(p.shape[-1], dtype=p.dtype) + p


def draw(key: jax.Array, model: Model, steps: int) -> tuple[jax.Array, jax.Array]:
    """phi_0 (n,) and xi_0 ... xi_T (T + 1, n), Gaussian as the model says."""
    start_key, noise_key = jax.random.split(key)
    zero = jnp.zeros(len(model.h))

    def normal(key, cov, shape=()):
        # "svd" takes covariances that are only positive semi-definite, zero among them
        return jax.random.multivariate_normal(key, zero, cov, shape, method="svd")

    phi = model.start_mean + normal(start_key, jnp.asarray(model.start_cov))
    return phi, normal(noise_key, jnp.asarray(model.noise), (steps + 1,))


def trajectory(
    u: jax.Array, h: jax.Array, phi: jax.Array, xi: jax.Array, momentum: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Parameters (T, n) and losses (T,) at t = 1 ... T from phi_0 (n,) and xi (T + 1, n).

    Equation 5, step by step: the gradient at phi_t is H (phi_t - xi_t), and l(phi_t) is
    seen through the same xi_t. With momentum mu (section 4.4), heavy ball:
        velocity' = mu velocity + U gradient;  phi' = phi - velocity'.
    """

    def step(carry, xis):
        phi, velocity = carry
        now, after = xis
        velocity = momentum * velocity + u @ (h @ (phi - now))
        phi = phi - velocity
        return (phi, velocity), (phi, loss(phi, after, h))

    _, out = jax.lax.scan(step, (phi, jnp.zeros_like(phi)), (xi[:-1], xi[1:]))
    return out


# --- the model, exactly (equations 6 to 8)


def system(u: np.ndarray | jax.Array, h: np.ndarray | jax.Array) -> System:
    """A = I - U H and I - A = U H of equation 6."""
    b = u @ h
    return System(np.eye(len(h), dtype=b.dtype) - b, b)


def momentum_system(
    u: np.ndarray | jax.Array, h: np.ndarray | jax.Array, momentum: Any
) -> System:
    """The joint dynamics of (phi, velocity), 2n by 2n (section 4.4, appendix A.4):

    phi'      = (I - U H) phi - mu velocity + U H xi
    velocity' =      U H  phi + mu velocity - U H xi
    """
    a, b = system(u, h)
    xp = b.__array_namespace__()  # numpy or jax.numpy, as it came
    mu = momentum * np.eye(len(h), dtype=b.dtype)
    rows = [xp.concat([a, -mu], axis=1), xp.concat([b, mu], axis=1)]
    return System(xp.concat(rows), xp.concat([b, -b]))


def moments(
    linear: System, mean: jax.Array, cov: jax.Array, noise: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Mean (T, d) and covariance (T, d, d) of s_t, t = 1 ... T, from those of s_0.

    mean' = a mean,  cov' = a cov a' + b Sigma_xi b'. With a = A, b = I - A and cov_0 = 0
    this is A^t phi_0 and Sigma_t of equation 7.
    """
    a, b = linear

    def step(carry, _):
        mean, cov = carry
        carry = a @ mean, a @ cov @ a.T + b @ noise @ b.T
        return carry, carry

    return jax.lax.scan(step, (jnp.asarray(mean), jnp.asarray(cov)), length=steps)[1]


def expected_losses(linear: System, model: Model, steps: int) -> jax.Array:
    """E l(phi_t), t = 1 ... T, shape (T,): the terms of equation 8.

    Deviation: the paper's equation 8 drops the 1/2 of its equation 4; it is here.
    Hidden states, if the system has them, start at zero.
    """
    n, extra = len(model.h), len(linear.a) - len(model.h)
    mean0 = jnp.pad(model.start_mean, (0, extra))
    cov0 = jnp.pad(model.start_cov, ((0, extra), (0, extra)))
    mean, cov = moments(linear, mean0, cov0, model.noise, steps)
    mean, cov = mean[:, :n], cov[:, :n, :n]
    quadratic = jnp.einsum("ti,ij,tj->t", mean, model.h, mean)
    return 0.5 * (quadratic + jnp.einsum("ij,tji->t", model.h, cov + model.noise[None]))


def expected_loss(u: jax.Array, model: Model, steps: int) -> jax.Array:
    """The meta-loss L(theta; T) of equation 8, with the 1/2: mean over t = 1 ... T."""
    return expected_losses(system(u, model.h), model, steps).mean()


def meta_gradient(
    p: jax.Array, alpha: Any, model: Model, steps: int
) -> tuple[jax.Array, jax.Array]:
    """(dL/dP (n, n), dL/dalpha ()) of equation 8, exact."""

    def meta_loss(p, alpha):
        return expected_loss(nominal_plus(p, alpha), model, steps)

    return jax.grad(meta_loss, (0, 1))(p, alpha)


def sampled_meta_gradients(
    u: jax.Array, model: Model, phi: jax.Array, xi: jax.Array
) -> jax.Array:
    """One draw of the gradient with respect to P, for every horizon 1 ... T: (T, n, n).

    Differentiates the trajectory through the draws (reparameterisation), equal to what
    backpropagation gives; forward, since then one pass serves all horizons.
    """
    by_step = jax.jacfwd(lambda u: trajectory(u, model.h, phi, xi)[1])(u)  # (T, n, n)
    return by_step.cumsum(0) / jnp.arange(1.0, len(by_step) + 1)[:, None, None]


def gradient_variance(u: jax.Array, model: Model, steps: int) -> jax.Array:
    """Trace of the covariance of `sampled_meta_gradients`, horizons 1 ... T: (T,), exact.

    What figure 2a samples, in closed form (not in the paper). For one entry P_ij let
    w_t = (phi_t, dphi_t/dP_ij, xi_t), Gaussian with w' = F w + noise. The gradient of
    l(phi_t) is g_t = (dphi_t)' H (phi_t - xi_t) = w' Q w, and G_t = g_1 + ... + g_t. With
    m = E w, M = E w w' and K_t = Cov(w_t w_t', G_{t-1}), Gaussian fourth moments give
        C_t = Cov(w_t w_t', g_t) = 2 (M Q M - (m' Q m) m m')
        Var G_t = Var G_{t-1} + 2 tr(Q K_t) + tr(Q C_t),   K_{t+1} = F (K_t + C_t) F'.
    """
    n, h = len(model.h), jnp.asarray(model.h)
    a, b = system(jnp.asarray(u), h)
    o = jnp.zeros_like(h)
    q = 0.5 * jnp.block([[o, h, o], [h, o, -h], [o, -h, o]])
    fresh = jnp.zeros((3 * n, 3 * n)).at[2 * n :, 2 * n :].set(model.noise)

    def entry(direction):  # (n, n), one at ij
        d = direction @ h
        f = jnp.block([[a, o, b], [-d, a, d], [o, o, o]])

        def step(carry, _):
            m, mm, k, variance = carry
            c = 2 * (mm @ q @ mm - (m @ q @ m) * jnp.outer(m, m))
            variance += 2 * jnp.trace(q @ k) + jnp.trace(q @ c)
            return (f @ m, f @ mm @ f.T + fresh, f @ (k + c) @ f.T, variance), variance

        m = jnp.pad(model.start_mean, (0, 2 * n))
        mm = fresh.at[:n, :n].set(model.start_cov) + jnp.outer(m, m)
        first = f @ m, f @ mm @ f.T + fresh, 0 * mm, 0.0 * m[0]  # losses start at t = 1
        return jax.lax.scan(step, first, length=steps)[1]

    variances = jax.vmap(entry)(jnp.eye(n * n).reshape(n * n, n, n))  # (n n, T)
    return variances.sum(0) / jnp.arange(1.0, steps + 1) ** 2


# --- stability (Theorem 1, Lemmas 2, 3 and 5), in numpy


def spectral_radius(a: np.ndarray | jax.Array) -> np.ndarray:
    """rho(A) = max |eigenvalue|, of (..., d, d): (...)."""
    return np.abs(np.linalg.eigvals(np.asarray(a))).max(-1)


def power(h: np.ndarray | jax.Array, exponent: float) -> np.ndarray:
    """H^exponent of a symmetric positive definite H; -1/2 is the paper's preconditioner."""
    values, vectors = np.linalg.eigh(np.asarray(h))
    return vectors * values**exponent @ vectors.T


def largest(h: np.ndarray | jax.Array) -> float:
    """lambda_max(H) of a symmetric H."""
    return float(np.linalg.eigvalsh(np.asarray(h))[-1])


def theorem_1(h: np.ndarray, alpha: float) -> Interval:
    """-alpha <= lambda(P) <= 2 / lambda_max(H) - alpha  =>  rho(A) <= 1 (eq. 9, 10).

    Deviation: the paper asks P to be diagonalizable with real eigenvalues; that is not
    enough (P = [[.5, -3], [0, .6]], alpha = 0, H of A.30: rho = 1.88). It holds for
    symmetric P, of any sign of alpha: A is similar to I - H^1/2 U H^1/2, symmetric. Then
    (9) is also necessary; (10) is not (P = diag(0, 3), H = diag(2, .1): rho = 1).

    Under noise the upper bound must be strict: an eigenvalue -1 of A adds 4 w'Sigma w at
    every step, w its left eigenvector; an eigenvalue +1 lets no noise in (I - A is 0).
    """
    return Interval(0.0 - alpha, 2 / largest(h) - alpha)


def lemma_2(h: np.ndarray, alpha: float) -> Interval:
    """The same for phi' = phi - H^-1/2 (alpha I + P) grad (eq. 12, 13; P symmetric).

    Looser than `theorem_1` if lambda_max(H) > 1, tighter if it is below. In one line:
    H^-1/2 U H is similar to U H^1/2, which is Theorem 1 with H^1/2 for H.
    """
    return Interval(-alpha, 2 / largest(h) ** 0.5 - alpha)


def lemma_3(h: np.ndarray, alpha: float, d_max: np.ndarray) -> Interval:
    """For P~, so that P = diag(d) P~ is stable for all 0 < d_i <= d_max_i (eq. 15 to 17).

    Deviation: the paper's P~ commutes with all these diag(d), hence is diagonal; that is
    said here. For other symmetric P~ the lemma fails, since diag(d) P~ is not symmetric.
    Raises ValueError unless 0 < alpha < 2 / lambda_max(H), or if a d_max is not positive.
    """
    low, high = theorem_1(h, alpha)
    if not (alpha > 0 and high > 0 and np.min(d_max) > 0):
        raise ValueError("Lemma 3 needs 0 < alpha < 2 / lambda_max(H), and d_max > 0")
    return Interval(low / float(np.max(d_max)), high / float(np.max(d_max)))


def momentum_bound(h: np.ndarray, alpha: float, momentum: float) -> Interval:
    """-alpha <= lambda(P) <= 2 (1 + mu) / lambda_max(H) - alpha (section 4.4, app. A.4).

    Joint stability of (phi, velocity), symmetric P: an eigenvalue z of U H gives roots of
    x^2 - (1 + mu - z) x + mu, within the unit circle iff 0 <= z <= 2 (1 + mu) (Jury). So
    momentum loosens the bound, as the paper says. For complex z, where P is not
    symmetric, it may do the opposite; ask `spectral_radius(momentum_system(...).a)`.
    Raises ValueError unless 0 <= mu < 1.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not in [0, 1)")
    return Interval(-alpha, 2 * (1 + momentum) / largest(h) - alpha)


def exact_alpha(h: np.ndarray, p: np.ndarray) -> Interval:
    """All alpha with rho(A) <= 1, for symmetric P: necessary and sufficient.

    rho(A) <= 1 iff 0 <= H^1/2 (alpha I + P) H^1/2 <= 2 I as matrices, that is iff
    -lambda_min(P) <= alpha <= lambda_min(2 H^-1 - P). Empty if low > high.
    """
    high = np.linalg.eigvalsh(2 * power(h, -1) - p)[0]
    return Interval(float(0.0 - np.linalg.eigvalsh(p)[0]), float(high))


def limit_loss(linear: System, model: Model) -> float:
    """lim L(T), T to infinity, of a stable system (Lemma 5, constructively).

    The start is forgotten; the covariance solves the discrete Lyapunov equation
    S = a S a' + b Sigma_xi b'; the loss is tr H (S + Sigma_xi) / 2. Raises ValueError
    if rho(a) >= 1. (Lemma 5 holds; its proof takes |A^k| = rho(A)^k, true for normal A
    only. For symmetric P, |A^k| <= sqrt(cond H) rho(A)^k, which repairs it.)
    """
    a, b, noise, h = (np.asarray(x, float) for x in (*linear, model.noise, model.h))
    if spectral_radius(a) >= 1:
        rho = spectral_radius(a)
        raise ValueError(f"spectral radius {rho:.6g}: the start is never forgotten")
    d, n = b.shape
    drive = (b @ noise @ b.T).reshape(d * d)
    cov = np.linalg.solve(np.eye(d * d) - np.kron(a, a), drive).reshape(d, d)
    return float(0.5 * np.trace(h @ (cov[:n, :n] + noise)))


# --- the check to copy


class Check(NamedTuple):
    """What `check` found."""

    eigenvalues: np.ndarray  # (n,) of A = I - (alpha I + P) H, largest magnitude first
    radius: float  # spectral radius of A
    symmetric: bool  # P is symmetric, so that Theorem 1 applies
    bound: Interval  # Theorem 1's, for the eigenvalues of P
    broken: tuple[str, ...]  # of "(9)", "(10)": which of its bounds P breaks
    mend: (
        Interval | None
    )  # alphas that keep A stable: all of them for symmetric P, else
    # the first stable stretch of a grid of 4,001; None if none was found


def check(h: np.ndarray, p: np.ndarray, alpha: float) -> Check:
    """Is phi' = phi - (alpha I + P) H phi stable, which bound is broken, what mends it?

    Raises ValueError unless h and p are finite n by n and h symmetric positive definite.
    """
    h, p = np.asarray(h, float), np.asarray(p, float)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or p.shape != h.shape:
        raise ValueError(f"H {h.shape} and P {p.shape} must be square and of one size")
    if not (np.isfinite(h).all() and np.isfinite(p).all() and np.isfinite(alpha)):
        raise ValueError("H, P and alpha must be finite")
    if not _symmetric(h) or np.linalg.eigvalsh(h)[0] <= 0:
        raise ValueError("H must be symmetric and positive definite")
    values = np.linalg.eigvals(system(nominal_plus(p, alpha), h).a)
    values = values[np.argsort(-np.abs(values))]
    symmetric, bound = _symmetric(p), theorem_1(h, alpha)
    own = np.linalg.eigvals(p).real
    sides = {"(9)": own.min() < bound.low, "(10)": own.max() > bound.high}
    return Check(
        eigenvalues=values,
        radius=float(np.abs(values[0])),
        symmetric=symmetric,
        bound=bound,
        broken=tuple(name for name, broken in sides.items() if broken),
        mend=_mend(h, p, symmetric),
    )


def _symmetric(m: np.ndarray) -> bool:
    return np.abs(m - m.T).max(initial=0) <= 1e-9 * np.abs(m).max(initial=0)


def _mend(
    h: np.ndarray, p: np.ndarray, symmetric: bool, points: int = 4001
) -> Interval | None:
    if symmetric:
        found = exact_alpha(h, p)
        return found if found.low <= found.high else None
    # |trace A| <= n brackets every stable alpha; between, a grid and its first stable run.
    middle, width = -np.trace(p @ h) / np.trace(h), 2 * len(h) / np.trace(h)
    alphas = np.linspace(middle, middle + width, points)
    stable = np.array(
        [spectral_radius(system(nominal_plus(p, a), h).a) <= 1 for a in alphas]
    )
    if not stable.any():
        return None
    run = alphas[stable.argmax() :][
        : np.argmin(np.append(stable[stable.argmax() :], 0))
    ]
    return Interval(float(run[0]), float(run[-1]))


def explain(h: np.ndarray, p: np.ndarray, alpha: float) -> str:
    """`check` in words, a line per step."""
    found, own = check(h, p, alpha), np.linalg.eigvals(np.asarray(p, float))
    least, most = own.real.min(), own.real.max()
    verdict = "stable" if found.radius < 1 else "UNSTABLE"
    if np.isclose(found.radius, 1):
        verdict = "marginal (under noise, an eigenvalue -1 still diverges)"
    uphill = "BROKEN, uphill somewhere" if "(9)" in found.broken else "holds"
    overshoot = "BROKEN, may overshoot" if "(10)" in found.broken else "holds"

    def listed(values):
        return ", ".join(f"{v:.4g}" for v in values)

    lines = [
        f"eigenvalues of H      {listed(np.linalg.eigvalsh(np.asarray(h, float)))}",
        f"eigenvalues of P      {listed(own)}",
        f"eigenvalues of A      {listed(found.eigenvalues)}    A = I - (alpha I + P) H",
        f"spectral radius       {found.radius:.4g}: {verdict}",
        f"Theorem 1, (9)        {found.bound.low:.4g} <= {least:.4g}: {uphill}",
        f"Theorem 1, (10)       {most:.4g} <= {found.bound.high:.4g}: {overshoot}",
    ]
    if not found.symmetric:
        lines += [
            "P is not symmetric    so Theorem 1 does not apply; the radius decides"
        ]
    if found.mend is None:
        return "\n".join(
            [*lines, "no alpha found        that mends it: shrink P (weight decay)"]
        )
    return "\n".join(
        [*lines, "stable for alpha in   [{:.6g}, {:.6g}]".format(*found.mend)]
    )


def parse_matrix(text: str) -> np.ndarray:
    """ "[[1, 2], [3, 4]]" -> array. Raises ValueError."""
    try:
        return np.array(ast.literal_eval(text), float)
    except (ValueError, TypeError, SyntaxError, OverflowError):
        raise ValueError(f"not a matrix like [[1, 2], [3, 4]]: {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is A = I - (alpha I + P) H stable?")
    paper, uphill = "[[1.11, .596], [.596, .486]]", "[[.5, -3], [0, .6]]"
    parser.add_argument("--h", default=paper, help=f"Hessian, default {paper} (A.30)")
    parser.add_argument("--p", default=uphill, help=f"learned matrix, default {uphill}")
    parser.add_argument(
        "--alpha", type=float, default=0.0, help="nominal step, default 0"
    )
    args = parser.parse_args(argv)
    try:
        print(explain(parse_matrix(args.h), parse_matrix(args.p), args.alpha))
    except ValueError as error:
        print(f"nqm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
