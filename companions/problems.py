"""Small deterministic problems, the tasks of Maheswaranathan et al. 2020 (appendix C.1).

"Reverse engineering learned optimizers reveals known and novel mechanisms": problems that
a couple of hundred steps solve, whose gradients carry no noise. Each is a function
key -> Problem; the key draws the member of the distribution, `init` the start.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    init: Callable  # key -> params
    loss: Callable  # params -> ()
    loss_limit: float  # a step's loss above this, or nan, counts as this


CURVATURES = 1e-3, 1.0  # smallest and largest eigenvalue of a Hessian
DIMENSIONS = 5


def linear_regression(key: jax.Array) -> Problem:
    """0.5 |A x - b|^2 in 5 dimensions, A and b drawn by the key; x_0 ~ N(0, I).

    A = diag(sqrt(lambda)) Q: the Hessian A'A has eigenvalues lambda log-uniform in
    CURVATURES (condition numbers from 1 to 1000, median 110), and its axes are those of a
    random reflection Q; b ~ N(0, I). The paper says only that A and b are random.
    """
    # one draw for all: a problem is drawn anew at each of its steps
    x, u, b = jax.random.normal(key, (3, DIMENSIONS))
    low, high = np.log(CURVATURES)
    values = jnp.exp(low + (high - low) * jax.scipy.stats.norm.cdf(x))
    q = jnp.eye(DIMENSIONS) - 2 / (u @ u) * jnp.outer(u, u)
    a = jnp.sqrt(values)[:, None] * q
    return Problem(
        init=lambda key: jax.random.normal(jax.random.fold_in(key, 1), (DIMENSIONS,)),
        loss=lambda x: 0.5 * ((a @ x - b) ** 2).sum(),
        loss_limit=1e3,
    )


def rosenbrock(key: jax.Array) -> Problem:
    """(1 - x)^2 + 100 (y - x^2)^2, least at (1, 1); x_0 ~ U(-2, 2), y_0 ~ U(-1, 3)."""

    def loss(params):
        x, y = params
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    low, high = np.array([-2.0, -1.0], np.float32), np.array([2.0, 3.0], np.float32)
    return Problem(
        init=lambda key: low + (high - low) * jax.random.uniform(key, (2,)),
        loss=loss,
        loss_limit=1e4,
    )


def moons(
    points: int, noise: float = 0.1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two half circles that interlock: (points, 2) float32 and labels (points,) of +-1."""
    rng = np.random.RandomState(seed)
    side = np.where(np.arange(points) % 2, 1.0, -1.0)
    angle = rng.uniform(0, np.pi, points)
    x = np.cos(angle) - side / 2  # the upper one to the right of the lower one
    y = side * (0.25 - np.sin(angle))
    xy = np.stack([x, y], 1) + noise * rng.normal(size=(points, 2))
    return xy.astype(np.float32), side.astype(np.float32)


def two_moons(key: jax.Array, width: int = 64, points: int = 64) -> Problem:
    """A network on two moons: three hidden layers of tanh, logistic loss, full batch.

    The data are the same for all; init draws the weights (normal over sqrt(fan in),
    truncated at 2 deviations; biases 0). The paper leaves open points and noise (0.1).
    """
    xy, side = moons(points)
    sizes = (2, width, width, width, 1)
    weights = jax.nn.initializers.lecun_normal()

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [{"w": weights(k, (n, m)), "b": jnp.zeros(m)} for k, n, m in shapes]

    def loss(params):
        *hidden, last = params
        x = xy
        for layer in hidden:
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        logit = (x @ last["w"] + last["b"][None])[:, 0]
        return jax.nn.softplus(-side * logit).mean()

    return Problem(init, loss, loss_limit=10 * math.log(2))


PROBLEMS = {
    "linear_regression": linear_regression,
    "rosenbrock": rosenbrock,
    "two_moons": two_moons,
    "two_moons_small": lambda key: two_moons(key, width=16),
}
