"""The inner problems: what a learned optimizer trains, each as a few pure functions.

    python tasks.py     lists them: parameters, work of a step, data, what they stand for

The tasks follow section 5.3 and appendix B of the STAR paper and the conventions of the
task suite it uses, google/learned_optimization: pixels / 255, never augmented; the first
80 % of the training set for the inner training; mean cross-entropy. Networks and initial
values are in `networks.py`. Batches are drawn with replacement, by the key alone.

    spec = TASKS["fmnist"]
    data, about = spec.load("auto", None)   # arrays on the device, and what they are
    task = spec.build(data, key)            # inside or outside of jit; data may be traced

The key draws a member where the name stands for a family of tasks; others ignore it.
SUITES holds two lists of sixteen names: tasks of that suite which span the families of
the paper's figures App.5 and App.6, whose own list its text does not give.

Deviations: CIFAR-100 in place of ImageNet, whose pictures may not be passed on, and bytes
of any text in place of the One Billion Word benchmark (see `language_model`).
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data as datasets
import nqm
from estimators import perturbed_difference
from inner import batching
from networks import (
    BATCH_NORM,
    LAYER_NORM,
    Network,
    convnet,
    lstm,
    mlp,
    mlp_autoencoder,
    resnet,
    transformer,
)


class Task(NamedTuple):
    init: Callable  # key -> params
    batch: Callable  # (key, split) -> batch; split: "train" | "valid" | "test"
    # (params, key, batch) -> (), of cross-entropies in nats; key: for dropout, ES
    loss: Callable
    evaluate: Callable  # params -> dict of scalars, over the test split
    loss_limit: float  # the meta-loss clips each step's loss here; nan counts as this


class TaskSpec(NamedTuple):
    load: Callable  # (source, data_dir) -> (data, about): pytree of arrays, dict for cards
    build: (
        Callable  # (data, key, batch_size=its own) -> Task; key: of a family's member
    )
    like: Callable  # () -> data of the same shapes, only fewer and zero, without files
    dataset: str
    stands_for: str  # the task of google/learned_optimization, or the source
    passes: int = 3  # evaluations of the loss that one gradient is worth


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


def to_batch(split: Split):
    """Images (B, h, w, c) float32 in [0, 1], labels (B,) uint8."""
    return split.images.astype(jnp.float32) / 255, split.labels


def sample(key, split: Split, size: int):
    """`size` examples, with replacement, as `to_batch` gives them.

    One draw of 32 bits modulo n: off uniform by at most n / 2^32, and half of the random
    bits that `jax.random.randint` takes.
    """
    bits = jax.random.bits(key, (size,), jnp.uint32)
    index = bits % jnp.uint32(len(split.labels))
    return to_batch(Split(split.images[index], split.labels[index]))


def windows(stream, starts, length: int):
    """Bytes (n,), starts (B,) -> tokens (B, length) int32 and the ones after each."""
    bytes_ = stream[starts[:, None] + jnp.arange(length + 1)[None]]
    tokens = bytes_.astype(jnp.int32) + SPECIAL_TOKENS
    return tokens[:, :-1], tokens[:, 1:]


# Kinds of tasks.


def cross_entropy(logits, labels):
    """Mean over the batch of -log softmax(logits)[label], in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None].astype(jnp.int32), 1).mean()


def squared_error(logits, labels):
    """Mean over the batch and the classes of (logit - one-hot label)^2."""
    return jnp.square(logits - jax.nn.one_hot(labels, logits.shape[-1])).mean()


def accuracy(logits, labels):
    return (logits.argmax(-1) == labels).mean()


def measured(init, draw, measure, test, as_batch, loss_limit) -> Task:
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
    draw,
    test: Split,
    network: Network,
    classes=CLASSES,
    error=cross_entropy,
    loss_limit=None,
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


def autoencoder(draw, test: Split, network: Network) -> Task:
    """Reconstruction of images in [0, 1]: mean squared error over pixels and batch."""

    def measure(params, key, batch):
        images, _ = batch
        out = network.apply(params, key, images)
        return {"loss": jnp.square(images.reshape(out.shape) - out).mean()}

    return measured(network.init, draw, measure, test, to_batch, loss_limit=1.0)


def language_model(streams: dict, network: Network, length: int, batch_size: int):
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


def class_family(images: dict, key, hidden, batch_size=BATCH_SIZE, classes=5) -> Task:
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


# The table.


def _load_nothing(source="auto", data_dir=None) -> tuple[Any, dict]:
    return {}, {
        "dataset": "drawn from its formula",
        "dataset_checksum": "",
        "stand_in": False,
    }


def _images(dataset, transform=lambda x: x, arrange=lambda splits: splits):
    """(load, like) of a TaskSpec: what `arrange` makes of the splits of a data set."""
    shape, classes = IMAGES[dataset]

    def load(source="auto", data_dir=None) -> tuple[Any, dict]:
        images = getattr(datasets, dataset)(source, data_dir)
        return arrange(split_images(images, transform)), datasets.about(images)

    def like():
        labels = (np.arange(10 * classes) % classes).astype(np.uint8)
        images = np.zeros((len(labels), *shape), np.uint8)
        arrays = (images, labels, images, labels)
        blank = datasets.Images(*arrays, classes, "blank", "", True)
        return arrange(split_images(blank, transform))

    return load, like


def _image_task(
    dataset,
    make,
    stands_for,
    size=None,
    batch_size=BATCH_SIZE,
    transform=None,
    passes=3,
) -> TaskSpec:
    """make: (draw, test split, classes) -> Task. size: resized to, None: as they are."""
    if transform is None:
        transform = (lambda x: x) if size is None else partial(resize, size=size)
    load, like = _images(dataset, transform)

    def build(data, key, batch_size=batch_size):
        def draw(key, split):
            return sample(key, data[split], batch_size)

        return make(draw, data["test"], IMAGES[dataset][1])

    return TaskSpec(load, build, like, dataset, stands_for, passes)


def _classify(network, error=cross_entropy, loss_limit=None, **sizes) -> Callable:
    def make(draw, test, classes):
        fitted = network(test.images.shape[1:], classes, **sizes)
        return classifier(draw, test, fitted, classes, error, loss_limit)

    return make


def _reconstruct(hidden) -> Callable:
    def make(draw, test, classes):
        return autoencoder(draw, test, mlp_autoencoder(test.images.shape[1:], hidden))

    return make


def _es_task(dataset, make, pairs, stands_for, size=None) -> TaskSpec:
    return _image_task(
        dataset,
        lambda *args: es_gradient(make(*args), pairs),
        stands_for,
        size,
        passes=1 + 2 * pairs,
    )


def _text_task(network, length, batch_size, stands_for) -> TaskSpec:
    def load(source="auto", data_dir=None) -> tuple[Any, dict]:
        text = datasets.text(source, data_dir)
        streams = {k: jnp.asarray(getattr(text, k)) for k in ("train", "valid", "test")}
        return streams, datasets.about(text)

    def build(data, key, batch_size=batch_size):
        return language_model(data, network, length, batch_size)

    def like():
        return {k: jnp.zeros(1000, jnp.uint8) for k in ("train", "valid", "test")}

    return TaskSpec(load, build, like, "text", stands_for)


def _family(hidden, stands_for, transform=lambda x: x) -> TaskSpec:
    def build(data, key, batch_size=BATCH_SIZE):
        return class_family(data, key, hidden, batch_size)

    load, like = _images("fashion_mnist", transform, by_class)
    return TaskSpec(load, build, like, "fashion_mnist", stands_for)


MLP3 = {"hidden": (128, 128, 128)}

TASKS: dict[str, TaskSpec] = {
    "fmnist": _image_task(
        "fashion_mnist",
        _classify(mlp, hidden=(128, 128)),
        "ImageMLP_FashionMnist_Relu128x128 (STAR, 5.3)",
    ),
    "fmnist_small": _image_task(
        "fashion_mnist",
        _classify(mlp, hidden=(32,)),
        "small form of fmnist",
        transform=pool_to_8x8,
    ),
    "cifar10_conv": _image_task(
        "cifar10", _classify(convnet), "Conv_Cifar10_32x64x64 (STAR, 5.3)"
    ),
    "cifar10_conv_small": _image_task(
        "cifar10",
        _classify(convnet),
        "cifar10_conv on 8x8 pixels, 64 a batch",
        size=8,
        batch_size=64,
    ),
    "fmnist_classes": _family((128, 128), "fmnist, five classes of ten in any order"),
    "fmnist_classes_small": _family(
        (32,), "fmnist_small, five classes of ten in any order", pool_to_8x8
    ),
    "mnist_small": _image_task(
        "mnist",
        _classify(mlp, hidden=(32, 32)),
        "FC 2x32 on 14x14 MNIST (Metz et al. 2019, F)",
        transform=partial(pool, block=2),
    ),
    "quadratic": TaskSpec(
        load=_load_nothing,
        build=lambda data, key, batch_size=1: quadratic(),
        like=dict,
        dataset="-",
        stands_for="noisy quadratic model (STAR, equation 4)",
    ),
    # The other tasks of the suites.
    "mlp_c10": _image_task(
        "cifar10", _classify(mlp, **MLP3), "ImageMLP_Cifar10_128x128x128_Relu"
    ),
    "mlp_c10_wide": _image_task(
        "cifar10",
        _classify(mlp, hidden=(1024, 1024)),
        "ImageMLP_Cifar10_1024x1024_Relu",
    ),
    "mlp_c10_wide_small": _image_task(
        "cifar10",
        _classify(mlp, hidden=(256, 256)),
        "ImageMLP_Cifar10_256x256_Relu on 16x16 pixels",
        size=16,
    ),
    "mlp_c10_tanh": _image_task(
        "cifar10",
        _classify(mlp, activation=jnp.tanh, **MLP3),
        "ImageMLP_Cifar10_128x128x128_Tanh_bs128",
    ),
    "mlp_c10_layernorm": _image_task(
        "cifar10",
        _classify(mlp, norm=LAYER_NORM, **MLP3),
        "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu",
    ),
    "mlp_c10_batchnorm": _image_task(
        "cifar10",
        _classify(mlp, norm=BATCH_NORM, **MLP3),
        "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu",
    ),
    "mlp_c10_mse": _image_task(
        "cifar10",
        _classify(mlp, squared_error, 1.0, **MLP3),
        "ImageMLP_Cifar10_128x128x128_Relu_MSE",
    ),
    "mlp_mnist": _image_task(
        "mnist", _classify(mlp, **MLP3), "ImageMLP_Mnist_128x128x128_Relu"
    ),
    "ae_fmnist": _image_task(
        "fashion_mnist",
        _reconstruct((128, 32, 128)),
        "ImageMLPAE_FashionMnist_128x32x128_bs128",
    ),
    "ae_c10": _image_task(
        "cifar10",
        _reconstruct((256, 256, 256)),
        "ImageMLPAE_Cifar10_256x256x256_bs128",
    ),
    "ae_c10_small": _image_task(
        "cifar10", _reconstruct((32, 32, 32)), "ImageMLPAE_Cifar10_32x32x32_bs128"
    ),
    "conv_c10_layernorm": _image_task(
        "cifar10",
        _classify(convnet, norm=LAYER_NORM),
        "Conv_Cifar10_32x64x64_layernorm",
    ),
    "conv_c10_layernorm_small": _image_task(
        "cifar10",
        _classify(convnet, norm=LAYER_NORM),
        "conv_c10_layernorm on 8x8 pixels, 64 a batch",
        size=8,
        batch_size=64,
    ),
    "conv_c100": _image_task("cifar100", _classify(convnet), "Conv_Cifar100_32x64x64"),
    "conv_c100_small": _image_task(
        "cifar100",
        _classify(convnet),
        "conv_c100 on 8x8 pixels, 64 a batch",
        size=8,
        batch_size=64,
    ),
    "resnet_c100": _image_task(
        "cifar100",
        _classify(resnet),
        "Resnet_MultiRuntime_5, ImageNet at 32x32 replaced by CIFAR-100",
    ),
    "resnet_c100_small": _image_task(
        "cifar100",
        _classify(resnet, channels=(64, 128, 128, 128), first=3),
        "Resnet_MultiRuntime_2, ImageNet at 16x16 replaced by CIFAR-100",
        size=16,
        batch_size=64,
    ),
    "lstm": _text_task(
        lstm(VOCABULARY, embedding=128, hidden=256),
        length=32,
        batch_size=128,
        stands_for="RNNLM_lm1bbytes_Patch32_LSTM256_Embed128 on other text",
    ),
    "lstm_small": _text_task(
        lstm(VOCABULARY, embedding=32, hidden=64),
        length=32,
        batch_size=32,
        stands_for="RNNLM as above, LSTM64, embedding 32, 32 a batch",
    ),
    "transformer": _text_task(
        transformer(VOCABULARY, width=256, layers=5, heads=8),
        length=128,
        batch_size=32,
        stands_for="TransformerLM_LM1B_5layer_256width on bytes of other text",
    ),
    "transformer_small": _text_task(
        transformer(VOCABULARY, width=64, layers=3, heads=2),
        length=32,
        batch_size=8,
        stands_for="TransformerLM as above, 3 layers, width 64, 8 x 32 a batch",
    ),
    "es_mlp": _es_task(
        "cifar10",
        _classify(mlp, **MLP3),
        8,
        "ESWrapped_8pair_ImageMLP_Cifar10_128x128x128_Relu",
    ),
    "es_mlp_small": _es_task(
        "fashion_mnist",
        _classify(mlp, hidden=(32,)),
        1,
        "ESWrapped_1pair_ImageMLP_FashionMnist8_Relu32",
        size=8,
    ),
}

FULL = (
    "mlp_c10",
    "mlp_c10_wide",
    "mlp_c10_tanh",
    "mlp_c10_layernorm",
    "mlp_c10_batchnorm",
    "mlp_c10_mse",
    "mlp_mnist",
    "ae_fmnist",
    "ae_c10",
    "cifar10_conv",
    "conv_c10_layernorm",
    "conv_c100",
    "resnet_c100",
    "lstm",
    "transformer",
    "es_mlp",
)
SUITES: dict[str, tuple[str, ...]] = {
    # what a CPU does in 20 ms a step: the small form where there is one
    "small": tuple(f"{n}_small" if f"{n}_small" in TASKS else n for n in FULL),
    "full": FULL,
}


# The list: python tasks.py


def multiply_adds(jaxpr) -> int:
    """Of the matrix products and convolutions in a jaxpr, those of loops by their length.

    A `while` and each branch of a `cond` count once; padding counts as pixels do.
    """
    total = 0
    for eqn in jaxpr.eqns:
        out = math.prod(getattr(eqn.outvars[0].aval, "shape", ()))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += out * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += out * math.prod(kernel) // outputs
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            inside = jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            total += times * sum(multiply_adds(x) for x in inside if hasattr(x, "eqns"))
    return total


def measure_task(spec: TaskSpec) -> tuple[int, float]:
    """(parameters, GFLOP of a gradient): nothing is computed but shapes.

    Two operations a multiply-add, in the matrix products and convolutions alone, and
    backpropagation taken for two more evaluations of the loss.
    """

    def start(data, key):
        task = spec.build(data, key)
        return task.init(key), task.batch(key, "train")

    data, key = spec.like(), jax.random.key(0)
    params, batch = jax.eval_shape(start, data, key)
    loss = jax.make_jaxpr(spec.build(data, key).loss)(params, key, batch)
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    return count, 2e-9 * spec.passes * multiply_adds(loss)


def main(argv=None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    print(f"{'task':24} {'parameters':>10} {'GFLOP/step':>10}  {'data':13}  stands for")
    for name, spec in TASKS.items():
        count, gflop = measure_task(spec)
        print(
            f"{name:24} {count:10,} {gflop:10.3g}  {spec.dataset:13}  {spec.stands_for}"
        )
    for name, names in SUITES.items():
        print(f"\nsuite {name}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
