"""The noisy quadratic model: why learned optimizers diverge (STAR, section 4, appendix A).

A linear learned optimizer P and a nominal gradient step alpha train a quadratic, whose
minimum xi jumps at every step. These are known exactly: mean and covariance of the
parameters phi, the meta-loss, its gradient, the noise of that gradient, and stability.

    phi' = phi - U H (phi - xi),  U = alpha I + P        update, equations 5 and 6
    phi' = A phi + (I - A) xi,    A = I - U H            `system`
    spectral radius rho(A) below 1                       `theorem_1`, `lemma_2`, `lemma_3`

U is the matrix that multiplies the gradient. The nominal term, the preconditioner, weight
decay and a disturbance all act on U. So most functions take U.

Shapes: n parameters, k states of a linear system, T inner steps. Batch with `jax.vmap`
over U, alpha or keys. `system` and the bounds return numpy float64 for numpy arrays. For
the rest, enable jax's x64 where digits matter. Left out: Nesterov momentum, and a Hessian
that changes during training. The file stands alone. Its command checks an H and a P:
`python nqm.py --h "[[2, 0], [0, 1]]" --p "[[.5, -3], [0, .6]]" --alpha 0.1`.
"""

import argparse
import ast
import signal
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

H = np.array([[1.11, 0.596], [0.596, 0.486]])  # equation A.30


class Model(NamedTuple):
    """A noisy quadratic: the loss (phi - xi)' H (phi - xi) / 2, all float arrays."""

    h: jax.Array  # (n, n) symmetric, positive definite
    noise: jax.Array  # (n, n) Sigma_xi, covariance of the jumping minimum, mean 0
    start_mean: jax.Array  # (n,) of phi_0
    start_cov: jax.Array  # (n, n) of phi_0, zeros for a known start


class System(NamedTuple):
    """s' = a s + b xi, a linear system driven by noise. phi is the first n of s."""

    a: jax.Array  # (k, k)
    b: jax.Array  # (k, n)


def paper_model() -> Model:
    """Appendix B.1: H of A.30, xi ~ N(0, I), phi_0 ~ N(0, 10 I)."""
    return Model(H, np.eye(2), np.zeros(2), 10 * np.eye(2))


# --- the model, simulated and exactly (equations 4 to 8)
def loss(phi: jax.Array, xi: jax.Array, h: jax.Array) -> jax.Array:
    """(phi - xi)' H (phi - xi) / 2, equation 4."""
    return 0.5 * (phi - xi) @ h @ (phi - xi)


def nominal_plus(p, alpha):
    """U = alpha I + P: the nominal term alpha grad beside the learned P (eq. 5, 6).

    P can cancel the nominal term (eq. 14): P = P* - alpha I gives U = P*.
    """
    return alpha * np.eye(len(p), dtype=p.dtype) + p


def draw(key: jax.Array, model: Model, steps: int) -> tuple[jax.Array, jax.Array]:
    """phi_0 (n,) and xi_0 ... xi_T (T + 1, n), Gaussian. A covariance may be singular."""
    start_key, noise_key = jax.random.split(key)
    _, noise, mean, cov = map(jnp.asarray, model)
    normal = partial(jax.random.multivariate_normal, method="svd")
    xi = normal(noise_key, jnp.zeros_like(mean), noise, (steps + 1,))
    return normal(start_key, mean, cov), xi


def trajectory(u, h, phi, xi, momentum=0.0) -> tuple[jax.Array, jax.Array]:
    """Parameters (T, n) and losses (T,) at t = 1 ... T from phi_0 (n,) and xi (T + 1, n).

    Equation 5, step by step. The gradient at phi_t is H (phi_t - xi_t), and the loss of
    phi_t uses the same xi_t. Heavy-ball momentum mu (section 4.4):
        velocity' = mu velocity + U gradient,  phi' = phi - velocity'
    """

    def step(carry, xis):
        phi, velocity = carry
        now, after = xis
        velocity = momentum * velocity + u @ (h @ (phi - now))
        phi = phi - velocity
        return (phi, velocity), (phi, loss(phi, after, h))

    return jax.lax.scan(step, (phi, jnp.zeros_like(phi)), (xi[:-1], xi[1:]))[1]


def system(u, h) -> System:
    """A = I - U H and I - A = U H of equation 6."""
    b = u @ h
    return System(np.eye(len(h), dtype=b.dtype) - b, b)


def momentum_system(u, h, momentum: float) -> System:
    """The joint dynamics of (phi, velocity), k = 2n (section 4.4, appendix A.4):

    phi'      = (I - U H) phi - mu velocity + U H xi
    velocity' =      U H  phi + mu velocity - U H xi
    """
    eye = np.eye(len(h), dtype=h.dtype)
    coasting = np.kron([[1, -momentum], [0, momentum]], eye)  # without a gradient
    b = np.vstack([eye, -eye]) @ system(u, h).b
    return System(coasting - b @ np.hstack([eye, 0 * eye]), b)


def moments(linear: System, model: Model, steps: int) -> tuple[jax.Array, jax.Array]:
    """Mean (T, k) and covariance (T, k, k) of s_1 ... s_T. s_0 is phi_0, then zeros.

        mean' = a mean,  cov' = a cov a' + b Sigma_xi b'

    For a known phi_0, a = A and b = I - A they are A^t phi_0 and Sigma_t of equation 7.
    """
    a, b = linear
    extra = len(a) - len(model.h)

    def step(carry, _):
        mean, cov = carry
        carry = a @ mean, a @ cov @ a.T + b @ model.noise @ b.T
        return carry, carry

    start = jnp.pad(model.start_mean, (0, extra)), jnp.pad(model.start_cov, (0, extra))
    return jax.lax.scan(step, start, length=steps)[1]


def expected_losses(linear: System, model: Model, steps: int) -> jax.Array:
    """E l(phi_t) for t = 1 ... T, shape (T,): the terms of equation 8.

    Deviation: equation 8 lacks the factor 1/2 of equation 4. It is here.
    Lemma 4: without noise, every term is smaller.
    """
    n, (mean, cov) = len(model.h), moments(linear, model, steps)
    second = cov + mean[:, :, None] * mean[:, None, :]  # (T, k, k), E s s'
    distance = second[:, :n, :n] + model.noise[None]  # E (phi - xi) (phi - xi)'
    return 0.5 * jnp.einsum("ij,tji->t", model.h, distance)


def expected_loss(u: jax.Array, model: Model, steps: int) -> jax.Array:
    """The meta-loss L(theta; T) of equation 8 with the 1/2, the mean over t = 1 ... T."""
    return expected_losses(system(u, model.h), model, steps).mean()


def meta_gradient(p, alpha, model: Model, steps: int) -> tuple[jax.Array, jax.Array]:
    """(dL/dP (n, n), dL/dalpha ()) of equation 8, exact, as both act through U."""
    by_u = jax.grad(expected_loss)(nominal_plus(p, alpha), model, steps)
    return by_u, jnp.trace(by_u)


def sampled_meta_gradients(u, model: Model, phi, xi) -> jax.Array:
    """One draw's gradient with respect to P, for every horizon 1 ... T: (T, n, n).

    For one horizon it is what backpropagation through the trajectory gives. Forward
    differentiation serves all horizons in one pass.
    """
    by_step = jax.jacfwd(lambda u: trajectory(u, model.h, phi, xi)[1])(u)  # (T, n, n)
    return by_step.cumsum(0) / jnp.arange(1.0, len(by_step) + 1)[:, None, None]


def gradient_variance(u: jax.Array, model: Model, steps: int) -> jax.Array:
    """Trace of the covariance of `sampled_meta_gradients`, horizons 1 ... T: (T,), exact.

    Figure 2a samples this number (A.32). The closed form is ours. For one entry P_ij let
    w_t = (phi_t, dphi_t/dP_ij, xi_t). It is Gaussian, with w' = J w + noise. The gradient
    of l(phi_t) is g_t = (dphi_t)' H (phi_t - xi_t) = w' Q w. Let G_t = g_1 + ... + g_t,
    m = E w, mm = E w w' and V_t = Cov(w_t w_t', G_{t-1}). Gaussian fourth moments give
        C_t = Cov(w_t w_t', g_t) = 2 (mm Q mm - (m' Q m) m m')
        Var G_t = Var G_{t-1} + 2 tr(Q V_t) + tr(Q C_t),   V_{t+1} = J (V_t + C_t) J'.
    """
    n, h = len(model.h), jnp.asarray(model.h)
    a, b = system(jnp.asarray(u), h)
    o = jnp.zeros_like(h)
    q = 0.5 * jnp.block([[o, h, o], [h, o, -h], [o, -h, o]])
    fresh = jnp.zeros((3 * n, 3 * n)).at[2 * n :, 2 * n :].set(model.noise)

    def entry(direction):  # (n, n), one at ij
        db = direction @ h
        j = jnp.block([[a, o, b], [-db, a, db], [o, o, o]])

        def step(carry, _):
            m, mm, v, variance = carry
            c = 2 * (mm @ q @ mm - (m @ q @ m) * jnp.outer(m, m))
            variance += 2 * jnp.trace(q @ v) + jnp.trace(q @ c)
            return (j @ m, j @ mm @ j.T + fresh, j @ (v + c) @ j.T, variance), variance

        m = jnp.pad(model.start_mean, (0, 2 * n))
        mm = fresh.at[:n, :n].set(model.start_cov) + jnp.outer(m, m)
        first = j @ m, j @ mm @ j.T + fresh, 0 * mm, 0.0 * m[0]  # losses start at t = 1
        return jax.lax.scan(step, first, length=steps)[1]

    variances = jax.vmap(entry)(jnp.eye(n * n).reshape(n * n, n, n))  # (n n, T)
    return variances.sum(0) / jnp.arange(1.0, steps + 1) ** 2


# --- stability (Theorem 1, Lemmas 2, 3 and 5), in numpy. Bounds are pairs (low, high).
def spectral_radius(a: np.ndarray | jax.Array) -> np.ndarray:
    """rho(A) = max |eigenvalue| of each matrix: (..., k, k) -> (...)."""
    return np.abs(np.linalg.eigvals(np.asarray(a))).max(-1)


def power(h: np.ndarray | jax.Array, exponent: float) -> np.ndarray:
    """H^exponent of a symmetric positive definite H. -1/2 is the paper's preconditioner."""
    values, vectors = np.linalg.eigh(np.asarray(h))
    return vectors * values**exponent @ vectors.T


def theorem_1(h: np.ndarray, alpha: float) -> tuple[float, float]:
    """-alpha <= lambda(P) <= 2 / lambda_max(H) - alpha  =>  rho(A) <= 1 (eq. 9, 10).

    It holds for symmetric P and any alpha: A is similar to I - H^1/2 U H^1/2, symmetric.
    Then (9) is also necessary. (10) is not: P = diag(0, 3), H = diag(2, .1) have rho = 1.

    Deviation: a diagonalizable P with real eigenvalues, as the paper asks, is not enough.
    P = [[.5, -3], [0, .6]], alpha = 0 and H of A.30 have rho = 1.88.

    A spectral radius of 1 needs care under noise. An eigenvalue exp(i omega) with left
    eigenvector e adds |1 - exp(i omega)|^2 e'Sigma_xi e to the variance of e'phi each step.
    The factor is 4 for -1 and 0 for +1. Noise gets in, too, where +1 lacks eigenvectors,
    as for H = I and P = [[0, -1], [0, 0]]. For symmetric P it never lacks one.
    """
    return 0.0 - alpha, 2 / np.linalg.eigvalsh(h)[-1] - alpha


def lemma_2(h: np.ndarray, alpha: float) -> tuple[float, float]:
    """-alpha <= lambda(P) <= 2 / lambda_max(H)^1/2 - alpha  =>  rho <= 1 (eq. 12, 13).

    The update is phi' = phi - H^-1/2 (alpha I + P) grad, P symmetric. H^-1/2 U H is similar
    to U H^1/2. So H^1/2 takes the place of H in Theorem 1. The bound is looser than
    Theorem 1's if lambda_max(H) > 1, and tighter below 1. Deviation: as in Theorem 1.
    """
    return theorem_1(power(h, 0.5), alpha)


def lemma_3(h: np.ndarray, alpha: float, d_max: np.ndarray) -> tuple[float, float]:
    """Bounds of P~ so that P = diag(d) P~ is stable for all 0 < d_i <= d_max_i (15 to 17).

    Deviation: the paper asks P~ to commute with every such diag(d). So P~ is diagonal, and
    the lemma holds. It fails for other symmetric P~, since diag(d) P~ is not symmetric.
    Raises ValueError unless 0 < alpha < 2 / lambda_max(H) and every d_max_i > 0.
    """
    low, high = theorem_1(h, alpha)
    if not low < 0 < high or not np.min(d_max) > 0:
        raise ValueError("Lemma 3 needs 0 < alpha < 2 / lambda_max(H), and d_max > 0")
    return low / np.max(d_max), high / np.max(d_max)


def momentum_bound(h: np.ndarray, alpha: float, momentum: float) -> tuple[float, float]:
    """-alpha <= lambda(P) <= 2 (1 + mu) / lambda_max(H) - alpha (section 4.4, app. A.4).

    Then phi and velocity are jointly stable, for symmetric P and 0 <= mu < 1. An eigenvalue
    z of U H gives the system the roots of x^2 - (1 + mu - z) x + mu. By Jury's test these
    are in the unit circle if and only if 0 <= z <= 2 (1 + mu). Momentum loosens the bound,
    as the paper says. It can destabilize where P is not symmetric and z complex.
    """
    return theorem_1(h / (1 + momentum), alpha)


def exact_alpha(h: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """All alpha with rho(A) <= 1, for symmetric P: necessary and sufficient.

    rho(A) <= 1 if and only if 0 <= H^1/2 (alpha I + P) H^1/2 <= 2 I as matrices. So the
    bounds are -lambda_min(P) <= alpha <= lambda_min(2 H^-1 - P). No alpha if low > high.
    """
    return 0.0 - np.linalg.eigvalsh(p)[0], np.linalg.eigvalsh(2 * power(h, -1) - p)[0]


def limit_loss(linear: System, model: Model) -> float:
    """lim L(T) for T to infinity, of a stable system: Lemma 5, made computable.

    A stable system forgets its start. Its covariance solves the discrete Lyapunov equation
    Sigma = a Sigma a' + b Sigma_xi b'. The loss is tr H (Sigma + Sigma_xi) / 2. Raises
    ValueError if rho(a) >= 1. Deviation: the proof takes |A^t| = rho(A)^t (A.14), true of
    normal A only. For symmetric P, |A^t| <= sqrt(cond H) rho(A)^t repairs it.
    """
    a, b, noise, h = (np.asarray(x, float) for x in (*linear, model.noise, model.h))
    if spectral_radius(a) >= 1:
        raise ValueError("spectral radius >= 1: the start is never forgotten")
    k, n = b.shape
    drive = (b @ noise @ b.T).reshape(k * k)
    cov = np.linalg.solve(np.eye(k * k) - np.kron(a, a), drive).reshape(k, k)
    return float(0.5 * np.trace(h @ (cov[:n, :n] + noise)))


# --- the command
def check(h: np.ndarray, p: np.ndarray, alpha: float) -> str:
    """Is A = I - (alpha I + P) H stable, which bound is broken, which alpha mends it?"""
    if not np.allclose(h, h.T) or np.linalg.eigvalsh(h)[0] <= 0:
        raise ValueError("H must be symmetric and positive definite")
    a, (low, high) = system(nominal_plus(p, alpha), h).a, theorem_1(h, alpha)
    of_a, of_p = (np.real_if_close(np.linalg.eigvals(x)) for x in (a, p))
    rho, least, most = np.abs(of_a).max(), of_p.real.min(), of_p.real.max()
    uphill = "holds" if low <= least else "BROKEN, uphill somewhere"
    overshoots = "holds" if most <= high else "BROKEN, may overshoot"
    if np.allclose(p, p.T):
        mend = "stable for alpha in   [{:.4g}, {:.4g}]".format(*exact_alpha(h, p))
    else:  # |trace A| <= n for a stable A, so that this grid covers every stable alpha
        alphas = (np.linspace(0, 2 * len(h), 4001) - np.trace(p @ h)) / np.trace(h)
        radii = [spectral_radius(system(nominal_plus(p, x), h).a) for x in alphas]
        best = f"{min(radii):.4g} at alpha = {alphas[np.argmin(radii)]:.4g}"
        mend = f"P is not symmetric    no bound applies; least radius {best}"
    return f"""\
eigenvalues of H      {np.linalg.eigvalsh(h).round(4)}
eigenvalues of P      {of_p.round(4)}
eigenvalues of A      {of_a.round(4)}
spectral radius       {rho:.4g}: {"stable" if rho < 1 else "UNSTABLE"}
Theorem 1, (9)        {low:.4g} <= {least:.4g}: {uphill}
Theorem 1, (10)       {most:.4g} <= {high:.4g}: {overshoots}
{mend}"""


def main(argv=None):
    parser = argparse.ArgumentParser(
        "nqm.py", usage=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--h", default="[[1.11, .596], [.596, .486]]", help="H, A.30")
    parser.add_argument("--p", default="[[.5, -3], [0, .6]]", help="learned matrix")
    parser.add_argument("--alpha", type=float, default=0.0, help="nominal step")
    args = parser.parse_args(argv)
    try:
        h, p = (np.array(ast.literal_eval(x), float, ndmin=2) for x in (args.h, args.p))
        print(check(h, p, args.alpha))
    except (ValueError, TypeError, SyntaxError) as error:
        parser.error(f"{error}; a matrix is written [[1, 2], [3, 4]]")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly with `| head`
    main()
