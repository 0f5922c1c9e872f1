"""STAR, the stabilized learned optimizer, as the paper writes it.

Harrison, Metz & Sohl-Dickstein 2022, "A closer look at learned optimization", section 5.
One tiny network, the same for every parameter, sees 39 features of that parameter. It
answers with a direction d and two log magnitudes, m_b and m_g:

    f_b  = beta3 * d / v * exp(beta4 * m_b)    blackbox term, equations 20 and 22
    f_g  = beta1 * exp(beta2 * m_g) * g        nominal term, equation 21
    phi' = phi - (f_b + f_g)                   equation 2

phi is the parameter and v the running root mean square of its gradient. g is a
hand-designed step, Adam and AggMo in one. Even a gradient of zero moves phi: freeze what
should stay with `optax.partition`. S is the shape of one parameter tensor.

The file stands alone: copy it. It needs jax and numpy, and `star` needs optax.
"""

import json
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
    """What is chosen by hand. The defaults are the paper's (appendix B.2)."""

    beta1: Any = 1e-3  # size of the nominal step
    beta2: Any = 1e-3  # how strongly m_g scales it
    beta3: Any = 1e-3  # size of the blackbox step
    beta4: Any = 1e-3  # how strongly m_b scales it
    nominal: str = "adam_aggmo"  # a name in NOMINAL, or "none", without the third head
    preconditioner: bool = True  # False: the blackbox step is not divided by v
    # v = sqrt(mean squared gradient + floor). Each term has a floor of its own. The paper
    # and the authors' code have one for both.
    rms_eps: float = 1e-6  # the floor of the blackbox term and of the features
    nominal_eps: Any = 1e-6  # the floor of the nominal step


PAPER = Constants()

# The nominal step g from the gradient, its three momenta m and v, each (*S). The paper says
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
    """A network of 195 weights and the offsets of 7 decays. Section 5.2 counts one more."""
    heads = 2 if c.nominal == "none" else 3  # direction, magnitude, nominal magnitude
    network = dict(w0=(39, 4), b0=(4,), w1=(4, 4), b1=(4,), w2=(4, heads), b2=(heads,))
    return network | dict(momentum_decays=(3,), rms_decays=(1,), adafactor_decays=(3,))


def init_theta(key: jax.Array, c: Constants) -> dict[str, jax.Array]:
    """Weights are truncated normals over sqrt(fan in). Biases and decay offsets are 0."""
    theta = {name: jnp.zeros(s, jnp.float32) for name, s in theta_shapes(c).items()}
    for name, k in zip(("w0", "w1", "w2"), jax.random.split(key, 3), strict=True):
        shape = theta[name].shape
        normal = jax.random.truncated_normal(k, -2, 2, shape, jnp.float32)
        theta[name] = normal / shape[0] ** 0.5
    return theta


def learned_decay(initial: tuple, offset: jax.Array) -> jax.Array:
    """Decays that theta shifts on a log scale: 1 - decay = (1 - initial) exp(10 offset)."""
    return 1 - (1 - np.array(initial, np.float32)) * jnp.exp(10 * offset)


class TensorState(NamedTuple):
    """Running means, float32 for any dtype. They start at 0, without bias correction."""

    m: tuple  # three means of the gradient, each (*S)
    v2: jax.Array  # mean of the squared gradient, (*S)
    row: jax.Array  # three such means over the largest axis, (3, *S), 1 long there
    col: jax.Array  # the same over the second largest axis


class State(NamedTuple):
    count: jax.Array  # () int32, updates done
    tensors: Any  # a tree like the parameters, a TensorState each


def init(params: Any) -> State:
    """All running means at 0, sharded like params. TypeError unless all are floats."""
    return State(jnp.zeros((), jnp.int32), jax.tree.map(init_tensor, params))


def init_tensor(p: Any) -> TensorState:
    dtype = getattr(p, "dtype", type(p))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"STAR updates real floating-point arrays, not {dtype}")
    # One buffer each, so that the state can be donated.
    *m, v2 = (jnp.zeros_like(p, jnp.float32) for _ in range(4))
    row, col = (jnp.zeros_like(jnp.stack([x] * 3)) for x in rows_and_columns(v2))
    return TensorState(tuple(m), v2, row, col)


def rows_and_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over the largest and the second largest axis. A vector stands for both."""
    if x.ndim < 2:
        return x, x
    second, largest = np.argsort(x.shape, kind="stable")[-2:].tolist()
    return jnp.mean(x, largest, keepdims=True), jnp.mean(x, second, keepdims=True)


def accumulate(theta: dict, s: TensorState, grad: jax.Array) -> TensorState:
    """All running means one step on."""

    def ema(decay, mean, new):
        return decay * mean + (1 - decay) * new

    square = grad * grad + 1e-30
    row, col = rows_and_columns(square)
    momentum = learned_decay(DECAYS, theta["momentum_decays"])
    # The authors' code clips the decays of squares, and not those of momentum.
    (rms,) = jnp.clip(learned_decay(RMS_DECAY, theta["rms_decays"]), 0, 1)
    adafactor = jnp.clip(learned_decay(DECAYS, theta["adafactor_decays"]), 0, 1)
    adafactor = adafactor.reshape(3, *(1,) * grad.ndim)
    return TensorState(
        m=tuple(ema(decay, m, grad) for decay, m in zip(momentum, s.m, strict=True)),
        v2=ema(rms, s.v2, square),
        row=ema(adafactor, s.row, row[None]),
        col=ema(adafactor, s.col, col[None]),
    )


def tensor_features(grad, p: jax.Array, s: TensorState, c: Constants) -> list:
    """28 arrays that broadcast to (*S), in the order of the rows of w0.

    Each feature is divided by its root mean square over the tensor (section 5.1). Triples
    have one feature for each of DECAYS: 13 is the mean square over the largest axis at 0.9.
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
        *rsqrt(s.row + 1e-8),                                   # 19-21  inverse roots
        *rsqrt(s.col + 1e-8),                                   # 22-24  of both
        *(m * f for m, f in zip(s.m, m_factors, strict=True)),  # 25-27  adafactor, momenta
    ]  # fmt: skip
    return [x * rsqrt(jnp.mean(x * x) + 1e-5) for x in features]


def adafactor_factors(s: TensorState) -> tuple[jax.Array, jax.Array]:
    """1/v from one number per row and one per column (Shazeer & Stern 2018, alg. 4).

    (factors of the gradient, factors of the momenta), each (3, *S). The two differ only for
    vectors and scalars, where the authors' code has two epsilons.
    """
    if s.v2.ndim < 2:
        return rsqrt(s.row + 1e-9), rsqrt(s.row + 1e-6)
    second, _ = np.argsort(s.v2.shape, kind="stable")[-2:].tolist()
    row = s.row / (jnp.mean(s.row, 1 + second, keepdims=True) + 1e-9)
    factors = rsqrt(jnp.maximum(row, 1e-9)) * rsqrt(jnp.maximum(s.col, 1e-9))
    return factors, factors


def time_features(count: jax.Array) -> jax.Array:
    """tanh(t / tau - 1), (11,), for rows 28-38 of w0. t updates came before this one."""
    t = jnp.asarray(count).astype(jnp.float32)
    return jnp.tanh(t / np.array(TIMESCALES, np.float32) - 1)


def dense(w: jax.Array, b: jax.Array, xs: list) -> list:
    """A layer, unit by unit, from a list of arrays to another. XLA makes it one loop."""
    return [sum((w[i, j] * x for i, x in enumerate(xs)), b[j]) for j in range(len(b))]


def network(theta, c: Constants, count, grad, p, s: TensorState) -> list:
    """39 features -> 4 -> 4 -> [direction d, log magnitudes m_b and m_g], each (*S)."""
    features = [*tensor_features(grad, p, s, c), *time_features(count)]
    h = [jax.nn.relu(x) for x in dense(theta["w0"], theta["b0"], features)]
    h = [jax.nn.relu(x) for x in dense(theta["w1"], theta["b1"], h)]
    return dense(theta["w2"], theta["b2"], h)


def step(c: Constants, outputs: list, grad: jax.Array, s: TensorState) -> jax.Array:
    """-(f_b + f_g), (*S), from the network's outputs: equations 20 to 22.

    Only f_b is divided by v here, since the g of `adam_aggmo` has its own division.
    """
    d, m_b, *m_g = outputs
    v = jnp.sqrt(s.v2 + c.rms_eps)
    f_b = c.beta3 * d / (v if c.preconditioner else 1) * jnp.exp(c.beta4 * m_b)
    if c.nominal == "none":
        return -f_b
    g = NOMINAL[c.nominal](grad, s.m, jnp.sqrt(s.v2 + c.nominal_eps))
    f_g = c.beta1 * jnp.exp(c.beta2 * m_g[0]) * g
    return -(f_b + f_g)


def learned_optimizer(c: Constants = PAPER, network=network) -> LearnedOptimizer:
    """STAR or an ablation. ValueError for an unknown nominal term or a wrong theta."""
    if c.nominal not in (*NOMINAL, "none"):
        raise ValueError(f"nominal {c.nominal!r} is none of {(*NOMINAL, 'none')}")

    def update(theta, grads, state, params):
        theta = check_theta(theta, c)

        def update_tensor(grad, p, s):
            if not jnp.size(p):
                return p, s
            grad, phi = (jnp.asarray(x).astype(jnp.float32) for x in (grad, p))
            grad = jnp.clip(grad, -1e15, 1e15)  # float32 must hold the sum of squares
            s = accumulate(theta, s, grad)
            outputs = network(theta, c, state.count, grad, phi, s)
            return step(c, outputs, grad, s).astype(jnp.result_type(p)), s

        new = jax.tree.map(update_tensor, grads, params, state.tensors)
        updates = jax.tree.map(lambda _, x: x[0], grads, new)
        tensors = jax.tree.map(lambda _, x: x[1], grads, new)
        count = jnp.minimum(state.count, 2**31 - 2) + 1  # stays at the largest int32
        return updates, State(count, tensors)

    return LearnedOptimizer(lambda key: init_theta(key, c), init, update)


# The variants of section 5.3 and appendix C.2. The paper's blackbox optimizer has neither
# nominal term nor division by v. Its ablation "No Nom." keeps the division.
CONSTANTS: dict[str, Constants] = {
    "star": PAPER,
    "star_small_beta3": Constants(beta3=3e-6),
    "star_low_floor": Constants(beta3=1e-6, nominal_eps=1e-10),
    "blackbox": Constants(nominal="none", preconditioner=False),
    "hyperparam": Constants(beta3=0.0),
    "no_preconditioner": Constants(preconditioner=False),
    "no_nominal": Constants(nominal="none"),
}
PRESETS = {name: learned_optimizer(c) for name, c in CONSTANTS.items()}


def star(theta, constants=PAPER, beta1=None, beta2=None, beta3=None, beta4=None):
    """A trained STAR as an `optax.GradientTransformationExtraArgs`.

    beta1 to beta4 replace those of `constants`. `optax.inject_hyperparams` may schedule
    them. The parameter is a feature, so update raises ValueError without params.
    """
    import optax

    betas = dict(beta1=beta1, beta2=beta2, beta3=beta3, beta4=beta4)
    c = constants._replace(**{k: beta for k, beta in betas.items() if beta is not None})
    check_theta(theta, c)
    optimizer = learned_optimizer(c)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("STAR needs params: the parameter is a feature")
        return optimizer.update(theta, updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


# Some cards name these constants, too. `load_theta` refuses other values.
FIXED = dict(momentum_decays=list(DECAYS), adafactor_decays=list(DECAYS))
FIXED |= dict(rms_decay=0.999, normalizer_eps=1e-5, statistic_eps=1e-8)
FIXED |= dict(factor_floor=1e-9, vector_eps=1e-6, square_floor=1e-30)


def check_theta(theta: dict, c: Constants) -> dict:
    """theta in float32. ValueError unless it has the names and shapes that c asks for."""
    found = {name: jnp.shape(x) for name, x in theta.items()}
    if found != theta_shapes(c):
        raise ValueError(f"theta should have shapes {theta_shapes(c)}, not {found}")
    return {name: jnp.asarray(x, jnp.float32) for name, x in theta.items()}


def save_theta(file: Any, theta: dict, card: dict, **more: np.ndarray) -> None:
    """Writes theta and a JSON-able card. `load_theta` skips names with a "/" in them."""
    np.savez(file, card=np.array(json.dumps(card)), **theta, **more)


def load_theta(path: Any) -> tuple[dict, Constants]:
    """(theta, constants) from a file of `save_theta`. Nothing is unpickled.

    Raises ValueError, or what `np.load` raises, for other files. Constants that the card
    does not name are the paper's.
    """
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        theta = {name: file[name] for name in file.files if "/" not in name}
    saved = json.loads(str(theta.pop("card", "{}"))).get("constants", {})
    if any(saved.pop(name, value) != value for name, value in FIXED.items()):
        raise ValueError(f"it has other constants than {FIXED}")
    divides = {True: True, False: False, "rms": True, "none": False}
    c = PAPER._replace(**saved)
    c = c._replace(preconditioner=divides[c.preconditioner])
    c = c._replace(**{k: float(getattr(c, k)) for k in c._fields if "beta" in k})
    learned_optimizer(c)  # refuses an unknown nominal term
    return check_theta(theta, c), c
