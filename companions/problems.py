"""Small problems without noise: the tasks of Maheswaranathan et al. 2020 (appendix C.1).

The paper is "Reverse engineering learned optimizers reveals known and novel mechanisms".
A couple of hundred steps solve each problem. The key draws a member of the family.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tasks import Task, TaskSpec, dense, no_data

CURVATURES = 1e-3, 1.0  # smallest and largest eigenvalue of a Hessian


def deterministic(init: Callable, loss: Callable, loss_limit: float) -> Task:
    """init: key -> params. loss: params -> (), also the test loss. Batches are empty."""
    return Task(
        init=init,
        batch=lambda key, split: (),
        loss=lambda params, key, batch: loss(params),
        evaluate=lambda params: {"test_loss": loss(params)},
        loss_limit=loss_limit,
    )


def linear_regression(data, key: jax.Array) -> Task:
    """0.5 |A x - b|^2 in 5 dimensions. The key draws A and b, and x_0 ~ N(0, I).

    A = diag(sqrt(lambda)) Q. So the Hessian A'A has eigenvalues lambda, log-uniform in
    CURVATURES: condition numbers are from 1 to 1000, median 110. Q is a random reflection,
    and b ~ N(0, I). The paper says only that A and b are random.
    """
    x, u, b = jax.random.normal(key, (3, 5))  # in one call, since every step draws anew
    low, high = np.log(CURVATURES)
    values = jnp.exp(low + (high - low) * jax.scipy.stats.norm.cdf(x))
    q = jnp.eye(5) - 2 / (u @ u) * jnp.outer(u, u)
    a = jnp.sqrt(values)[:, None] * q
    return deterministic(
        init=lambda key: jax.random.normal(jax.random.fold_in(key, 1), (5,)),
        loss=lambda x: 0.5 * ((a @ x - b) ** 2).sum(),
        loss_limit=1e3,
    )


def rosenbrock(data, key: jax.Array) -> Task:
    """(1 - x)^2 + 100 (y - x^2)^2, 0 at (1, 1), from x_0 ~ U(-2, 2), y_0 ~ U(-1, 3)."""

    def init(key):
        return np.float32([-2, -1]) + 4 * jax.random.uniform(key, (2,))

    def loss(params):
        x, y = params
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    return deterministic(init, loss, loss_limit=1e4)


def moons(points: int, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Two half circles that interlock: (points, 2) float32 and labels (points,) of +-1."""
    rng = np.random.RandomState(0)
    side = np.where(np.arange(points) % 2, 1.0, -1.0)
    angle = rng.uniform(0, np.pi, points)
    xy = np.stack([np.cos(angle) - side / 2, side * (0.25 - np.sin(angle))], 1)
    xy += noise * rng.normal(size=xy.shape)
    return np.float32(xy), np.float32(side)


def two_moons(data, key: jax.Array, width: int = 64) -> Task:
    """A network on two moons: three hidden layers of tanh, logistic loss, full batch.

    The 64 points are the same for all. init draws the weights, normal over sqrt(fan in) and
    truncated at 2 deviations. Biases are 0. The paper leaves points and noise (0.1) open.
    """
    xy, side = moons(64)
    sizes = (2, width, width, width, 1)
    weights = jax.nn.initializers.lecun_normal()

    def init(key):
        layers = zip(jax.random.split(key, 4), sizes[:-1], sizes[1:], strict=True)
        return [{"w": weights(k, (n, m)), "b": jnp.zeros(m)} for k, n, m in layers]

    def loss(params):
        x = xy
        for layer in params[:-1]:
            x = jnp.tanh(dense(layer, x))
        return jax.nn.softplus(-side * dense(params[-1], x)[:, 0]).mean()

    return deterministic(init, loss, loss_limit=10 * float(np.log(2)))


TASKS = {
    "linear_regression": TaskSpec(no_data, linear_regression),
    "rosenbrock": TaskSpec(no_data, rosenbrock),
    "two_moons": TaskSpec(no_data, two_moons),
    "two_moons_small": TaskSpec(no_data, partial(two_moons, width=16)),
}
