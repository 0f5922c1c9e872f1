"""The inner problems: what a learned optimizer trains, and one step of that training.

    spec = TASKS["fmnist"]
    data, about = spec.load("auto", None)   # arrays on the device, and what they are
    task = spec.build(data, key)            # inside or outside of jit; data may be traced

The four tasks follow section 5.3 and appendix B of the STAR paper, and the conventions of
the suite it uses, google/learned_optimization. Pixels are divided by 255 and not augmented.
The inner training draws batches of 128 with replacement from 80 % of the training set. The
loss is the mean cross-entropy. Weights are truncated normal over sqrt(fan in). The rest of
the suite is in `experiments/catalogue.py`. In shape comments: B batch, C channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import data as datasets
import estimators


class Task(NamedTuple):
    init: Callable  # key -> params
    batch: Callable  # (key, split) -> batch; split: "train" | "valid" | "test"
    loss: Callable  # (params, key, batch) -> (), nats. The key is for dropout
    evaluate: Callable  # params -> dict of scalars, over the test split
    loss_limit: float  # where the meta-loss clips each step's loss, nan included


class TaskSpec(NamedTuple):
    load: Callable  # (source, data_dir) -> (data, about): arrays, and a dict for cards
    build: Callable  # (data, key) -> Task. The key draws a member of a family


# --- one step of the inner training
class Carry(NamedTuple):
    params: Any
    optimizer: Any  # the optimizer's state
    member: jax.Array  # data of the key that drew the task, for families of tasks


def fresh(build: Callable, optimizer: Any, key: jax.Array) -> Carry:
    """The start of a trajectory. build: key -> Task."""
    params = build(key).init(key)
    return Carry(params, optimizer.init(params), jax.random.key_data(key))


def inner_step(build, optimizer, theta, carry: Carry, key) -> tuple[Carry, jax.Array]:
    """phi' = phi - f (equation 2), and the loss () of the training batch before it.

    Deviation: equation 3 takes the loss after the update, on a fresh batch. The loss before
    the update costs nothing, and the authors' code takes it, too.
    """
    task = build(jax.random.wrap_key_data(carry.member))
    batch_key, loss_key = jax.random.split(key)
    batch = task.batch(batch_key, "train")
    loss, grads = jax.value_and_grad(task.loss)(carry.params, loss_key, batch)
    updates, state = optimizer.update(theta, grads, carry.optimizer, carry.params)
    params = optax.apply_updates(carry.params, updates)
    return carry._replace(params=params, optimizer=state), loss


def inner_problem(build, optimizer, unravel, length: int) -> estimators.Problem:
    """Windows of `length` inner steps, for the estimators of `estimators.py`.

    unravel: flat theta -> theta. Losses are clipped at the task's limit.
    """

    limit = build(jax.random.key(0)).loss_limit
    start, step = (functools.partial(f, build, optimizer) for f in (fresh, inner_step))
    windows = estimators.unroll(start, step, length, limit)

    def run(theta, carry, key):
        return windows.run(unravel(theta), carry, key)

    return windows._replace(run=run)


# --- networks: pairs of pure functions
class Network(NamedTuple):
    init: Callable  # key -> params
    apply: Callable  # (params, key, x) -> outputs


def truncated_normal(key: jax.Array, shape: tuple, fan_in: int) -> jax.Array:
    """Normals cut at 2, over sqrt(fan in). Their deviation is 0.88 / sqrt(fan in)."""
    return jax.random.truncated_normal(key, -2, 2, shape) / math.sqrt(fan_in)


def dense_init(key: jax.Array, n: int, m: int) -> dict:
    return {"w": truncated_normal(key, (n, m), n), "b": jnp.zeros(m)}


def dense(params: dict, x: jax.Array) -> jax.Array:
    """(..., n) -> (..., m)."""
    y = x @ params["w"]
    return y + jnp.broadcast_to(params["b"], y.shape)


def mlp(shape: tuple, outputs: int, hidden: tuple = (128, 128)) -> Network:
    """Images of `shape`, flattened -> [dense, relu] for each of hidden -> dense."""
    sizes = (math.prod(shape), *hidden, outputs)

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [dense_init(k, n, m) for k, n, m in layers]

    def apply(params, key, images):
        x = images.reshape(len(images), -1)
        for layer in params[:-1]:
            x = jax.nn.relu(dense(layer, x))
        return dense(params[-1], x)

    return Network(init, apply)


def conv_init(key: jax.Array, size: int, n: int, m: int) -> dict:
    """A square kernel (size, size, n, m)."""
    w = truncated_normal(key, (size, size, n, m), size * size * n)
    return {"w": w, "b": jnp.zeros(m)}


def conv(params: dict, x: jax.Array, stride: int = 1) -> jax.Array:
    """(B, h, w, n) -> (B, h / stride rounded up, likewise w, m): "same" padding.

    On a CPU it is a matrix product. Inside of a loop, such as inner training, XLA's
    convolution and its gradient take ten times as long there (jax issue 12868).
    """
    w = params["w"]
    if jax.default_backend() == "cpu":
        patches = jnp.concatenate(windows(x, len(w), stride, 0), -1)  # (B, h, w, 9 n)
        y = patches @ w.reshape(-1, w.shape[-1])
    else:
        layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", **layout)
    return y + jnp.broadcast_to(params["b"], y.shape) if "b" in params else y


def windows(x: jax.Array, size: int, stride: int, fill: float) -> list:
    """The size * size pixels of every window, each pixel as (B, h', w', C).

    "Same" padding: h' = h / stride rounded up. The odd pixel of padding is lower right.
    """
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    h, w = x.shape[1] - size + 1, x.shape[2] - size + 1
    at = [(i, j) for i in range(size) for j in range(size)]
    return [x[:, i : h + i : stride, j : w + j : stride] for i, j in at]


def convnet(shape: tuple, outputs: int) -> Network:
    """[3x3 convolution, relu] to 32, 64, 64 channels -> mean over positions -> dense.

    STAR, appendix B.2; 56,970 parameters on CIFAR-10. The first convolution has stride 2.
    The mean is missing in the text and is in the authors' code.
    """
    channels = (shape[-1], 32, 64, 64)

    def init(key):
        *keys, last = jax.random.split(key, 4)
        layers = zip(keys, channels[:-1], channels[1:], strict=True)
        convs = [conv_init(k, 3, n, m) for k, n, m in layers]
        return {"convs": convs, "out": dense_init(last, channels[-1], outputs)}

    def apply(params, key, x):
        for i, layer in enumerate(params["convs"]):
            x = jax.nn.relu(conv(layer, x, stride=1 if i else 2))
        return dense(params["out"], x.mean((1, 2)))  # (B, h, w, C) -> (B, C)

    return Network(init, apply)


# --- image classification
class Split(NamedTuple):
    images: jax.Array  # (examples, h, w, C) uint8
    labels: jax.Array  # (examples,) uint8


def split_images(images: datasets.Images, transform=lambda x: x) -> dict[str, Split]:
    """80 % train, 10 % valid, 10 % left out of the training set, and test.

    The order is a fixed permutation, so that splits agree between runs and machines.
    """
    order = np.random.RandomState(0).permutation(len(images.train_labels))
    tenth = len(order) // 10
    train, valid = order[: 8 * tenth], order[8 * tenth : 9 * tenth]

    def put(x, y):
        return Split(jnp.asarray(transform(x)), jnp.asarray(y))

    return {
        "train": put(images.train_images[train], images.train_labels[train]),
        "valid": put(images.train_images[valid], images.train_labels[valid]),
        "test": put(images.test_images, images.test_labels),
    }


def pool(images: np.ndarray, size: int) -> np.ndarray:
    """(examples, h, w, C) uint8 -> (examples, h / size, w / size, C), rounded means."""
    n, h, w, c = images.shape
    squares = images.reshape(n, h // size, size, w // size, size, c)
    return np.round(squares.mean((2, 4))).astype(np.uint8)


def pool_to_8x8(images: np.ndarray) -> np.ndarray:
    """(examples, 28, 28, 1) uint8 -> (examples, 8, 8, 1): margin 2, means of 4 x 4."""
    return pool(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), 4)


def to_batch(split: Split) -> tuple[jax.Array, jax.Array]:
    """Images (B, h, w, C) float32 in [0, 1], labels (B,) uint8."""
    return split.images.astype(jnp.float32) / 255, split.labels


def sample(key: jax.Array, split: Split, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` examples with replacement, off uniform by at most examples / 2^32."""
    bits = jax.random.bits(key, (size,), jnp.uint32)
    index = bits % jnp.uint32(len(split.labels))
    return to_batch(Split(split.images[index], split.labels[index]))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None].astype(jnp.int32), 1).mean()


def measured(init, draw, measure, test, as_batch, loss_limit: float) -> Task:
    """A Task from measure: (params, key, batch) -> dict of scalars, "loss" among them.

    test: arrays of equal length, which as_batch makes batches of. They go through in ten
    equal parts, or in fewer where ten do not divide them, with one fixed key.
    """

    def loss(params, key, batch):
        return measure(params, key, batch)["loss"]

    def evaluate(params):
        def one(part):
            return measure(params, jax.random.key(0), as_batch(part))

        parts = math.gcd(len(jax.tree.leaves(test)[0]), 10)
        chunks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), test)
        values = jax.lax.map(one, chunks)
        return {f"test_{name}": x.mean() for name, x in values.items()}

    return Task(init, draw, loss, evaluate, loss_limit)


def classifier(draw, test, network, classes=10, error=cross_entropy, loss_limit=None):
    """A Task: classification of images, by cross-entropy or another error of the logits.

    draw: (key, split) -> (images (B, h, w, C) in [0, 1], labels (B,)). loss_limit: None is
    1.5 ln(classes), 1.5 times the loss of a guess.
    """

    def measure(params, key, batch):
        images, labels = batch
        logits = network.apply(params, key, images)
        accuracy = (logits.argmax(-1) == labels).mean()
        return {"loss": error(logits, labels), "accuracy": accuracy}

    limit = 1.5 * math.log(classes) if loss_limit is None else loss_limit
    return measured(network.init, draw, measure, test, to_batch, limit)


def image_task(load_images: str, network: Callable, transform=lambda x: x) -> TaskSpec:
    """load_images: a function of data.py. network: (shape, classes) -> Network."""

    def load(source="auto", data_dir=None):
        images = getattr(datasets, load_images)(source, data_dir)
        return split_images(images, transform), datasets.about(images)

    def build(data, key):
        def draw(key, split):
            return sample(key, data[split], 128)

        fitted = network(data["test"].images.shape[1:], 10)
        return classifier(draw, data["test"], fitted)

    return TaskSpec(load, build)


def quadratic(data: Any, key: jax.Array) -> Task:
    """The noisy quadratic model as a task: two parameters (equation 4, appendix B.1).

    loss = (phi - xi)' H (phi - xi) / 2 with xi ~ N(0, I), phi_0 ~ N(0, 10 I), H of A.30.
    """
    hess = jnp.array([[1.11, 0.596], [0.596, 0.486]], jnp.float32)
    return Task(
        init=lambda key: math.sqrt(10) * jax.random.normal(key, (2,)),
        batch=lambda key, split: jax.random.normal(key, (2,)),
        loss=lambda phi, key, xi: 0.5 * (phi - xi) @ hess @ (phi - xi),
        evaluate=lambda phi: {"test_loss": 0.5 * (phi @ hess @ phi + jnp.trace(hess))},
        loss_limit=1000.0,
    )


def no_data(source="auto", data_dir=None) -> tuple[dict, dict]:
    return {}, datasets.about_formula()


small_mlp = functools.partial(mlp, hidden=(32,))
TASKS: dict[str, TaskSpec] = {
    "fmnist": image_task("fashion_mnist", mlp),
    "fmnist_small": image_task("fashion_mnist", small_mlp, pool_to_8x8),
    "cifar10_conv": image_task("cifar10", convnet),
    "quadratic": TaskSpec(no_data, quadratic),
}
