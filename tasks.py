"""The inner problems: what a learned optimizer trains, each as a few pure functions.

The image tasks follow section 5.3 and appendix B.2 of the STAR paper and the conventions
of the task suite it uses: pixels / 255, truncated-normal fan-in weights (not rescaled for
the truncation), zero biases, mean cross-entropy, the first 80 % of the training set for
the inner training. Batches are drawn with replacement, by the key alone.

    spec = TASKS["fmnist"]
    data, about = spec.load("auto", None)   # arrays on the device, and what they are
    task = spec.build(data, key)            # inside or outside of jit; data may be traced

The key draws a member where the name stands for a family of tasks; others ignore it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data as datasets
import nqm
import problems


class Task(NamedTuple):
    init: Callable  # key -> params
    batch: Callable  # (key, split) -> batch; split: "train" | "valid" | "test"
    loss: (
        Callable  # (params, key, batch) -> () in nats; key for dropout, unused by most
    )
    evaluate: Callable  # params -> dict of scalars, over the whole test split
    loss_limit: float  # the meta-loss clips each step's loss here; nan counts as this


class TaskSpec(NamedTuple):
    load: Callable  # (source, data_dir) -> (data, about): pytree of arrays, dict for cards
    build: Callable  # (data, key) -> Task; the key draws a member of a family of tasks


class Split(NamedTuple):
    images: jax.Array  # (n, height, width, channels) uint8, on the device
    labels: jax.Array  # (n,) uint8


BATCH_SIZE = 128
CLASSES = 10


def split_images(images: datasets.Images, transform=lambda x: x) -> dict[str, Split]:
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


def sample(key, split: Split, size: int):
    """`size` examples, with replacement: images (B, h, w, c) float32 in [0, 1], labels.

    One draw of 32 bits modulo n: off uniform by at most n / 2^32, and half of the random
    bits that `jax.random.randint` takes.
    """
    bits = jax.random.bits(key, (size,), jnp.uint32)
    index = bits % jnp.uint32(len(split.labels))
    return split.images[index].astype(jnp.float32) / 255, split.labels[index]


def truncated_normal(key, shape, scale):
    return scale * jax.random.truncated_normal(key, -2, 2, shape)


def cross_entropy(logits, labels):
    """Mean over the batch of -log softmax(logits)[label], in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None].astype(jnp.int32), 1).mean()


def mlp_init(key, sizes) -> list[dict]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": truncated_normal(k, (n, m), 1 / math.sqrt(n)), "b": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp_apply(params, images):
    """Images (B, h, w, c) -> logits (B, classes); ReLU between the layers."""
    x = images.reshape(len(images), -1)
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"][None]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def classifier(draw, test: Split, init, apply, classes=CLASSES) -> Task:
    """Image classification with the network (init: key -> params, apply -> logits).

    draw: (key, split) -> (images (B, h, w, c) float32 in [0, 1], labels (B,)).
    """

    def loss(params, key, batch):
        images, labels = batch
        return cross_entropy(apply(params, images), labels)

    def evaluate(params):
        def chunk(split):
            logits = apply(params, split.images.astype(jnp.float32) / 255)
            right = (logits.argmax(1) == split.labels).mean()
            return cross_entropy(logits, split.labels), right

        chunks = math.gcd(len(test.labels), 10)
        parts = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), test)
        losses, right = jax.lax.map(chunk, parts)
        return {"test_loss": losses.mean(), "test_accuracy": right.mean()}

    return Task(init, draw, loss, evaluate, loss_limit=1.5 * math.log(classes))


def mlp_classifier(splits: dict[str, Split], hidden) -> Task:
    sizes = (math.prod(splits["train"].images.shape[1:]), *hidden, CLASSES)
    return classifier(
        lambda key, split: sample(key, splits[split], BATCH_SIZE),
        splits["test"],
        lambda key: mlp_init(key, sizes),
        mlp_apply,
    )


def by_class(splits: dict[str, Split]) -> dict[str, jax.Array]:
    """Each split's images as (classes, n, h, w, c) uint8, n that of the rarest class."""

    def arrange(split):
        labels = np.asarray(split.labels)
        n = np.bincount(labels, minlength=CLASSES).min()
        rows = [np.flatnonzero(labels == c)[:n] for c in range(CLASSES)]
        return split.images[np.stack(rows)]

    return {name: arrange(split) for name, split in splits.items()}


def class_family(images: dict[str, jax.Array], key, hidden, classes=5) -> Task:
    """A member of a family, drawn by the key: which `classes` of the ten, in which order.

    In place of Metz et al. 2019, D.2 (ten-way subsets of 700 classes of ImageNet): no
    network can know beforehand what an output means. images: as `by_class` has them.
    """
    member_key = jax.random.fold_in(
        key, 1000
    )  # apart from the children that init draws
    chosen = jax.random.permutation(member_key, CLASSES)[:classes]

    def draw(key, split):
        bits = jax.random.bits(key, (2, BATCH_SIZE))
        labels = (bits[0] % classes).astype(jnp.int32)
        rows = (bits[1] % images[split].shape[1]).astype(jnp.int32)
        return images[split][chosen[labels], rows].astype(jnp.float32) / 255, labels

    per_class = images["test"].shape[1]
    test = Split(
        images["test"][chosen].reshape(-1, *images["test"].shape[2:]),
        jnp.repeat(jnp.arange(classes), per_class),
    )
    sizes = (math.prod(test.images.shape[1:]), *hidden, classes)
    return classifier(draw, test, lambda key: mlp_init(key, sizes), mlp_apply, classes)


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


def _load_images(name: str, transform=lambda x: x, arrange=lambda splits: splits):
    def load(source="auto", data_dir=None) -> tuple[Any, dict]:
        images = getattr(datasets, name)(source, data_dir)
        about = {
            "dataset": images.name,
            "dataset_checksum": images.checksum,
            "stand_in": images.stand_in,
        }
        return arrange(split_images(images, transform)), about

    return load


def _load_nothing(source="auto", data_dir=None) -> tuple[Any, dict]:
    return {}, {
        "dataset": "drawn from its formula",
        "dataset_checksum": "",
        "stand_in": False,
    }


TASKS: dict[str, TaskSpec] = {
    "fmnist": TaskSpec(
        load=_load_images("fashion_mnist"),
        build=lambda data, key: mlp_classifier(data, (128, 128)),
    ),
    "fmnist_small": TaskSpec(
        load=_load_images("fashion_mnist", pool_to_8x8),
        build=lambda data, key: mlp_classifier(data, (32,)),
    ),
    "fmnist_classes": TaskSpec(
        load=_load_images("fashion_mnist", arrange=by_class),
        build=lambda data, key: class_family(data, key, (128, 128)),
    ),
    "fmnist_classes_small": TaskSpec(
        load=_load_images("fashion_mnist", pool_to_8x8, by_class),
        build=lambda data, key: class_family(data, key, (32,)),
    ),
    "mnist_small": TaskSpec(  # "FC 2x32 on 14x14 MNIST" of Metz et al. 2019, appendix F
        load=_load_images("mnist", lambda images: pool(images, 2)),
        build=lambda data, key: mlp_classifier(data, (32, 32)),
    ),
    "quadratic": TaskSpec(load=_load_nothing, build=lambda data, key: quadratic()),
    **{
        name: TaskSpec(
            _load_nothing, lambda data, key, make=make: deterministic(make(key))
        )
        for name, make in problems.PROBLEMS.items()
    },
}
