"""Small networks as pairs of pure functions, with the conventions of the task suite.

A `Network` is (init: key -> params, apply: (params, key, x) -> outputs); its params are
dicts and lists of float32 arrays, and the key is for dropout, which only the transformer
has. Sizes, initial values and layouts are those of the tasks of
google/learned_optimization, on which the STAR paper evaluates, because an optimizer that
reads parameters' values and tensors' shapes can tell the difference:

- weights are drawn from a normal distribution of scale 1 / sqrt(fan-in), cut at two
  standard deviations and not widened again: their standard deviation is 0.88 of the scale;
- biases are zero, embeddings have scale 1;
- images are (B, height, width, channels), kernels (height, width, in, out);
- batch norm always uses the statistics of the batch it sees, in tests too; its scale and
  offset are (1, ..., 1, C), so that a factored second moment takes them for matrices,
  while those of layer norm are (C,).

In comments: B batch, T tokens, C channels, V vocabulary, N heads, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CUT_STD = 0.87962566  # of a standard normal cut at +-2
NORM_EPS = 1e-5


class Network(NamedTuple):
    init: Callable  # key -> params
    apply: Callable  # (params, key, x) -> outputs


class Norm(NamedTuple):
    init: Callable  # (channels, ndim of what it is applied to) -> params
    apply: Callable  # (params, x) -> x normalised, scaled and shifted


# Layers.


def truncated_normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.truncated_normal(key, -2, 2, shape)


def dense_init(key: jax.Array, n: int, m: int, scale: float | None = None) -> dict:
    """Weights (n, m), truncated normal of scale 1 / sqrt(n) or as given; biases 0."""
    scale = 1 / math.sqrt(n) if scale is None else scale
    return {"w": truncated_normal(key, (n, m), scale), "b": jnp.zeros(m)}


def dense(params: dict, x: jax.Array) -> jax.Array:
    """(..., n) -> (..., m)."""
    y = x @ params["w"]
    return y + jnp.broadcast_to(params["b"], y.shape)


def conv_init(key: jax.Array, size: int, n: int, m: int, bias: bool = True) -> dict:
    """A square kernel (size, size, n, m); fan-in size * size * n."""
    scale = 1 / math.sqrt(size * size * n)
    w = truncated_normal(key, (size, size, n, m), scale)
    return {"w": w, "b": jnp.zeros(m)} if bias else {"w": w}


def conv(params: dict, x: jax.Array, stride: int = 1) -> jax.Array:
    """(B, h, w, n) -> (B, h / stride rounded up, likewise w, m): "same" padding.

    On a CPU as a matrix product, because there XLA's convolution and its gradient take
    ten times as long inside of a loop as outside (jax issue 12868), and all inner
    training is a loop.
    """
    on_cpu = jax.default_backend() == "cpu"
    y = (conv_as_product if on_cpu else conv_by_xla)(params["w"], x, stride)
    return y + jnp.broadcast_to(params["b"], y.shape) if "b" in params else y


def conv_by_xla(w: jax.Array, x: jax.Array, stride: int) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=layout)


def conv_as_product(w: jax.Array, x: jax.Array, stride: int) -> jax.Array:
    """Each position's window as a row, times the kernel as a matrix."""
    size, _, n, m = w.shape
    patches = jnp.concatenate(shifted(x, size, stride, 0), -1)  # (B, h, w, size^2 n)
    y = patches.reshape(-1, size * size * n) @ w.reshape(-1, m)
    return y.reshape(*patches.shape[:-1], m)


def max_pool(x: jax.Array, size: int = 3, stride: int = 2) -> jax.Array:
    """The largest of each window: (B, h, w, C) -> (B, h / stride, w / stride, C)."""
    return functools.reduce(jnp.maximum, shifted(x, size, stride, -jnp.inf))


def shifted(x: jax.Array, size: int, stride: int, fill: float) -> list:
    """The size * size pixels of every window, each pixel as (B, h', w', C).

    "Same" padding: h' = h / stride rounded up, the windows centred as well as they can be,
    the odd pixel of padding at the lower right.
    """
    reach = [(-(-n // stride) - 1) * stride for n in x.shape[1:3]]  # of the last window
    total = [max(r + size - n, 0) for r, n in zip(reach, x.shape[1:3], strict=True)]
    pads = [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)]
    x = jnp.pad(x, pads, constant_values=fill)
    return [
        x[:, i : i + reach[0] + 1 : stride, j : j + reach[1] + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]


def dropout_factors(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """What to multiply by: 0 with probability `rate`, else 1 / (1 - rate); mean 1."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def normalise(params: dict, x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """scale (x - mean) / sqrt(variance + 1e-5) + offset; the variance divides by n."""
    mean = x.mean(axes, keepdims=True)
    variance = x.var(axes, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + NORM_EPS)
    scale, offset = (jnp.broadcast_to(params[k], x.shape) for k in ("scale", "offset"))
    return y * scale + offset


def layer_norm(params: dict, x: jax.Array) -> jax.Array:
    """Over the channels of each position (Ba, Kiros and Hinton 2016)."""
    return normalise(params, x, -1)


def batch_norm(params: dict, x: jax.Array) -> jax.Array:
    """Over everything but the channels (Ioffe and Szegedy 2015), of this very batch."""
    return normalise(params, x, tuple(range(x.ndim - 1)))


def _scale_and_offset(shape: tuple[int, ...]) -> dict:
    return {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}


LAYER_NORM = Norm(lambda channels, ndim: _scale_and_offset((channels,)), layer_norm)
BATCH_NORM = Norm(
    lambda channels, ndim: _scale_and_offset((1,) * (ndim - 1) + (channels,)),
    batch_norm,
)


# Networks for images: shape is (height, width, channels) of one of them.


def mlp(
    shape: tuple[int, ...],
    outputs: int,
    hidden: tuple[int, ...],
    activation: Callable = jax.nn.relu,
    norm: Norm | None = None,
) -> Network:
    """Flattened images -> [dense, norm, activation] for each hidden -> dense."""
    sizes = (math.prod(shape), *hidden, outputs)

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        layers = [
            dense_init(k, n, m)
            for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        if norm is not None:
            for layer, m in zip(layers[:-1], hidden, strict=True):
                layer["norm"] = norm.init(m, 2)
        return layers

    def apply(params, key, images):
        x = images.reshape(len(images), -1)
        for layer in params[:-1]:
            x = dense(layer, x)
            x = x if norm is None else norm.apply(layer["norm"], x)
            x = activation(x)
        return dense(params[-1], x)

    return Network(init, apply)


def mlp_autoencoder(shape: tuple[int, ...], hidden: tuple[int, ...]) -> Network:
    """An MLP from the images to as many sigmoids; gives (B, height * width * channels)."""
    network = mlp(shape, math.prod(shape), hidden)

    def apply(params, key, images):
        return jax.nn.sigmoid(network.apply(params, key, images))

    return Network(network.init, apply)


def convnet(
    shape: tuple[int, ...],
    outputs: int,
    channels: tuple[int, ...] = (32, 64, 64),
    norm: Norm | None = None,
) -> Network:
    """[3x3 convolution, relu, norm] for each of channels -> mean over positions -> dense.

    The first has stride 2, the others 1. STAR, appendix B.2, with the mean that its text
    leaves out and its code has.
    """
    sizes = (shape[-1], *channels)

    def init(key):
        keys = jax.random.split(key, len(channels) + 1)
        layers = [
            conv_init(k, 3, n, m)
            for k, n, m in zip(keys[:-1], sizes[:-1], channels, strict=True)
        ]
        if norm is not None:
            for layer, m in zip(layers, channels, strict=True):
                layer["norm"] = norm.init(m, 4)
        return {"convs": layers, "out": dense_init(keys[-1], channels[-1], outputs)}

    def apply(params, key, x):
        for i, layer in enumerate(params["convs"]):
            x = jax.nn.relu(conv(layer, x, stride=1 if i else 2))
            x = x if norm is None else norm.apply(layer["norm"], x)
        return dense(params["out"], x.mean((1, 2)))  # (B, h, w, C) -> (B, C)

    return Network(init, apply)


def resnet(
    shape: tuple[int, ...],
    outputs: int,
    channels: tuple[int, ...] = (128, 256, 512, 512),
    first: int = 5,
) -> Network:
    """A pre-activation residual network with one bottleneck block for each of channels.

    He et al. 2016b: a block adds y to a shortcut s, both of a = relu(norm(x)),
        s = 1x1 convolution / stride,  y = 1x1, 3x3 / stride, 1x1 convolutions,
    with norm and relu between those of y and a quarter of the channels inside; strides
    1, 2, 2, ... In front a convolution of size `first` and stride 2 to 64 channels and a
    pooling of stride 2. Batch norm, no biases; the last layer starts at zero, so the first
    loss is ln(outputs) exactly.
    """

    def block_init(key, n, m):
        keys = jax.random.split(key, 4)
        inner = m // 4
        return {
            "norms": [BATCH_NORM.init(c, 4) for c in (n, inner, inner)],
            "shortcut": conv_init(keys[0], 1, n, m, bias=False),
            "convs": [
                conv_init(keys[1], 1, n, inner, bias=False),
                conv_init(keys[2], 3, inner, inner, bias=False),
                conv_init(keys[3], 1, inner, m, bias=False),
            ],
        }

    def block(params, x, stride):
        norms, convs = params["norms"], params["convs"]
        a = jax.nn.relu(batch_norm(norms[0], x))
        y = conv(convs[0], a)
        y = conv(convs[1], jax.nn.relu(batch_norm(norms[1], y)), stride)
        y = conv(convs[2], jax.nn.relu(batch_norm(norms[2], y)))
        return y + conv(params["shortcut"], a, stride)

    def init(key):
        keys = jax.random.split(key, len(channels) + 1)
        sizes = (64, *channels)
        return {
            "first": conv_init(keys[0], first, shape[-1], 64, bias=False),
            "blocks": [
                block_init(k, n, m)
                for k, n, m in zip(keys[1:], sizes[:-1], channels, strict=True)
            ],
            "norm": BATCH_NORM.init(channels[-1], 4),
            "out": {
                "w": jnp.zeros((channels[-1], outputs)),
                "b": jnp.zeros(outputs),
            },
        }

    def apply(params, key, x):
        x = max_pool(conv(params["first"], x, stride=2))
        for i, layer in enumerate(params["blocks"]):
            x = block(layer, x, stride=2 if i else 1)
        x = jax.nn.relu(batch_norm(params["norm"], x))
        return dense(params["out"], x.mean((1, 2)))

    return Network(init, apply)


# Language models: tokens (B, T) int32 -> logits (B, T, V) of the token after each.


def lstm(vocabulary: int, embedding: int = 128, hidden: int = 256) -> Network:
    """Embedding -> LSTM (Hochreiter and Schmidhuber 1997, forget gates of 2000) -> dense.

        z = [x, h] W + b, in four parts i, g, f, o
        c <- sigmoid(f + 1) c + sigmoid(i) tanh(g),  h <- sigmoid(o) tanh(c)

    The first h and c are learned, and start at zero.
    """

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "embedding": truncated_normal(keys[0], (vocabulary, embedding), 1.0),
            "cell": dense_init(keys[1], embedding + hidden, 4 * hidden),
            "h": jnp.zeros(hidden),
            "c": jnp.zeros(hidden),
            "out": dense_init(keys[2], hidden, vocabulary),
        }

    def apply(params, key, tokens):
        w_x, w_h = jnp.split(params["cell"]["w"], [embedding])
        x = params["embedding"][tokens.T]  # (T, B, E)
        # what comes from x needs no loop: one product for all tokens
        z_x = dense({"w": w_x, "b": params["cell"]["b"]}, x)  # (T, B, 4 H)
        start = [jnp.broadcast_to(params[k], (len(tokens), hidden)) for k in ("h", "c")]

        def step(carry, z_x):
            h, c = carry
            i, g, f, o = jnp.split(z_x + h @ w_h, 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        _, h = jax.lax.scan(step, tuple(start), z_x)  # (T, B, H)
        return dense(params["out"], h.swapaxes(0, 1))

    return Network(init, apply)


def transformer(
    vocabulary: int,
    width: int = 256,
    layers: int = 5,
    heads: int = 8,
    head_size: int = 32,
    rate: float = 0.1,
) -> Network:
    """A decoder-only transformer, layer norm in front of each part (Vaswani et al. 2017).

        h <- h + drop(attention(norm(h)))          causal, logits q k / sqrt(head_size)
        h <- h + drop(W gelu(V norm(h)))           four times the width inside

    for each layer, then a last norm and a dense layer. As the task suite has it: no
    positions (order reaches the logits only through the causal mask), dropout always on,
    weights inside of the layers with variance 2 / (layers * fan-in).
    """

    def block_init(key):
        keys = iter(jax.random.split(key, 6))

        def linear(n, m):
            return dense_init(next(keys), n, m, math.sqrt(2 / layers / n) / CUT_STD)

        return {
            "norm1": LAYER_NORM.init(width, 3),
            **{name: linear(width, heads * head_size) for name in ("q", "k", "v")},
            "attended": linear(heads * head_size, width),
            "norm2": LAYER_NORM.init(width, 3),
            "up": linear(width, 4 * width),
            "down": linear(4 * width, width),
        }

    def init(key):
        keys = jax.random.split(key, layers + 2)
        return {
            "embedding": truncated_normal(keys[0], (vocabulary, width), 1.0),
            "blocks": [block_init(k) for k in keys[1:-1]],
            "norm": LAYER_NORM.init(width, 3),
            "out": dense_init(keys[-1], width, vocabulary),
        }

    def attention(params, x):
        b, t, _ = x.shape
        q, k, v = (
            dense(params[name], x).reshape(b, t, heads, head_size) for name in "qkv"
        )
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) / math.sqrt(head_size)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e30))  # (B, N, T, T)
        mixed = jnp.einsum("bnts,bsnd->btnd", weights, v)
        return dense(params["attended"], mixed.reshape(b, t, -1))

    def apply(params, key, tokens):
        h = params["embedding"][tokens]  # (B, T, D)
        drop = dropout_factors(key, (layers, 2, *h.shape), rate)  # all in one draw
        for i, layer in enumerate(params["blocks"]):
            h += drop[i, 0] * attention(layer, layer_norm(layer["norm1"], h))
            inside = jax.nn.gelu(dense(layer["up"], layer_norm(layer["norm2"], h)))
            h += drop[i, 1] * dense(layer["down"], inside)
        return dense(params["out"], layer_norm(params["norm"], h))

    return Network(init, apply)
