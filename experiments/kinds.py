"""Kinds of inner problems, each a `Task` of pure functions; tasks.py gives them names.

The conventions are those of the task suite that the STAR paper uses,
google/learned_optimization: pixels / 255, never augmented; the first 80 % of the training
set for the inner training; mean cross-entropy. Batches are drawn with replacement, by the
key alone. Networks and initial values are in `networks.py`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data as datasets
import nqm
from companions import problems
from estimators import perturbed_difference
from experiments.networks import Network, mlp
from inner import batching


class Task(NamedTuple):
    init: Callable  # key -> params
    batch: Callable  # (key, split) -> batch; split: "train" | "valid" | "test"
    # (params, key, batch) -> (), of cross-entropies in nats; key: for dropout, ES
    loss: Callable
    evaluate: Callable  # params -> dict of scalars, over the test split
    loss_limit: float  # the meta-loss clips each step's loss here; nan counts as this


class Split(NamedTuple):
    images: jax.Array  # (n, height, width, channels) uint8, on the device
    labels: jax.Array  # (n,) uint8


BATCH_SIZE = 128
CLASSES = 10
IMAGES = {  # function of data.py -> shape of one image, classes
    "fashion_mnist": ((28, 28, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}
SPECIAL_TOKENS = (
    3  # in front of the 256 bytes: padding, end, unknown, none of them used
)
VOCABULARY = SPECIAL_TOKENS + 256
TEST_WINDOWS = 500  # of text, spread over the test split
ES_SIGMA = 0.01


# Data, once, in numpy.


def split_images(
    images: datasets.Images, transform: Callable = lambda x: x
) -> dict[str, Split]:
    """80 % train, 10 % valid, 10 % outer valid (left out) of the training set, and test.

    The order is a fixed permutation, so that splits agree between runs and machines.
    """
    order = np.random.RandomState(0).permutation(len(images.train_labels))
    tenth = len(order) // 10
    parts = {"train": order[: 8 * tenth], "valid": order[8 * tenth : 9 * tenth]}

    def put(x, y):
        return Split(jnp.asarray(transform(x)), jnp.asarray(y))

    splits = {
        name: put(images.train_images[index], images.train_labels[index])
        for name, index in parts.items()
    }
    return splits | {"test": put(images.test_images, images.test_labels)}


def pool_to_8x8(images: np.ndarray) -> np.ndarray:
    """(n, 28, 28, 1) uint8 -> (n, 8, 8, 1) uint8: a margin of 2, then means of 4 x 4."""
    return pool(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), 4)


def pool(images: np.ndarray, block: int) -> np.ndarray:
    """(n, h, w, c) uint8 -> (n, h / block, w / block, c) uint8, the means of blocks."""
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // block, block, w // block, block, c)
    return np.round(blocks.mean((2, 4))).astype(np.uint8)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """(n, h, w, c) uint8 -> (n, size, size, c) uint8, bilinear, without antialiasing.

    As tf.image.resize, which the task suite uses: output pixel i reads the source at
    (i + 1/2) h / size - 1/2, between two neighbours, whatever the ratio. Deviation:
    rounded to whole grey levels, half a level (0.002 of the range) at most.
    """

    def halfway(x, axis):
        n = x.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = at.astype(int)
        share = (at - low).astype(np.float32)
        share = share.reshape(-1, *[1] * (x.ndim - axis - 1))
        first, second = (x.take(i, axis) for i in (low, np.minimum(low + 1, n - 1)))
        return first * (1 - share) + second * share

    blocks = np.split(images, range(1000, len(images), 1000))  # each fits in a cache
    small = [np.round(halfway(halfway(x, 1), 2)).astype(np.uint8) for x in blocks]
    return np.concatenate(small)


# Batches, on the device.


def to_batch(split: Split) -> tuple[jax.Array, jax.Array]:
    """Images (B, h, w, c) float32 in [0, 1], labels (B,) uint8."""
    return split.images.astype(jnp.float32) / 255, split.labels


def sample(key: jax.Array, split: Split, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` examples, with replacement, as `to_batch` gives them.

    One draw of 32 bits modulo n: off uniform by at most n / 2^32, and half of the random
    bits that `jax.random.randint` takes.
    """
    bits = jax.random.bits(key, (size,), jnp.uint32)
    index = bits % jnp.uint32(len(split.labels))
    return to_batch(Split(split.images[index], split.labels[index]))


def windows(
    stream: jax.Array, starts: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Bytes (n,), starts (B,) -> tokens (B, length) int32 and the ones after each."""
    bytes_ = stream[starts[:, None] + jnp.arange(length + 1)[None]]
    tokens = bytes_.astype(jnp.int32) + SPECIAL_TOKENS
    return tokens[:, :-1], tokens[:, 1:]


# Kinds of tasks.


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None].astype(jnp.int32), 1).mean()


def squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch and the classes of (logit - one-hot label)^2."""
    return jnp.square(logits - jax.nn.one_hot(labels, logits.shape[-1])).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()


def measured(
    init: Callable,
    draw: Callable,
    measure: Callable,
    test: Any,
    as_batch: Callable,
    loss_limit: float,
) -> Task:
    """A Task from measure: (params, key, batch) -> dict of scalars, "loss" among them.

    test: a pytree of arrays of equal length, which as_batch makes batches of. The test
    goes through it in ten parts of equal size where it can. What is drawn during a test,
    dropout, is drawn by one fixed key.
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


def classifier(
    draw: Callable,
    test: Split,
    network: Network,
    classes: int = CLASSES,
    error: Callable = cross_entropy,
    loss_limit: float | None = None,
) -> Task:
    """Image classification, by cross-entropy or another error of the logits.

    draw: (key, split) -> (images (B, h, w, c) float32 in [0, 1], labels (B,)).
    The loss's limit: 1.5 ln(classes), half again that of a guess, as the suite has it;
    where it has none, for ResNets, the same here. For squared errors the suite clips at 1
    and multiplies by 10; here they are clipped at 1 alone.
    """

    def measure(params, key, batch):
        images, labels = batch
        logits = network.apply(params, key, images)
        return {"loss": error(logits, labels), "accuracy": accuracy(logits, labels)}

    limit = 1.5 * math.log(classes) if loss_limit is None else loss_limit
    return measured(network.init, draw, measure, test, to_batch, limit)


def autoencoder(draw: Callable, test: Split, network: Network) -> Task:
    """Reconstruction of images in [0, 1]: mean squared error over pixels and batch."""

    def measure(params, key, batch):
        images, _ = batch
        out = network.apply(params, key, images)
        return {"loss": jnp.square(images.reshape(out.shape) - out).mean()}

    return measured(network.init, draw, measure, test, to_batch, loss_limit=1.0)


def language_model(
    streams: dict, network: Network, length: int, batch_size: int
) -> Task:
    """Next-byte prediction: mean cross-entropy in nats over all positions of a batch.

    streams: the bytes of each split, (n,) uint8; tokens are byte + 3, V = 259. Deviation:
    the suite takes the first `length` + 1 tokens of each sentence of the One Billion Word
    benchmark and pads short ones; here a window starts anywhere in a stream of text, so
    nothing is padded or masked, and it rarely starts with a sentence. Where the suite
    leaves the loss of such tasks as it is in the meta-loss, it is clipped at 1.5 ln 259.
    """

    def draw(key, split):
        stream = streams[split]
        bits = jax.random.bits(key, (batch_size,), jnp.uint32)
        starts = bits % jnp.uint32(len(stream) - length)
        return windows(stream, starts.astype(jnp.int32), length)

    def measure(params, key, batch):
        tokens, following = batch
        logits = network.apply(params, key, tokens)
        logits = logits.reshape(-1, VOCABULARY)  # (B, T, V) -> (B T, V)
        labels = following.reshape(-1)
        return {
            "loss": cross_entropy(logits, labels),
            "accuracy": accuracy(logits, labels),
        }

    last = len(streams["test"]) - length - 1
    starts = jnp.asarray(np.linspace(0, last, TEST_WINDOWS).astype(np.int32))
    return measured(
        network.init,
        draw,
        measure,
        starts,
        lambda starts: windows(streams["test"], starts, length),
        1.5 * math.log(VOCABULARY),
    )


def es_gradient(task: Task, pairs: int, sigma: float = ES_SIGMA) -> Task:
    """The same task with a gradient by evolution strategies instead of backpropagation.

        g = mean over the pairs of  eps (L(theta + eps) - L(theta - eps)) / (2 sigma^2),
        eps ~ N(0, sigma^2 I), all losses on one batch,

    drawn by the key of the loss; its value stays L(theta).
    """

    @jax.custom_vjp
    def loss(params, key, batch):
        return task.loss(params, key, batch)

    def forward(params, key, batch):
        loss_key, *pair_keys = jax.random.split(key, pairs + 1)

        def one(key):
            leaves, tree = jax.tree.flatten(params)
            keys = jax.random.split(key, len(leaves))
            eps = tree.unflatten(
                sigma * jax.random.normal(k, x.shape)
                for k, x in zip(keys, leaves, strict=True)
            )
            up, down = (
                task.loss(
                    jax.tree.map(lambda p, e, s=s: p + s * e, params, eps),
                    loss_key,
                    batch,
                )
                for s in (1, -1)
            )
            return perturbed_difference(up, down, eps, sigma)

        grads = batching()(one)(jnp.stack(pair_keys))
        value = task.loss(params, key, batch)
        return value, jax.tree.map(lambda g: g.mean(0), grads)

    def backward(grads, cotangent):
        return jax.tree.map(lambda g: cotangent * g, grads), None, None

    loss.defvjp(forward, backward)
    return task._replace(loss=loss)


def by_class(splits: dict[str, Split]) -> dict[str, jax.Array]:
    """Each split's images as (classes, n, h, w, c) uint8, n that of the rarest class."""

    def arrange(split):
        labels = np.asarray(split.labels)
        n = np.bincount(labels, minlength=CLASSES).min()
        rows = [np.flatnonzero(labels == c)[:n] for c in range(CLASSES)]
        return split.images[np.stack(rows)]

    return {name: arrange(split) for name, split in splits.items()}


def class_family(
    images: dict,
    key: jax.Array,
    hidden: tuple[int, ...],
    batch_size: int = BATCH_SIZE,
    classes: int = 5,
) -> Task:
    """A member of a family, drawn by the key: which `classes` of the ten, in which order.

    In place of Metz et al. 2019, D.2 (ten-way subsets of 700 classes of ImageNet): no
    network can know beforehand what an output means. images: as `by_class` has them.
    """
    # apart from the children that init draws
    member_key = jax.random.fold_in(key, 1000)
    chosen = jax.random.permutation(member_key, CLASSES)[:classes]

    def draw(key, split):
        bits = jax.random.bits(key, (2, batch_size))
        labels = (bits[0] % classes).astype(jnp.int32)
        rows = (bits[1] % images[split].shape[1]).astype(jnp.int32)
        return to_batch(Split(images[split][chosen[labels], rows], labels))

    per_class = images["test"].shape[1]
    test = Split(
        images["test"][chosen].reshape(-1, *images["test"].shape[2:]),
        jnp.repeat(jnp.arange(classes), per_class),
    )
    network = mlp(test.images.shape[1:], classes, hidden)
    return classifier(draw, test, network, classes)


def quadratic() -> Task:
    """The paper's noisy quadratic model (equation 4) as a task: two parameters.

    loss = (phi - xi)' H (phi - xi) / 2 with xi ~ N(0, I), phi_0 ~ N(0, 10 I) (B.1).
    """
    h = jnp.asarray(nqm.H, jnp.float32)
    return Task(
        init=lambda key: math.sqrt(10) * jax.random.normal(key, (2,)),
        batch=lambda key, split: jax.random.normal(key, (2,)),
        loss=lambda phi, key, xi: nqm.loss(phi, xi, h),
        evaluate=lambda phi: {"test_loss": 0.5 * (phi @ h @ phi + jnp.trace(h))},
        loss_limit=1000.0,
    )


def deterministic(problem: problems.Problem) -> Task:
    """A problem without data as a task: its batches are empty, its test loss its loss."""
    return Task(
        init=problem.init,
        batch=lambda key, split: (),
        loss=lambda params, key, batch: problem.loss(params),
        evaluate=lambda params: {"test_loss": problem.loss(params)},
        loss_limit=problem.loss_limit,
    )
