"""Networks of the suite's tasks beside those of tasks.py, as pairs of pure functions.

Sizes, initial values and layouts are those of the tasks of google/learned_optimization, on
which the STAR paper evaluates. They matter, since an optimizer that reads values and shapes
of tensors can tell the difference. Weights are truncated normal as in tasks.py, and biases
0. Embeddings have scale 1. Batch norm always uses the statistics of its batch, in
tests too. Its scale and offset are (1, ..., 1, C), and a factored second moment takes them
for matrices. Those of layer norm are (C,). A network's key is for dropout. In comments:
B batch, T tokens, C channels, V vocabulary, W width of a hidden layer, E of an embedding.
"""

import functools
import math

import jax
import jax.numpy as jnp

import tasks
from tasks import Network, conv, conv_init, dense, dense_init, truncated_normal, windows

CUT_STD = 0.87962566  # of a standard normal cut at +-2


def norm_params(*shape: int) -> dict:
    return {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}


def norm(params: dict, x: jax.Array) -> jax.Array:
    """scale (x - mean) / sqrt(variance + 1e-5) + offset. The variance divides by n.

    A scale of (C,) gives layer norm, over the channels of each position (Ba, Kiros and
    Hinton 2016). A scale of (1, ..., 1, C) gives batch norm, over everything but the
    channels, of this very batch (Ioffe and Szegedy 2015).
    """
    axes = -1 if params["scale"].ndim == 1 else tuple(range(x.ndim - 1))
    scale, offset = (jnp.broadcast_to(params[k], x.shape) for k in ("scale", "offset"))
    variance = x.var(axes, keepdims=True)
    return scale * jax.nn.standardize(x, axes, variance=variance) + offset


def max_pool(x: jax.Array, size: int = 3, stride: int = 2) -> jax.Array:
    """The largest of each window: (B, h, w, C) -> (B, h / stride, w / stride, C)."""
    return functools.reduce(jnp.maximum, windows(x, size, stride, -jnp.inf))


def dropout_factors(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Factors of mean 1: 0 with probability `rate`, else 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


# Networks for images: shape is (height, width, channels) of one of them.


def mlp(shape, outputs, hidden, activation=jax.nn.relu, norm_init=None) -> Network:
    """`tasks.mlp` with another activation, or with a norm in front of each.

    norm_init: the width of a hidden layer -> params of its norm.
    """
    plain = tasks.mlp(shape, outputs, hidden)

    def init(key):
        layers = plain.init(key)
        for layer, width in zip(layers, hidden if norm_init else (), strict=False):
            layer["norm"] = norm_init(width)
        return layers

    def apply(params, key, images):
        x = images.reshape(len(images), -1)
        for layer in params[:-1]:
            x = dense(layer, x)
            x = activation(norm(layer["norm"], x) if norm_init else x)
        return dense(params[-1], x)

    return Network(init, apply)


def convnet_layernorm(shape: tuple, outputs: int) -> Network:
    """`tasks.convnet` with layer norm after each relu."""
    plain = tasks.convnet(shape, outputs)

    def init(key):
        params = plain.init(key)
        convs = [c | {"norm": norm_params(len(c["b"]))} for c in params["convs"]]
        return params | {"convs": convs}

    def apply(params, key, x):
        for i, layer in enumerate(params["convs"]):
            x = norm(layer["norm"], jax.nn.relu(conv(layer, x, 1 if i else 2)))
        return dense(params["out"], x.mean((1, 2)))  # (B, h, w, C) -> (B, C)

    return Network(init, apply)


def resnet(shape, outputs, channels=(128, 256, 512, 512), first=5) -> Network:
    """A pre-activation residual network with one bottleneck block for each of channels.

    He et al. 2016b: a block adds y to a shortcut s, both of a = relu(norm(x)),
        s = 1x1 convolution / stride,  y = 1x1, 3x3 / stride, 1x1 convolutions.
    Norm and relu stand between those of y, which have a quarter of the channels. Strides
    are 1, 2, 2, ... In front are a convolution of size `first` and stride 2 to 64 channels
    and a pooling of stride 2. Norms are batch norms, and there are no biases. The last
    layer starts at zero, so the first loss is ln(outputs) exactly.
    """

    def kernel(key, size, n, m):
        return {"w": conv_init(key, size, n, m)["w"]}

    def block_init(key, n, m):
        inner = m // 4
        sizes = (1, n, m), (1, n, inner), (3, inner, inner), (1, inner, m)
        keys = jax.random.split(key, len(sizes))
        shortcut, *convs = (kernel(k, *s) for k, s in zip(keys, sizes, strict=True))
        norms = [norm_params(1, 1, 1, c) for c in (n, inner, inner)]
        return {"norms": norms, "shortcut": shortcut, "convs": convs}

    def block(params, x, stride):
        norms, convs = params["norms"], params["convs"]
        a = jax.nn.relu(norm(norms[0], x))
        y = conv(convs[0], a)
        y = conv(convs[1], jax.nn.relu(norm(norms[1], y)), stride)
        y = conv(convs[2], jax.nn.relu(norm(norms[2], y)))
        return y + conv(params["shortcut"], a, stride)

    def init(key):
        first_key, *keys = jax.random.split(key, len(channels) + 1)
        sizes = zip(keys, (64, *channels[:-1]), channels, strict=True)
        return {
            "first": kernel(first_key, first, shape[-1], 64),
            "blocks": [block_init(k, n, m) for k, n, m in sizes],
            "norm": norm_params(1, 1, 1, channels[-1]),
            "out": {"w": jnp.zeros((channels[-1], outputs)), "b": jnp.zeros(outputs)},
        }

    def apply(params, key, x):
        x = max_pool(conv(params["first"], x, stride=2))
        for i, layer in enumerate(params["blocks"]):
            x = block(layer, x, stride=2 if i else 1)
        return dense(params["out"], jax.nn.relu(norm(params["norm"], x)).mean((1, 2)))

    return Network(init, apply)


# Language models: tokens (B, T) int32 -> logits (B, T, V) of the token after each.


def lstm(vocabulary: int, embedding: int, hidden: int) -> Network:
    """Embedding -> LSTM (Hochreiter and Schmidhuber 1997, forget gates of 2000) -> dense.

        z = [x, h] w + b, in four parts i, g, f, o
        c <- sigmoid(f + 1) c + sigmoid(i) tanh(g),  h <- sigmoid(o) tanh(c)

    The first h and c are learned, and start at zero.
    """

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "embedding": truncated_normal(keys[0], (vocabulary, embedding), 1),
            "cell": dense_init(keys[1], embedding + hidden, 4 * hidden),
            "h": jnp.zeros(hidden),
            "c": jnp.zeros(hidden),
            "out": dense_init(keys[2], hidden, vocabulary),
        }

    def apply(params, key, tokens):
        w_x, w_h = jnp.split(params["cell"]["w"], [embedding])
        x = params["embedding"][tokens.T]  # (T, B, E)
        # What comes from x needs no loop, only one product for all tokens.
        z_x = dense({"w": w_x, "b": params["cell"]["b"]}, x)  # (T, B, 4 W)
        start = [jnp.broadcast_to(params[k], (len(tokens), hidden)) for k in ("h", "c")]

        def step(carry, z_x):
            h, c = carry
            i, g, f, o = jnp.split(z_x + h @ w_h, 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        _, h = jax.lax.scan(step, tuple(start), z_x)  # (T, B, W)
        return dense(params["out"], h.swapaxes(0, 1))

    return Network(init, apply)


def transformer(vocabulary, width, layers, heads, head_size=32, rate=0.1) -> Network:
    """A decoder-only transformer, layer norm in front of each part (Vaswani et al. 2017).

        h <- h + drop(attention(norm(h)))          causal, logits q k / sqrt(head_size)
        h <- h + drop(down gelu(up norm(h)))       four times the width inside

    These are a layer. A norm and a dense layer follow the last. As in the task suite, there
    are no positions: order reaches the logits only through the causal mask. Dropout is
    always on. Weights inside of the layers have variance 2 / (layers * fan-in).
    """
    inside = heads * head_size
    sizes = dict.fromkeys("qkv", (width, inside)) | {"attended": (inside, width)}
    sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}

    def block_init(key):
        params = {name: norm_params(width) for name in ("norm1", "norm2")}
        keys = jax.random.split(key, len(sizes))
        for k, (name, (n, m)) in zip(keys, sizes.items(), strict=True):
            w = truncated_normal(k, (n, m), layers * n / 2 * CUT_STD**2)
            params[name] = {"w": w, "b": jnp.zeros(m)}
        return params

    def init(key):
        first, *keys, last = jax.random.split(key, layers + 2)
        return {
            "embedding": truncated_normal(first, (vocabulary, width), 1),
            "blocks": [block_init(k) for k in keys],
            "norm": norm_params(width),
            "out": dense_init(last, width, vocabulary),
        }

    def attention(params, x):
        b, t, _ = x.shape
        shape = b, t, heads, head_size
        q, k, v = (dense(params[name], x).reshape(shape) for name in "qkv")
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) / math.sqrt(head_size)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e30))  # (B, heads, T, T)
        mixed = jnp.einsum("bnts,bsnd->btnd", weights, v)
        return dense(params["attended"], mixed.reshape(b, t, inside))

    def apply(params, key, tokens):
        h = params["embedding"][tokens]  # (B, T, W)
        drop = dropout_factors(key, (layers, 2, *h.shape), rate)  # all in one draw
        for i, layer in enumerate(params["blocks"]):
            h += drop[i, 0] * attention(layer, norm(layer["norm1"], h))
            x = jax.nn.gelu(dense(layer["up"], norm(layer["norm2"], h)))
            h += drop[i, 1] * dense(layer["down"], x)
        return dense(params["out"], norm(params["norm"], h))

    return Network(init, apply)
