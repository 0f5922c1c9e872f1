"""STAR, the learned optimizer that is stabilized through ample regularization.

Harrison, Metz & Sohl-Dickstein 2022, "A closer look at learned optimization", section 5.
One small network (2 hidden layers of 4) sees 39 features of every single parameter and
answers three numbers: a direction d, its log magnitude m_b and the log magnitude m_g of a
nominal, hand-designed step g. With v the root of the running mean square of the gradient:

    f_b = beta3 * d / v * exp(beta4 * m_b)     blackbox term, equation 22
    f_g = beta1 * exp(beta2 * m_g) * g         nominal term, equation 21
    phi' = phi - (f_b + f_g)                   equation 2

    theta = learned_optimizer().init_theta(jax.random.key(0))
    optimizer = star(theta)          # an optax.GradientTransformationExtraArgs

The file stands alone: copy it. It needs jax and numpy; `star` alone needs optax too.
Letters in shape comments: P shape of one parameter tensor, M = 3 timescales, F = 39
features (28 of the tensor, then 11 of time), H = 4 hidden units.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import rsqrt

Theta = dict[str, jax.Array]

# The features, as rows of w0. `row` and `col` are adafactor's running means of the squared
# gradient over one axis each; a vector has one running mean, which enters as both.
GRAD, PARAM, MOMENTUM, RMS = slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)
MOMENTUM_OVER_V, INVERSE_V, FACTORED_GRAD = slice(6, 9), slice(9, 10), slice(10, 13)
ROW, COL, INVERSE_ROW, INVERSE_COL = (slice(i, i + 3) for i in (13, 16, 19, 22))
FACTORED_MOMENTUM, TIME = slice(25, 28), slice(28, 39)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # steps


class Constants(NamedTuple):
    """Everything about the optimizer that is chosen by hand; the paper's values.

    beta3 = 1e-3 is what the paper's appendix B.2 says, and an untrained network then
    diverges on its own task: 1/v is near 1/|gradient|, hundreds to a thousand. See
    `PRESETS["star_small_beta3"]`. beta2 = beta4 = 1e-3 make the magnitude heads nearly
    inert at first: m_g has to reach -693 to halve the nominal step.
    """

    beta1: Any = 1e-3  # scale of the nominal step
    beta2: Any = 1e-3  # scale of m_g inside its exponential
    beta3: Any = 1e-3  # scale of the blackbox step
    beta4: Any = 1e-3  # scale of m_b inside its exponential
    nominal: str = "adam_aggmo"  # a name in NOMINAL; "none" drops the third head too
    preconditioner: str = "rms"  # "rms": v of equation 22; "none": v = 1
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_eps: float = 1e-6  # v = sqrt(rms + rms_eps)
    normalizer_eps: float = 1e-5  # feature / sqrt(mean square over the tensor + this)
    statistic_eps: float = 1e-8  # inside 1/sqrt of the row and column features
    factor_floor: float = 1e-9  # of the row mean, and inside the adafactor 1/sqrt
    vector_eps: float = 1e-6  # inside 1/sqrt for the momentum of rank 0 and 1
    square_floor: float = 1e-30  # added to every square


class State(NamedTuple):
    """What STAR remembers between updates; every tree is shaped like the parameters.

    All are running means from zero without bias correction, stable by design (section
    5.1, "stable hidden states"), float32 whatever the dtype of the parameters.
    """

    count: jax.Array  # () int32, updates done so far
    momentum: tuple[Any, ...]  # M trees of (*P): means of the gradient
    rms: Any  # tree of (*P): mean of the squared gradient
    row: Any  # tree of (M, *P less its largest axis); rank 0 and 1: (M, *P)
    col: (
        Any  # tree of (M, *P less its second largest axis); rank 0 and 1: (M, 1) unused
    )


class LearnedOptimizer(NamedTuple):
    """Three pure functions; theta, the meta-parameters, is an ordinary argument."""

    init_theta: Callable  # key -> theta
    init: Callable  # params -> state
    update: Callable  # (theta, grads, state, params) -> (updates, state); updates add


class Decays(NamedTuple):
    momentum: jax.Array  # (M,)
    rms: jax.Array  # (1,)
    adafactor: jax.Array  # (M,)


class Statistics(NamedTuple):
    """The running means of one tensor: one leaf of each tree of State."""

    momentum: list[jax.Array]
    rms: jax.Array
    row: jax.Array
    col: jax.Array


class Adafactor(NamedTuple):
    """What adafactor's statistics of one tensor add to the first layer."""

    grad_factors: Any  # M arrays, broadcastable to (*P): features g * factor
    momentum_factors: Any  # likewise: features momentum[k] * factor[k]
    grad_mean_squares: list  # M scalars, of those features over the tensor
    momentum_mean_squares: list
    hidden: list  # row and column features; broadcastable to (H, *P), to be summed


# g(z) of equation 21, from (grad, momentum, 1/v). The paper's text names "a combined
# AggMo and Adam" without a formula; adam_aggmo is what the authors' code computes.
NOMINAL: dict[str, Callable] = {
    "sgd": lambda g, m, inverse_v: g,
    "sgdm": lambda g, m, inverse_v: m[0],
    "aggmo": lambda g, m, inverse_v: sum(m) / len(m),
    "adam": lambda g, m, inverse_v: m[0] * inverse_v,
    "adam_aggmo": lambda g, m, inverse_v: sum(m) / len(m) * inverse_v,
}


def learned_optimizer(constants: Constants = Constants()) -> LearnedOptimizer:  # noqa: B008
    """STAR (202 meta-parameters), or one of its ablations, by its constants.

    theta is a dict: w0 (39, 4) b0 (4,) w1 (4, 4) b1 (4,) w2 (4, 3) b2 (3,) and three
    offsets momentum_decays (3,) rms_decays (1,) adafactor_decays (3,) that start at 0;
    heads in the order direction, magnitude, nominal magnitude (without a nominal term:
    two heads, 197 meta-parameters, small_fc_lopt's count). Section 5.2 counts 197 + 5 + 1
    "for beta1"; beta1 is a constant, so we count 202.

    Raises ValueError for an unknown nominal term or preconditioner, and when theta does
    not fit; TypeError for parameters that are not real floating point.
    """
    c = constants
    if c.nominal not in (*NOMINAL, "none"):
        raise ValueError(f"nominal {c.nominal!r} is none of {(*NOMINAL, 'none')}")
    if c.preconditioner not in ("rms", "none"):
        raise ValueError(f"preconditioner {c.preconditioner!r} is neither rms nor none")
    if (len(c.momentum_decays), len(c.adafactor_decays)) != (3, 3):
        raise ValueError("the 39 features need three momentum and adafactor decays")

    def init_theta(key):
        """Weights truncated normal over sqrt(fan in), all else zero."""
        float32 = jnp.float32
        theta = {k: jnp.zeros(shape, float32) for k, shape in theta_shapes(c).items()}
        for name, k in zip(("w0", "w1", "w2"), jax.random.split(key, 3), strict=True):
            fan_in, _ = shape = theta[name].shape
            normal = jax.random.truncated_normal(k, -2, 2, shape, float32)
            theta[name] = normal / math.sqrt(fan_in)
        return theta

    def update(theta, grads, state, params):
        check_theta(theta, c)
        decays = effective_decays(theta, c)
        time_hidden = theta["b0"] + time_features(state.count) @ theta["w0"][TIME]
        leaves, treedef = jax.tree.flatten(grads)
        leaves_of = treedef.flatten_up_to
        steps, new = [], []
        for i, (g, p) in enumerate(zip(leaves, leaves_of(params), strict=True)):
            old = Statistics(
                momentum=[leaves_of(tree)[i] for tree in state.momentum],
                rms=leaves_of(state.rms)[i],
                row=leaves_of(state.row)[i],
                col=leaves_of(state.col)[i],
            )
            step, statistics = update_tensor(theta, c, time_hidden, decays, g, p, old)
            steps.append(step)
            new.append(statistics)
        tree = treedef.unflatten
        return tree(steps), State(
            count=state.count + 1,
            momentum=tuple(tree([s.momentum[k] for s in new]) for k in range(3)),
            rms=tree([s.rms for s in new]),
            row=tree([s.row for s in new]),
            col=tree([s.col for s in new]),
        )

    return LearnedOptimizer(init_theta, init, update)


def init(params: Any) -> State:
    """All running means at zero, for any tree of real floating-point arrays."""

    def zeros(shape_of):
        return jax.tree.map(lambda p: jnp.zeros(shape_of(p), jnp.float32), params)

    def row_shape(p):  # without the largest axis
        return (3, *np.delete(np.shape(p), factored_axes(np.shape(p))[1:]))

    def col_shape(p):  # without the second largest
        axes = factored_axes(np.shape(p))
        return (3, *np.delete(np.shape(p), axes[0])) if axes else (3, 1)

    for p in jax.tree.leaves(params):
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"STAR updates real floating-point arrays, not {dtype}")
    return State(
        count=jnp.zeros((), jnp.int32),
        momentum=tuple(zeros(jnp.shape) for _ in range(3)),
        rms=zeros(jnp.shape),
        row=zeros(row_shape),
        col=zeros(col_shape),
    )


def update_tensor(
    theta: Theta,
    c: Constants,
    time_hidden: jax.Array,
    decays: Decays,
    grad: jax.Array | float,
    param: jax.Array | float,
    statistics: Statistics,
) -> tuple[jax.Array, Statistics]:
    """One tensor: (the update (*P) in the parameter's dtype, its new Statistics)."""
    g, p = (jnp.asarray(x).astype(jnp.float32) for x in (grad, param))
    s = accumulate(g, decays, statistics, c)
    inverse_v = rsqrt(s.rms + c.rms_eps)  # (*P)
    hidden = first_layer(theta["w0"], time_hidden, g, p, s, inverse_v, c)
    direction, magnitude, *nominal_magnitude = head_layers(theta, hidden)  # each (*P)
    step = c.beta3 * direction * jnp.exp(c.beta4 * magnitude)  # equations 20 and 22
    if c.preconditioner == "rms":
        step *= inverse_v
    if c.nominal != "none":  # equation 21
        descent = NOMINAL[c.nominal](g, s.momentum, inverse_v)
        step += c.beta1 * jnp.exp(c.beta2 * nominal_magnitude[0]) * descent
    return (-step).astype(jnp.result_type(param)), s


def accumulate(g: jax.Array, decays: Decays, s: Statistics, c: Constants) -> Statistics:
    """mean <- decay * mean + (1 - decay) * new, for all running means of one tensor."""

    def ema(decay, mean, new):
        return decay * mean + (1 - decay) * new

    def emas(means, new):  # M decays, (M, *S) means of one new (*S)
        return ema(decays.adafactor.reshape(-1, *(1,) * new.ndim), means, new[None])

    g2 = _square(g, c)
    row, col = emas(s.row, g2) if g.ndim < 2 else None, s.col
    if g.ndim > 1:
        second, largest = factored_axes(g.shape)
        row = emas(s.row, jnp.mean(g2, largest))
        col = emas(s.col, jnp.mean(g2, second))
    momentum = [ema(d, m, g) for d, m in zip(decays.momentum, s.momentum, strict=True)]
    return Statistics(momentum, ema(decays.rms[0], s.rms, g2), row, col)


def first_layer(
    w0: jax.Array,
    time_hidden: jax.Array,
    g: jax.Array,
    p: jax.Array,
    s: Statistics,
    inverse_v: jax.Array,
    c: Constants,
) -> list:
    """W0' features + b0, before its ReLU: H arrays, broadcastable to (*P).

    Every feature x of the tensor enters as x / sqrt(mean square of x + eps). This is the
    folded form: the normalizer scales the feature's row of w0, features with a common
    factor are summed before it is applied, row and column features stay small, and no
    array of (*P, F) is built. The tests hold the plain form and show that both agree.
    """

    def weights(rows, mean_squares):  # (rows, H)
        return rsqrt(c.normalizer_eps + jnp.stack(mean_squares))[:, None] * w0[rows]

    m = s.momentum
    m2 = [_square(x, c) for x in m]
    inverse_v2 = 1 / (s.rms + c.rms_eps)
    adafactor = (factored if g.ndim > 1 else unfactored)(w0, g, m2, s, c)
    (w_g,) = weights(GRAD, [_mean(_square(g, c))])  # (H,)
    (w_p,) = weights(PARAM, [_mean_square(p)])
    (w_rms,) = weights(RMS, [_mean_square(s.rms)])
    (w_inverse_v,) = weights(INVERSE_V, [_mean(inverse_v2)])
    w_m = weights(MOMENTUM, [_mean(x) for x in m2])  # (M, H)
    w_m_over_v = weights(MOMENTUM_OVER_V, [_mean(x * inverse_v2) for x in m2])
    w_factored_g = weights(FACTORED_GRAD, adafactor.grad_mean_squares)
    w_factored_m = weights(FACTORED_MOMENTUM, adafactor.momentum_mean_squares)

    hidden = []
    for j in range(w0.shape[1]):
        h = sum((x[j] for x in adafactor.hidden), start=time_hidden[j])
        h = _dot(h, (w_p[j], w_rms[j], w_inverse_v[j]), (p, s.rms, inverse_v))
        h += g * _dot(w_g[j], w_factored_g[:, j], adafactor.grad_factors)
        for k, factor in enumerate(adafactor.momentum_factors):
            over_v = w_m_over_v[k, j] * inverse_v
            h += m[k] * (w_m[k, j] + over_v + w_factored_m[k, j] * factor)
        hidden.append(h)
    return hidden


def factored(
    w0: jax.Array, g: jax.Array, m2: list[jax.Array], s: Statistics, c: Constants
) -> Adafactor:
    """Adafactor features for rank 2 and more (Shazeer & Stern 2018, algorithm 4).

    Its 1/v factors into a number per row and one per column, over the two largest axes:
    x * row_factor * col_factor. The mean square of that needs no array of x's size either:
    sum over r, c of x2[r, c] row_factor[r]^2 col_factor[c]^2 is a product of matrices.
    """
    second, largest = factored_axes(g.shape)
    second_in_row = second - int(largest < second)  # in `row`, `largest` is gone
    row_mean = jnp.mean(s.row, second_in_row + 1, keepdims=True)
    row_factor = _floored_rsqrt(s.row / (row_mean + c.factor_floor), c)
    col_factor = _floored_rsqrt(
        s.col, c
    )  # (M, *P less second); row: (M, *P less largest)

    axes = "abcdefghijkl"[: g.ndim]
    row_axes, col_axes = axes.replace(axes[largest], ""), axes.replace(axes[second], "")
    row2, col2 = row_factor**2, col_factor**2

    def mean_square(subscripts, x2, *factors2):
        return jnp.einsum(subscripts, x2, *factors2, precision="highest") / _count(g)

    # One product for all timescales of g (z), one each for those of the momentum.
    all_g = f"{axes},z{row_axes},z{col_axes}->z"
    one_m = f"{axes},{row_axes},{col_axes}->"

    row = _side(s.row, w0[ROW], w0[INVERSE_ROW], c)
    col = _side(s.col, w0[COL], w0[INVERSE_COL], c)
    factors = [
        jnp.expand_dims(row_factor[k], largest) * jnp.expand_dims(col_factor[k], second)
        for k in range(3)
    ]
    return Adafactor(
        grad_factors=factors,
        momentum_factors=factors,
        grad_mean_squares=list(mean_square(all_g, _square(g, c), row2, col2)),
        momentum_mean_squares=[
            mean_square(one_m, m2[k], row2[k], col2[k]) for k in range(3)
        ],
        hidden=[jnp.expand_dims(row, largest + 1), jnp.expand_dims(col, second + 1)],
    )


def unfactored(
    w0: jax.Array, g: jax.Array, m2: list[jax.Array], s: Statistics, c: Constants
) -> Adafactor:
    """The same features for rank 0 and 1, from the one mean square per element, `row`."""
    grad_factors = _floored_rsqrt(s.row + c.factor_floor, c)  # (M, *P)
    momentum_factors = rsqrt(s.row + c.vector_eps)
    row = _side(s.row, w0[ROW], w0[INVERSE_ROW], c)
    col = _side(s.row, w0[COL], w0[INVERSE_COL], c)
    return Adafactor(
        grad_factors=grad_factors,
        momentum_factors=momentum_factors,
        grad_mean_squares=[_mean((g * f) ** 2) for f in grad_factors],
        momentum_mean_squares=[
            _mean(m2[k] * momentum_factors[k] ** 2) for k in range(3)
        ],
        hidden=[row, col],
    )


def head_layers(theta: Theta, hidden: list) -> list:
    """Second layer and heads, unit by unit: each output has shape (*P).

    Sums, not matrix products: so XLA makes one pass over the tensor of them and of the
    first layer.
    """
    hidden = [_relu(h) for h in hidden]
    w1, b1, w2, b2 = (theta[name] for name in ("w1", "b1", "w2", "b2"))
    second = [_relu(_dot(b1[j], w1[:, j], hidden)) for j in range(len(b1))]
    return [_dot(b2[j], w2[:, j], second) for j in range(len(b2))]


def time_features(count: jax.Array) -> jax.Array:
    """tanh(t / tau - 1) for 11 timescales tau, t = updates done before this one: (11,)."""
    t = jnp.asarray(count).astype(jnp.float32)
    return jnp.tanh(t / np.asarray(TIMESCALES, np.float32) - 1)


def effective_decays(theta: Theta, c: Constants) -> Decays:
    """1 - exp(10 * (log(1 - d) / 10 + offset)): an offset of 0 gives the constant d.

    As in the authors' code, the second-moment decays are clipped to [0, 1]; those of the
    momentum are not, so a large offset can make it unstable: weight decay keeps it small.
    """

    def shift(decays, offsets):
        log_rate = np.log1p(-np.asarray(decays, np.float32)) / 10
        return 1 - jnp.exp(10 * (log_rate + offsets))

    return Decays(
        momentum=shift(c.momentum_decays, theta["momentum_decays"]),
        rms=jnp.clip(shift([c.rms_decay], theta["rms_decays"]), 0, 1),
        adafactor=jnp.clip(shift(c.adafactor_decays, theta["adafactor_decays"]), 0, 1),
    )


def factored_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(second largest, largest) axis, of equals the later is larger; () below rank 2."""
    return tuple(
        int(i) for i in np.argsort(shape, kind="stable")[-2:] if len(shape) > 1
    )


def theta_shapes(c: Constants) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array in theta."""
    heads = 2 if c.nominal == "none" else 3
    network = dict(w0=(39, 4), b0=(4,), w1=(4, 4), b1=(4,), w2=(4, heads), b2=(heads,))
    return network | dict(momentum_decays=(3,), rms_decays=(1,), adafactor_decays=(3,))


def check_theta(theta: Theta, c: Constants) -> None:
    """ValueError, in one line, unless theta has the names and shapes that c asks for."""
    expected = theta_shapes(c)
    if not isinstance(theta, dict) or set(theta) != set(expected):
        found = sorted(theta) if isinstance(theta, dict) else type(theta).__name__
        raise ValueError(f"theta should hold {sorted(expected)}, not {found}")
    for name, shape in expected.items():
        if jnp.shape(theta[name]) != shape:
            found = jnp.shape(theta[name])
            raise ValueError(f"theta[{name!r}] has shape {found}, not {shape}")


# The variants of section 5.3 and appendix C.2, and the one that a CPU can train.
# Blackbox has no v and no nominal term (small_fc_lopt); No Nom. keeps the division by v.
CONSTANTS: dict[str, Constants] = {
    "star": Constants(),
    "star_small_beta3": Constants(beta3=1e-6),
    "blackbox": Constants(nominal="none", preconditioner="none"),
    "hyperparam": Constants(beta3=0.0),
    "no_preconditioner": Constants(preconditioner="none"),
    "no_nominal": Constants(nominal="none"),
}
PRESETS = {name: learned_optimizer(c) for name, c in CONSTANTS.items()}


def star(
    theta: Theta,
    constants: Constants = Constants(),  # noqa: B008
    beta1: Any = None,
    beta2: Any = None,
    beta3: Any = None,
    beta4: Any = None,
) -> Any:
    """A trained STAR as an `optax.GradientTransformationExtraArgs`.

    theta: as from `load_theta` or `init_theta`. constants: those theta was trained with.
    beta1 .. beta4: replace those of `constants`; numbers or traced scalars, so that
    `optax.inject_hyperparams(star)(theta, constants, beta1=schedule)` works.
    `update(grads, state, params)` needs the parameters (ValueError without): they are a
    feature. Extra keyword arguments are ignored.
    """
    import optax

    betas = dict(beta1=beta1, beta2=beta2, beta3=beta3, beta4=beta4)
    given = {name: beta for name, beta in betas.items() if beta is not None}
    constants = constants._replace(**given)
    check_theta(theta, constants)
    optimizer = learned_optimizer(constants)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("STAR's update needs params: the parameter is a feature")
        return optimizer.update(theta, updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def save_theta(file: Any, theta: Theta, card: dict, **more: np.ndarray) -> None:
    """Write theta and its card (a JSON-able dict) to one `.npz` of a few KB.

    file: a path or an open binary file. more: arrays that `load_theta` passes over; their
    names hold a "/".
    """
    arrays = {name: np.asarray(x) for name, x in theta.items()}
    np.savez(file, card=np.array(json.dumps(card)), **arrays, **more)


def load_theta(path: str | pathlib.Path) -> tuple[Theta, Constants]:
    """(theta, constants) from a file by `save_theta`; never unpickles.

    The constants are those in the card's "constants", the paper's where it names none.
    OSError when the file cannot be read; ValueError, in one line, when it is no theta.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if sum(member.file_size for member in file.zip.infolist()) > 2**24:
                raise ValueError("it would unpack to more than 16 MB")
            arrays = {name: file[name] for name in file.files if "/" not in name}
        card = json.loads(str(arrays.pop("card", "{}")))
        constants = read_constants(card.get("constants", {}))
        check_theta(arrays, constants)
        for name, x in arrays.items():
            if not np.issubdtype(x.dtype, np.floating):
                raise ValueError(f"{name} is of {x.dtype}, not of floating point")
        theta = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} holds no theta of STAR: {reason}") from error
    if not all(np.isfinite(x).all() for x in theta.values()):
        raise ValueError(f"{path} holds a theta that is not finite")
    return theta, constants


def read_constants(saved: dict) -> Constants:
    """Constants from a card's; ValueError or TypeError for those that cannot be."""
    constants = Constants(**saved)
    numbers = {}
    for name, default in Constants()._asdict().items():
        if isinstance(default, str):
            continue
        value = np.asarray(getattr(constants, name))
        if value.dtype.kind not in "fi" or value.shape != np.shape(default):
            raise ValueError(f"constant {name} is not {np.size(default)} number(s)")
        if not np.isfinite(value).all():
            raise ValueError(f"constant {name} is not finite")
        if "decay" in name and not ((value >= 0) & (value < 1)).all():
            raise ValueError(f"constant {name} is not in 0 .. 1")
        value = value.astype(float).tolist()
        numbers[name] = tuple(value) if isinstance(value, list) else value
    constants = constants._replace(**numbers)
    learned_optimizer(constants)
    return constants


def _side(
    x: jax.Array, w_value: jax.Array, w_inverse: jax.Array, c: Constants
) -> jax.Array:
    """The features x (M, *S) and 1/sqrt(x + eps) in the first layer: (H, *S)."""
    features = jnp.concatenate([x, rsqrt(x + c.statistic_eps)])  # (2 M, *S)
    flat = features.reshape(len(features), -1)
    scale = rsqrt(c.normalizer_eps + jnp.mean(flat * flat, 1))
    w = scale[:, None] * jnp.concatenate([w_value, w_inverse])  # (2 M, H)
    return jnp.stack([_dot(0.0, w[:, j], features) for j in range(w.shape[1])])


def _square(x: jax.Array, c: Constants) -> jax.Array:
    # The floor is the authors', on the squared gradient. We square everything this way:
    # two operations make a fused, vectorized loop on a CPU where one makes a slow one.
    return x * x + c.square_floor


def _mean(x: jax.Array) -> jax.Array:
    if not x.ndim:
        return x
    # A product with ones: XLA's sums take several times as long on a CPU.
    sums = jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision="highest")
    return jnp.sum(sums) / _count(x)


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.vdot(x, x, precision="highest") / _count(x)


def _count(x: jax.Array) -> float:
    return float(x.size)  # may be beyond int32


def _floored_rsqrt(x: jax.Array, c: Constants) -> jax.Array:
    return rsqrt(jnp.maximum(x, c.factor_floor))


def _dot(bias: jax.Array | float, weights: jax.Array, arrays: Any) -> jax.Array:
    """bias + weights[0] * arrays[0] + ...: begun at the bias, all are multiply-adds."""
    return sum((w * x for w, x in zip(weights, arrays, strict=True)), start=bias)


def _relu(x: jax.Array) -> jax.Array:
    """`jax.nn.relu`, nan included, in two instructions on a CPU; a maximum takes four."""
    return jnp.where(x <= 0, 0.0, x)
