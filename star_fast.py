"""STAR's update in another order: the same numbers as `star.py`, sooner.

`star.py` divides every feature by its root mean square and multiplies it with its row of
w0. This file never builds a feature. Four changes make it quick on a CPU:

- The normalizer divides the feature's row of w0 instead of the feature.
- Features with a common factor (the gradient, a momentum) are summed before it is applied.
- Row and column features keep their own small shape until the sum.
- Mean squares are products of matrices and vectors. XLA's own sums take several times as
  long. Adafactor's features, g * row factor * col factor, need no array of g's size.

Only the network differs, and a test shows that both give the same numbers. Parameters
sharded over an explicit mesh need `star.py`. g is the gradient. In shape comments S is the
shape of the tensor, and W = 4 hidden units.
"""

import string

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import rsqrt

import star
from star import Constants, LearnedOptimizer, TensorState


def network(theta, c: Constants, count, g, p, s: TensorState) -> list:
    """As `star.network`."""
    h = [relu(x) for x in first_layer(theta, c, count, g, p, s)]
    h = [relu(x) for x in layer(theta["w1"], theta["b1"], h)]
    return layer(theta["w2"], theta["b2"], h)


def first_layer(theta, c, count, g, p, s) -> list:
    """w0' features + b0 without building the features: W arrays that broadcast to (*S)."""
    w0 = theta["w0"]

    def weights(first, mean_squares):  # rows of w0 over root mean squares: (rows, W)
        scale = rsqrt(1e-5 + jnp.stack(mean_squares))
        return scale[:, None] * w0[first : first + len(mean_squares)]

    m2 = [square(x) for x in s.m]
    inverse_v2 = 1 / (s.v2 + c.rms_eps)
    inverse_v = rsqrt(s.v2 + c.rms_eps)
    g_factors, m_factors, g_squares, m_squares = adafactor(g, m2, s)
    w_g, w_p = weights(0, [mean(square(g)), mean_square(p)])
    w_m = weights(2, [mean(x) for x in m2])
    (w_v2,) = weights(5, [mean_square(s.v2)])
    w_m_over_v = weights(6, [mean(x * inverse_v2) for x in m2])
    (w_inverse_v,) = weights(9, [mean(inverse_v2)])
    w_g_factored, w_m_factored = weights(10, g_squares), weights(25, m_squares)

    small = star.time_features(count) @ w0[28:] + theta["b0"]  # (W,)
    rows = side(w0[13:16], w0[19:22], s.row)  # W arrays of a row's shape
    cols = side(w0[16:19], w0[22:25], s.col)
    hidden = []
    for j in range(w0.shape[1]):
        h = small[j] + rows[j] + cols[j]
        h = h + w_p[j] * p + w_v2[j] * s.v2 + w_inverse_v[j] * inverse_v
        h += g * dot(w_g[j], w_g_factored[:, j], g_factors)
        for k in range(3):
            over_v = w_m_over_v[k, j] * inverse_v
            h += s.m[k] * (w_m[k, j] + over_v + w_m_factored[k, j] * m_factors[k])
        hidden.append(h)
    return hidden


def adafactor(g: jax.Array, m2: list, s: TensorState) -> tuple[list, ...]:
    """Adafactor's factors of g and of the momenta, and the mean squares of both features.
    The sum over r and c of x2[r, c] row[r]^2 col[c]^2 is a product of matrices."""
    g2 = square(g)
    if g.ndim < 2:
        g_factors, m_factors = star.adafactor_factors(s)
        g_squares = [mean(g2 * f**2) for f in g_factors]
        m_squares = [mean(x * f**2) for x, f in zip(m2, m_factors, strict=True)]
        return g_factors, m_factors, g_squares, m_squares
    second, largest = np.argsort(g.shape, kind="stable")[-2:].tolist()
    # Without the axis of length 1: a loop over that axis would not be vectorized.
    row = jnp.squeeze(s.row, 1 + largest)  # (3, *S less largest)
    col = jnp.squeeze(s.col, 1 + second)
    mean_axis = 1 + second - int(largest < second)  # in `row`, `largest` is gone
    row = row / (jnp.mean(row, mean_axis, keepdims=True) + 1e-9)
    row, col = (rsqrt(jnp.maximum(x, 1e-9)) for x in (row, col))
    both = zip(row, col, strict=True)
    factors = [
        jnp.expand_dims(r, largest) * jnp.expand_dims(x, second) for r, x in both
    ]
    row2, col2 = row * row, col * col
    axes = string.ascii_letters[: g.ndim]
    row_axes, col_axes = axes.replace(axes[largest], ""), axes.replace(axes[second], "")

    def mean_squares(subscripts, *arrays):
        return jnp.einsum(subscripts, *arrays, precision="highest") / float(g.size)

    of_g = f"{axes},Z{row_axes},Z{col_axes}->Z"  # all three timescales in one product
    of_m = f"{axes},{row_axes},{col_axes}->"
    g_squares = list(mean_squares(of_g, g2, row2, col2))
    m_squares = [mean_squares(of_m, *x) for x in zip(m2, row2, col2, strict=True)]
    return factors, factors, g_squares, m_squares


def side(w_value: jax.Array, w_inverse: jax.Array, means: jax.Array) -> list:
    """Row or column features in the first layer: W arrays of the means' own shape."""
    x = means.reshape(3, -1)
    x = jnp.concatenate([x, rsqrt(x + 1e-8)])  # (6, size)
    scale = rsqrt(1e-5 + jnp.mean(x * x, 1))
    w = scale[:, None] * jnp.concatenate([w_value, w_inverse])  # (6, W)
    hidden = jnp.stack([dot(0.0, w[:, j], x) for j in range(w.shape[1])])
    return hidden.reshape(-1, *means.shape[1:])


def layer(w: jax.Array, b: jax.Array, xs: list) -> list:
    return [dot(b[j], w[:, j], xs) for j in range(len(b))]


def dot(start, weights, arrays) -> jax.Array:
    """start + weights[0] * arrays[0] + ... From `start` on, all are multiply-adds."""
    return sum((w * x for w, x in zip(weights, arrays, strict=True)), start=start)


def square(x: jax.Array) -> jax.Array:
    """x^2 + 1e-30. XLA vectorizes this loop on a CPU, and not that of x^2 alone."""
    return x * x + 1e-30


def mean(x: jax.Array) -> jax.Array:
    if not x.ndim:
        return x
    sums = jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision="highest")
    return jnp.sum(sums) / float(x.size)


def mean_square(x: jax.Array) -> jax.Array:
    return jnp.vdot(x, x, precision="highest") / float(x.size)


def relu(x: jax.Array) -> jax.Array:
    """`jax.nn.relu`, nan included. It takes two instructions on a CPU, a maximum four."""
    return jnp.where(x <= 0, 0.0, x)


def learned_optimizer(c: Constants = star.PAPER) -> LearnedOptimizer:
    """As `star.learned_optimizer`."""
    return star.learned_optimizer(c, network)


PRESETS = {name: learned_optimizer(c) for name, c in star.CONSTANTS.items()}
