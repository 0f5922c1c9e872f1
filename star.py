"""STAR, the stabilized learned optimizer, as the paper writes it.

Harrison, Metz & Sohl-Dickstein 2022, "A closer look at learned optimization", section 5.
One tiny network, the same for every parameter, looks at 39 features of that parameter. It
answers three numbers: a direction d and two log magnitudes m_b and m_g. The step is

    f_b  = beta3 * d / v * exp(beta4 * m_b)    blackbox term, equations 20 and 22
    f_g  = beta1 * exp(beta2 * m_g) * g        nominal term, equation 21
    phi' = phi - (f_b + f_g)                   equation 2

phi is the parameter, v the running root mean square of its gradient, and g a hand-designed
step, Adam and AggMo in one.

The file stands alone: copy it. It needs jax and numpy, and `star` needs optax. P is the
shape of one parameter tensor. `star_fast.py` computes the same numbers sooner.
"""

import json
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import rsqrt

DECAYS = (0.9, 0.99, 0.999)  # of the three momenta and of adafactor's three means
RMS_DECAY = (0.999,)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # steps


class Constants(NamedTuple):
    """What is chosen by hand. The defaults are the paper's (appendix B.2).

    With beta3 = 1e-3 an untrained network diverges on the paper's own task; see the preset
    `star_small_beta3`. beta2 = 1e-3 takes an m_g of -693 to halve the nominal step.
    """

    beta1: Any = 1e-3  # size of the nominal step
    beta2: Any = 1e-3  # how strongly m_g scales it
    beta3: Any = 1e-3  # size of the blackbox step
    beta4: Any = 1e-3  # how strongly m_b scales it
    nominal: str = "adam_aggmo"  # a name in NOMINAL; "none" drops the third head too
    preconditioner: bool = True  # False: the blackbox step is not divided by v
    rms_eps: float = 1e-6  # v = sqrt(mean squared gradient + rms_eps)


PAPER = Constants()

# The nominal step g from the gradient, its three momenta m and v, each (*P). The paper says
# "a combined AggMo and Adam" without a formula. The authors' code computes adam_aggmo.
NOMINAL: dict[str, Callable] = {
    "sgd": lambda grad, m, v: grad,
    "sgdm": lambda grad, m, v: m[-1],
    "aggmo": lambda grad, m, v: sum(m) / 3,
    "adam": lambda grad, m, v: m[-1] / v,
    "adam_aggmo": lambda grad, m, v: sum(m) / 3 / v,
}


class LearnedOptimizer(NamedTuple):
    init_theta: Callable  # key -> theta
    init: Callable  # params -> state
    update: Callable  # (theta, grads, state, params) -> (updates, state); updates add


def theta_shapes(c: Constants) -> dict[str, tuple[int, ...]]:
    """Name -> shape: a network of 195 weights and the offsets of 7 decays, 202 in all.

    Section 5.2 counts one more, "for beta1", which it also calls a constant.
    """
    heads = 2 if c.nominal == "none" else 3  # direction, magnitude, nominal magnitude
    network = dict(w0=(39, 4), b0=(4,), w1=(4, 4), b1=(4,), w2=(4, heads), b2=(heads,))
    return network | dict(momentum_decays=(3,), rms_decays=(1,), adafactor_decays=(3,))


def init_theta(key: jax.Array, c: Constants) -> dict[str, jax.Array]:
    """Weights truncated normal over sqrt(fan in); biases and decay offsets zero."""
    theta = {name: jnp.zeros(s, jnp.float32) for name, s in theta_shapes(c).items()}
    for name, k in zip(("w0", "w1", "w2"), jax.random.split(key, 3), strict=True):
        n, m = theta[name].shape
        normal = jax.random.truncated_normal(k, -2, 2, (n, m), jnp.float32)
        theta[name] = normal / n**0.5
    return theta


def learned_decay(initial: tuple, offset: jax.Array) -> jax.Array:
    """Decays that theta shifts on a log scale: 1 - d = (1 - initial) exp(10 offset)."""
    return 1 - (1 - np.array(initial, np.float32)) * jnp.exp(10 * offset)


class TensorState(NamedTuple):
    """Means from zero without bias correction, float32 whatever the parameter's dtype."""

    m: tuple  # three means of the gradient, each (*P)
    v2: jax.Array  # mean of the squared gradient, (*P)
    row: tuple  # three means of it over the largest axis, which is kept with length 1
    col: tuple  # three means over the second largest axis, likewise


def rows_and_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over the largest and the second largest axis. A vector is both of its own."""
    if x.ndim < 2:
        return x, x
    second, largest = np.argsort(x.shape, kind="stable")[-2:].tolist()
    return jnp.mean(x, largest, keepdims=True), jnp.mean(x, second, keepdims=True)


def init_tensor(p: Any) -> TensorState:
    dtype = jnp.result_type(p)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"STAR updates real floating-point arrays, not {dtype}")
    zero = jnp.zeros(jnp.shape(p), jnp.float32)
    row, col = rows_and_columns(zero)
    state = TensorState(m=(zero,) * 3, v2=zero, row=(row,) * 3, col=(col,) * 3)
    return jax.tree.map(jnp.copy, state)  # one buffer each, so that it can be donated


def accumulate(theta: dict, s: TensorState, grad: jax.Array) -> TensorState:
    """Every running mean one step on: mean <- d mean + (1 - d) new.

    Decays of squares are clipped to [0, 1], as in the authors' code. Those of momentum are
    not, so a large offset makes them unstable. Weight decay keeps the offsets small.
    """

    def ema(decays, means, new):
        return tuple(d * x + (1 - d) * new for d, x in zip(decays, means, strict=True))

    square = grad * grad + 1e-30
    row, col = rows_and_columns(square)
    momentum_decays = learned_decay(DECAYS, theta["momentum_decays"])
    rms_decays = jnp.clip(learned_decay(RMS_DECAY, theta["rms_decays"]), 0, 1)
    adafactor_decays = jnp.clip(learned_decay(DECAYS, theta["adafactor_decays"]), 0, 1)
    return TensorState(
        m=ema(momentum_decays, s.m, grad),
        v2=ema(rms_decays, (s.v2,), square)[0],
        row=ema(adafactor_decays, s.row, row),
        col=ema(adafactor_decays, s.col, col),
    )


def tensor_features(grad, p: jax.Array, s: TensorState, c: Constants) -> list:
    """28 arrays that broadcast to (*P), in the order of the rows of w0.

    Each feature is divided by its root mean square over the tensor (section 5.1).
    """
    inverse_v = rsqrt(s.v2 + c.rms_eps)
    grad_factors, m_factors = adafactor_factors(s)
    features = [
        grad,                                                   #  0     gradient
        p,                                                      #  1     parameter
        *s.m,                                                   #  2- 4  momenta
        s.v2,                                                   #  5     mean square
        *(m * inverse_v for m in s.m),                          #  6- 8  Adam's step
        inverse_v,                                              #  9     1 / v
        *(grad * f for f in grad_factors),                      # 10-12  adafactor's step
        *s.row,                                                 # 13-15  squares of rows
        *s.col,                                                 # 16-18  and of columns
        *(rsqrt(x + 1e-8) for x in s.row),                      # 19-21  inverse roots
        *(rsqrt(x + 1e-8) for x in s.col),                      # 22-24  of both
        *(m * f for m, f in zip(s.m, m_factors, strict=True)),  # 25-27  adafactor, momenta
    ]  # fmt: skip
    return [x * rsqrt(jnp.mean(x * x) + 1e-5) for x in features]


def adafactor_factors(s: TensorState) -> tuple[list, list]:
    """1/v from one number per row and one per column (Shazeer & Stern 2018, alg. 4).

    Three factors for the gradient and three for the momenta. They differ for vectors and
    scalars alone, where the authors' code has two epsilons.
    """
    if s.v2.ndim < 2:
        return [rsqrt(x + 1e-9) for x in s.row], [rsqrt(x + 1e-6) for x in s.row]
    second, _ = np.argsort(s.v2.shape, kind="stable")[-2:].tolist()
    factors = []
    for row, col in zip(s.row, s.col, strict=True):
        row = row / (jnp.mean(row, second, keepdims=True) + 1e-9)
        factors.append(rsqrt(jnp.maximum(row, 1e-9)) * rsqrt(jnp.maximum(col, 1e-9)))
    return factors, factors


def time_features(count: jax.Array) -> list:
    """11 scalars, rows 28-38 of w0: tanh(t / tau - 1), t the updates before this one."""
    t = jnp.asarray(count).astype(jnp.float32)
    return [jnp.tanh(t / tau - 1) for tau in TIMESCALES]


def dense(w: jax.Array, b: jax.Array, xs: list) -> list:
    """A layer unit by unit: arrays in, arrays out, which XLA computes in one loop."""
    return [sum((w[i, j] * x for i, x in enumerate(xs)), b[j]) for j in range(len(b))]


def network(theta: dict, features: list) -> list:
    """39 features -> 4 -> 4 -> direction d, log magnitudes m_b and m_g; each (*P)."""
    h = [jax.nn.relu(x) for x in dense(theta["w0"], theta["b0"], features)]
    h = [jax.nn.relu(x) for x in dense(theta["w1"], theta["b1"], h)]
    return dense(theta["w2"], theta["b2"], h)


def step(c: Constants, outputs: list, grad: jax.Array, s: TensorState) -> jax.Array:
    """-(f_b + f_g) from the network's outputs, equations 20 to 22; (*P)."""
    d, m_b, *m_g = outputs
    v = jnp.sqrt(s.v2 + c.rms_eps)
    f_b = c.beta3 * d / (v if c.preconditioner else 1) * jnp.exp(c.beta4 * m_b)
    if c.nominal == "none":
        return -f_b
    g = NOMINAL[c.nominal](grad, s.m, v)
    f_g = c.beta1 * jnp.exp(c.beta2 * m_g[0]) * g
    return -(f_b + f_g)


def update_tensor(theta, c, count, grad, p, s) -> tuple[jax.Array, TensorState]:
    """One tensor: (what to add to the parameter p, in its dtype; its next state)."""
    dtype = jnp.result_type(p)
    grad, p = (jnp.asarray(x).astype(jnp.float32) for x in (grad, p))
    s = accumulate(theta, s, grad)
    features = tensor_features(grad, p, s, c) + time_features(count)
    return step(c, network(theta, features), grad, s).astype(dtype), s


class State(NamedTuple):
    count: jax.Array  # () int32, updates done
    tensors: Any  # a tree like the parameters, a TensorState each


def init(params: Any) -> State:
    """All running means at zero. TypeError for parameters that are not of floats."""
    return State(jnp.zeros((), jnp.int32), jax.tree.map(init_tensor, params))


def learned_optimizer(c: Constants = PAPER, update_tensor=update_tensor):
    """STAR or an ablation. ValueError: an unknown nominal term, a theta of other shapes."""
    if c.nominal not in (*NOMINAL, "none"):
        raise ValueError(f"nominal {c.nominal!r} is none of {(*NOMINAL, 'none')}")

    def update(theta, grads, state, params):
        check_theta(theta, c)
        leaves, tree = jax.tree.flatten(grads)
        others = map(tree.flatten_up_to, (params, state.tensors))
        rows = zip(leaves, *others, strict=True)
        new = [update_tensor(theta, c, state.count, *row) for row in rows]
        updates, tensors = (tree.unflatten(x[i] for x in new) for i in range(2))
        return updates, State(count=state.count + 1, tensors=tensors)

    return LearnedOptimizer(lambda key: init_theta(key, c), init, update)


# The variants of section 5.3 and appendix C.2. The paper's blackbox optimizer has neither
# nominal term nor division by v; its "No Nom." keeps the division.
CONSTANTS: dict[str, Constants] = {
    "star": PAPER,
    "star_small_beta3": Constants(beta3=1e-6),
    "blackbox": Constants(nominal="none", preconditioner=False),
    "hyperparam": Constants(beta3=0.0),
    "no_preconditioner": Constants(preconditioner=False),
    "no_nominal": Constants(nominal="none"),
}
PRESETS = {name: learned_optimizer(c) for name, c in CONSTANTS.items()}


def star(theta, constants=PAPER, beta1=None, beta2=None, beta3=None, beta4=None):
    """A trained STAR as an `optax.GradientTransformationExtraArgs`.

    beta1 to beta4 replace those of `constants`; `optax.inject_hyperparams` may schedule
    them. The parameter is a feature: update raises ValueError without params.
    """
    import optax

    betas = dict(beta1=beta1, beta2=beta2, beta3=beta3, beta4=beta4)
    c = constants._replace(**{k: beta for k, beta in betas.items() if beta is not None})
    check_theta(theta, c)
    optimizer = learned_optimizer(c)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("STAR's update needs params: the parameter is a feature")
        return optimizer.update(theta, updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


FIXED = dict(
    momentum_decays=list(DECAYS), rms_decay=0.999, adafactor_decays=list(DECAYS)
)
FIXED |= dict(normalizer_eps=1e-5, statistic_eps=1e-8, factor_floor=1e-9)
FIXED |= dict(vector_eps=1e-6, square_floor=1e-30)


def check_theta(theta: dict, c: Constants) -> None:
    """ValueError, in one line, unless theta has the names and shapes that c asks for."""
    found = {name: jnp.shape(x) for name, x in theta.items()}
    if found != theta_shapes(c):
        raise ValueError(f"theta should have shapes {theta_shapes(c)}, not {found}")


def save_theta(file: Any, theta: dict, card: dict, **more: np.ndarray) -> None:
    """theta and a JSON-able card; `load_theta` skips arrays with a "/" in their name."""
    np.savez(file, card=np.array(json.dumps(card)), **theta, **more)


def load_theta(path: Any) -> tuple[dict, Constants]:
    """(theta, constants) from a file by `save_theta`; nothing is unpickled.

    OSError when the file cannot be read; ValueError, in one line, when it holds no theta
    of STAR. Constants that the card does not name are the paper's.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            theta = {name: file[name] for name in file.files if "/" not in name}
        saved = dict(json.loads(str(theta.pop("card", "{}"))).get("constants", {}))
        if any(saved.pop(name, value) != value for name, value in FIXED.items()):
            raise ValueError(f"it has other constants than {FIXED}")
        c = Constants(**saved)
        known = {True: True, False: False, "rms": True, "none": False}
        c = c._replace(preconditioner=known[c.preconditioner])
        c = c._replace(**{k: float(getattr(c, k)) for k in c._fields if "beta" in k})
        check_theta(theta, learned_optimizer(c) and c)
    except (ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds no theta of STAR: {reason}") from error
    return {name: jnp.asarray(x, jnp.float32) for name, x in theta.items()}, c
