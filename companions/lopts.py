"""Other learned optimizers, as the same three functions as STAR: init_theta, init, update.

`mlp` is the optimizer of Metz et al. 2019 (appendix D.1), a network on every parameter by
itself. `gru` is that of Maheswaranathan et al. 2020, a recurrent one likewise.
`hand_designed` makes one of any optax optimizer. Its hyperparameters are theta. So the same
code meta-trains a learning rate and momentum.

The file stands alone: copy it. It needs jax, numpy and optax. In shape comments S is the
shape of one parameter tensor, F features, M momentum timescales, W hidden units.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import optax


class LearnedOptimizer(NamedTuple):
    init_theta: Callable  # key -> theta
    init: Callable  # params -> state
    update: Callable  # (theta, grads, state, params) -> (updates to add, state)


def in_float32(optimizer: LearnedOptimizer) -> LearnedOptimizer:
    """Its state and numbers at least float32, its updates of each parameter's dtype."""

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, "f4")), tree)

    def update(theta, grads, state, params):
        updates, state = optimizer.update(theta, wide(grads), state, wide(params))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optimizer._replace(init=lambda p: optimizer.init(wide(p)), update=update)


def truncated_normal(key: jax.Array, shape: tuple, fan_in: int) -> jax.Array:
    """Weights of deviation 1 / sqrt(fan in), cut off at two deviations."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / math.sqrt(fan_in)


# --- Metz et al. 2019, appendix D.1

HIDDEN = 32
STEP_SCALE = MAGNITUDE_SCALE = 1e-3
NORMALIZER_EPS = 1e-5


class MLPState(NamedTuple):
    momenta: Any  # like params, leaves (M, *S): running means of the gradient
    step: jax.Array  # () int32, updates done


def mlp(momentum: bool = True, time: bool = True) -> LearnedOptimizer:
    """Metz et al. 2019, D.1: 16 features, 32 ReLU units, 610 meta-parameters.

        update = -1e-3 o_2 exp(1e-3 o_1),  (o_1, o_2) = network(features)
    The features are the gradient, the parameter and 5 momenta of the gradient, each divided
    by its root mean square over the tensor. Every parameter sees tanh(t / tau - 1), 9 tau.
    momentum, time: False leaves these features out (the ablations of figure 8).

    Deviation: the paper says "about 1k parameters", and its features as listed make 610.
    The timescales are log-spaced from 3 to 300,000, as the text says. The authors' public
    code has 3, 10, 30, ... and leaves two out.
    """
    decays = np.float32([0.5, 0.9, 0.99, 0.999, 0.9999] if momentum else [])
    timescales = np.float32(np.geomspace(3, 300_000, 9) if time else [])  # inner steps
    plain = 2 + len(decays)

    def init_theta(key):
        key0, key1 = jax.random.split(key)
        features = plain + len(timescales)
        return {
            "w0": truncated_normal(key0, (features, HIDDEN), features),
            "b0": jnp.zeros(HIDDEN),
            "w1": truncated_normal(key1, (HIDDEN, 2), HIDDEN),
            "b1": jnp.zeros(2),
        }

    def init(params):
        momenta = jax.tree.map(lambda p: jnp.zeros((len(decays), *p.shape)), params)
        return MLPState(momenta, step=jnp.zeros((), jnp.int32))

    def update(theta, grads, state, params):
        time_features = jnp.tanh(state.step / timescales - 1)
        # The same for every parameter, so they are a bias, the weight of a feature of ones.
        bias = theta["b0"] + time_features @ theta["w0"][plain:]
        w0 = jnp.concatenate([theta["w0"][:plain], bias[None]])  # (F + 1, W)

        def accumulate(g, m):
            decay = decays.reshape(-1, *[1] * g.ndim)
            return decay * m + jnp.tensordot(1 - decays, g, 0)

        def one(g, m, p):
            x = jnp.concatenate([g[None], p[None], m]).reshape(plain, -1)  # (F, size)
            x = x * jax.lax.rsqrt(NORMALIZER_EPS + (x * x).mean(1, keepdims=True))
            x = jnp.concatenate([x, jnp.ones((1, x.shape[1]), x.dtype)])
            magnitude, direction = _layers(w0, theta["w1"], x) + theta["b1"][:, None]
            step = STEP_SCALE * direction * jnp.exp(MAGNITUDE_SCALE * magnitude)
            return -step.reshape(p.shape)

        momenta = jax.tree.map(accumulate, grads, state.momenta)
        updates = jax.tree.map(one, grads, momenta, params)
        return updates, MLPState(momenta=momenta, step=state.step + 1)

    return in_float32(LearnedOptimizer(init_theta, init, update))


@partial(jax.checkpoint, prevent_cse=False)
def _layers(w0: jax.Array, w1: jax.Array, x: jax.Array) -> jax.Array:
    """w1' relu(w0' x), (2, size). Backpropagation keeps x and computes the hidden units, of
    five times its size, again. It is fast if all sums over the parameters are products."""
    return w1.T @ jax.nn.relu(w0.T @ x)


# --- Maheswaranathan et al. 2020, appendix B


def gru(hidden: int = 16, scale: float = 1.0) -> LearnedOptimizer:
    """A gated recurrent unit on every parameter by itself, read out linearly.

        h' = GRU(h, g),  x' = x + scale w'h'        (equations 1 and 2)
    with the GRU of Cho et al. 2014:
        z = logistic(g w_z + U_z h + b_z),  r = logistic(g w_r + U_r h + b_r),
        n = tanh(g w_n + r U_n h + b_n),  h' = z h + (1 - z) n
    theta: g (3W,), h (W, 3W), b (3W,), the blocks in the order z, r, n, and readout (W,).
    The state is a tree like the parameters, leaves (W, *S), zeros at first. The gradient
    enters as it is. scale: of the readout, for problems whose steps are small.

    The paper leaves sizes and start open. Here weights are truncated normals of deviation
    1 / sqrt(fan in), biases and the readout 0. Deviation from Cho et al.: r multiplies
    U_n h, not h, so that one product serves all three (as in cuDNN).
    """

    def init_theta(key):
        g_key, h_key = jax.random.split(key)
        return {
            "g": truncated_normal(g_key, (3 * hidden,), 1),
            "h": truncated_normal(h_key, (hidden, 3 * hidden), hidden),
            "b": jnp.zeros(3 * hidden),
            "readout": jnp.zeros(hidden),
        }

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros((hidden, *p.shape), p.dtype), params)

    def update(theta, grads, state, params):
        def one(g, h):
            h = h.reshape(hidden, -1)  # (W, size)
            from_g = theta["g"][:, None] * g.reshape(1, -1) + theta["b"][:, None]
            gz, gr, gn = jnp.split(from_g, 3)
            hz, hr, hn = jnp.split(theta["h"].T @ h, 3)
            z, r = jax.nn.sigmoid(gz + hz), jax.nn.sigmoid(gr + hr)
            h = z * h + (1 - z) * jnp.tanh(gn + r * hn)
            step = scale * (theta["readout"] @ h)
            return step.reshape(g.shape), h.reshape(hidden, *g.shape)

        both = jax.tree.map(one, grads, state)
        return jax.tree.transpose(jax.tree.structure(grads), None, both)

    return in_float32(LearnedOptimizer(init_theta, init, update))


# --- hand-designed optimizers with learned hyperparameters

DECAYS = ("momentum", "b1", "b2", "decay")  # in (0, 1). All others are above 0


def encode(hyperparameters: dict) -> dict:
    """Values -> theta: the logit of a decay, the log of any other, each () float32."""
    return {
        name: jnp.float32(math.log(x / (1 - x) if name in DECAYS else x))
        for name, x in hyperparameters.items()
    }


def decode(theta: dict) -> dict:
    """theta -> values: the inverse of `encode`."""
    return {
        k: jax.nn.sigmoid(x) if k in DECAYS else jnp.exp(x) for k, x in theta.items()
    }


def hand_designed(make: Callable, **start: float) -> LearnedOptimizer:
    """make(**hyperparameters) of optax. theta is their logs and logits, so any is valid.

    hand_designed(optax.adam, learning_rate=1e-3, b1=0.9) learns these two.
    """

    def update(theta, grads, state, params):
        return make(**decode(theta)).update(grads, state, params)

    init = make(**start).init
    return in_float32(LearnedOptimizer(lambda key: encode(start), init, update))


def adam8(
    learning_rate, exponential_decay=0.0, linear_decay=0.0, l1=0.0, l2=0.0, **adam
) -> optax.GradientTransformation:
    """Adam with the eight hyperparameters of Metz et al. 2019, section 4.4.

        lr_s = lr exp(-exponential_decay s) max(1 - linear_decay s, 0),  s = 0, 1, ...
        of the loss + l1 |p|_1 + l2 |p|_2^2 / 2
    adam: b1, b2, eps. The paper names the eight. The formulas are ours.
    """

    def regularize(grads, params):
        return jax.tree.map(lambda g, p: g + l1 * jnp.sign(p) + l2 * p, grads, params)

    def rate(step):
        linear = jnp.maximum(1 - linear_decay * step, 0.0)
        return learning_rate * jnp.exp(-exponential_decay * step) * linear

    return optax.chain(
        optax.stateless(regularize),
        optax.scale_by_adam(**adam),
        optax.scale_by_learning_rate(rate),
    )


ADAM8 = dict(learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8)
ADAM8 |= dict(exponential_decay=1e-4, linear_decay=1e-4, l1=1e-6, l2=1e-6)
LEARNED = {
    "mlp": mlp(),
    "mlp_no_momentum": mlp(momentum=False),
    "mlp_no_time": mlp(time=False),
    "gru": gru(),
    "gru_small": gru(hidden=8, scale=0.01),
    "sgd": hand_designed(optax.sgd, learning_rate=0.1),
    "momentum": hand_designed(optax.sgd, learning_rate=0.03, momentum=0.9),
    # A gradient of exactly 0 (a dark pixel's) has no derivative under a root without eps.
    "adam": hand_designed(
        partial(optax.adam, eps_root=1e-8), learning_rate=1e-3, b1=0.9, b2=0.999
    ),
    "adam8": hand_designed(partial(adam8, eps_root=1e-8), **ADAM8),
}


def load_theta(path: Any) -> tuple[dict, LearnedOptimizer]:
    """(theta, optimizer) from a `.npz` whose "card" (JSON) has an "optimizer" of LEARNED.

    Arrays with a "/" in their name are skipped. Raises OSError where the file cannot be
    read, and ValueError, in one line, where it is no theta.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            optimizer = LEARNED[json.loads(str(file["card"]))["optimizer"]]
            names = [name for name in file.files if name != "card" and "/" not in name]
            theta = {name: np.asarray(file[name], np.float32) for name in names}
    except (ValueError, TypeError, LookupError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no theta of lopts.py: {error!r}") from error
    like = jax.eval_shape(optimizer.init_theta, jax.random.key(0))
    expected = {name: x.shape for name, x in like.items()}
    finite = all(np.isfinite(x).all() for x in theta.values())
    if {name: x.shape for name, x in theta.items()} != expected or not finite:
        raise ValueError(f"{path} is no theta of lopts.py: not finite of {expected}")
    return jax.tree.map(jnp.asarray, theta), optimizer
