"""Kinds of tasks in the suite beside the classification of images in tasks.py.

Each is a `Task` of pure functions, and catalogue.py gives it a name. Batches are drawn with
replacement, by the key alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from devices import each
from tasks import Network, Split, Task, cross_entropy, measured, to_batch

# In front of the 256 bytes: padding, end, unknown. None of them occurs.
SPECIAL_TOKENS = 3
VOCABULARY = SPECIAL_TOKENS + 256
TEST_WINDOWS = 500  # of text, spread over the test split


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """(n, h, w, C) uint8 -> (n, size, size, C) uint8, bilinear, without antialiasing.

    As tf.image.resize, which the task suite uses. Deviation: the result is rounded to whole
    grey levels, by half a level (0.002 of the range) at most.
    """

    def one(block):
        shape = len(block), size, size, block.shape[-1]
        small = jax.image.resize(np.float32(block), shape, "linear", antialias=False)
        return np.round(small).astype(np.uint8)

    blocks = np.split(images, range(1000, len(images), 1000))  # bounds the memory
    return np.concatenate([one(block) for block in blocks])


def squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch and the classes of (logit - one-hot label)^2.

    The suite clips this loss at 1 and multiplies it by 10. Here it is clipped at 1 alone.
    """
    return jnp.square(logits - jax.nn.one_hot(labels, logits.shape[-1])).mean()


def autoencoder(draw, test: Split, network: Network) -> Task:
    """Reconstruction of images in [0, 1]: mean squared error over pixels and batch.

    draw: (key, split) -> (images (B, h, w, C), labels). network: images -> logits of the
    pixels (B, h * w * C).
    """

    def measure(params, key, batch):
        images, _ = batch
        out = jax.nn.sigmoid(network.apply(params, key, images))
        return {"loss": jnp.square(images.reshape(out.shape) - out).mean()}

    return measured(network.init, draw, measure, test, to_batch, loss_limit=1.0)


def excerpts(stream: jax.Array, starts: jax.Array, length: int) -> tuple:
    """Bytes (n,), starts (B,) -> tokens (B, length) int32 and the ones after each."""
    bytes_ = stream[starts[:, None] + jnp.arange(length + 1)[None]]
    tokens = bytes_.astype(jnp.int32) + SPECIAL_TOKENS
    return tokens[:, :-1], tokens[:, 1:]


def language_model(streams: dict, network: Network, length: int, size: int) -> Task:
    """Next-byte prediction: mean cross-entropy in nats over all positions of a batch.

    streams: the bytes of each split, (n,) uint8. Tokens are byte + 3, V = 259. size: of a
    batch. Deviation: the suite takes the first `length` + 1 tokens of each sentence of the
    One Billion Word benchmark and pads short ones. Here a window starts anywhere in a
    stream of text. Nothing is padded, and few windows start with a sentence. The suite does
    not clip the loss of such tasks. Here the meta-loss clips it at 1.5 ln 259.
    """

    def draw(key, split):
        stream = streams[split]
        bits = jax.random.bits(key, (size,), jnp.uint32)
        starts = bits % jnp.uint32(len(stream) - length)
        return excerpts(stream, starts.astype(jnp.int32), length)

    def measure(params, key, batch):
        tokens, following = batch
        logits = network.apply(params, key, tokens).reshape(-1, VOCABULARY)
        labels = following.reshape(-1)  # (B, T) -> (B T,)
        accuracy = (logits.argmax(-1) == labels).mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}

    def as_batch(starts):
        return excerpts(streams["test"], starts, length)

    last = len(streams["test"]) - length - 1
    starts = jnp.asarray(np.linspace(0, last, TEST_WINDOWS).astype(np.int32))
    limit = 1.5 * math.log(VOCABULARY)
    return measured(network.init, draw, measure, starts, as_batch, limit)


def es_gradient(task: Task, pairs: int, sigma: float = 0.01) -> Task:
    """The same task with a gradient by evolution strategies instead of backpropagation.

        g = mean over the pairs of  eps (L(phi + eps) - L(phi - eps)) / (2 sigma^2),
        eps ~ N(0, sigma^2 I), all losses on one batch

    The key of the loss draws eps. The value of the loss stays L(phi).
    """

    @jax.custom_vjp
    def loss(params, key, batch):
        return task.loss(params, key, batch)

    def forward(params, key, batch):
        loss_key, *pair_keys = jax.random.split(key, pairs + 1)
        leaves, tree = jax.tree.flatten(params)

        def one(key):
            keys = jax.random.split(key, len(leaves))
            eps = [
                sigma * jax.random.normal(k, x.shape)
                for k, x in zip(keys, leaves, strict=True)
            ]

            def loss_at(sign):
                moved = [x + sign * e for x, e in zip(leaves, eps, strict=True)]
                return task.loss(tree.unflatten(moved), loss_key, batch)

            difference = (loss_at(1) - loss_at(-1)) / (2 * sigma**2)
            return tree.unflatten(e * difference for e in eps)

        grads = each()(one)(jnp.stack(pair_keys))
        value = task.loss(params, key, batch)
        return value, jax.tree.map(lambda g: g.mean(0), grads)

    def backward(grads, cotangent):
        return jax.tree.map(lambda g: cotangent * g, grads), None, None

    loss.defvjp(forward, backward)
    return task._replace(loss=loss)
