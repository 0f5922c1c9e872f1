"""All tasks: sizes, first losses, gradients, and networks against plain loops."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from baselines import from_optax
from experiments import catalogue, kinds, networks
from experiments.catalogue import SUITES, TASKS

KEY = jax.random.key(0)
ADAM = from_optax(optax.adam, {"learning_rate": 1e-2})

# Parameters and GFLOP per step, from the closed forms of each architecture. The ResNets
# have 100 classes, not 1000 and 200 as the tasks that they stand for.
SIZES = """
fmnist 118282 0.0906    fmnist_small 2410 0.00182    cifar10_conv 56970 11.0
cifar10_conv_small 56970 0.345    cifar10_conv_16x16 56970 1.38    mlp_c10 427658 0.328
mlp_c10_wide 4206602 3.23    mlp_c10_wide_small 265226 0.203    mlp_c10_tanh 427658 0.328
mlp_c10_layernorm 428426 0.328    mlp_c10_batchnorm 428426 0.328
mlp_c10_mse 427658 0.328    mlp_mnist 134794 0.103    ae_fmnist 209968 0.16
ae_c10 1707776 1.31    ae_c10_small 201824 0.153    conv_c10_layernorm 57290 11.0
conv_c10_layernorm_small 57290 0.345    conv_c100 62820 11.0    conv_c100_small 62820 0.348
resnet_c100 1095716 5.63    resnet_c100_small 115684 0.176    lstm 494467 11.3
lstm_small 50083 0.253    transformer 4082179 106    transformer_small 183491 0.271
es_mlp 427658 1.86    es_mlp_small 2410 0.00182
"""
SIZES = {name: (int(n), float(x)) for name, n, x in np.reshape(SIZES.split(), (-1, 3))}


def all_close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def convolution(w, x, stride):
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", None, None, layout)


def normalised(x):
    x = x - x.mean(-1, keepdims=True)
    return x / ((x**2).mean(-1, keepdims=True) + 1e-5) ** 0.5


def batches(task, *seeds):
    return [task.batch(jax.random.key(seed), "train") for seed in seeds]


def task_of(name):
    data, _ = TASKS[name].load()
    return TASKS[name].build(data, KEY), data


@pytest.mark.heavy
def test_list_has_every_task_with_its_size(capsys):
    """Without any file: parameters exactly, the work of a step to 1 %, its meaning."""
    assert catalogue.main([]) == 0
    table, *suites = capsys.readouterr().out.split("\n\n")
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[1:]}
    assert set(rows) == set(TASKS) == set(catalogue.STANDS_FOR) and len(suites) == 2
    for name, (count, gflop) in SIZES.items():
        assert int(rows[name][0].replace(",", "")) == count, name
        assert float(rows[name][1]) == pytest.approx(gflop, rel=0.01), name


def test_suites_are_sixteen_tasks_each():
    """Every name is in the table. The small suite's stay below half a million."""
    for names in SUITES.values():
        assert len(set(names)) == 16 and set(names) <= set(TASKS)
    assert max(SIZES[name][0] for name in SUITES["small"]) < 500_000
    assert tuple(n.removesuffix("_small") for n in SUITES["small"]) == SUITES["full"]


def test_multiply_adds_counts_loops_and_kernels():
    """A product in a loop of 7 counts 7 times, a convolution outputs times window."""

    def f(x, w, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
        return jax.nn.relu(x).sum() + convolution(kernel, x[None, ..., None], 2)

    jaxpr = jax.make_jaxpr(f)(*map(jnp.ones, ((4, 6), (6, 6), (3, 3, 1, 5))))
    assert catalogue.multiply_adds(jaxpr) == 7 * 4 * 6 * 6 + 2 * 3 * 5 * 9


FIRST_LOSS = {"mlp_c10_mse": 0.105, "ae_fmnist": 0.17, "ae_c10_small": 0.07}
FIRST_LOSS |= dict.fromkeys(("conv_c100_small", "resnet_c100_small"), math.log(100))
FIRST_LOSS |= dict.fromkeys(("lstm_small", "transformer_small"), math.log(259))


@pytest.mark.heavy
@pytest.mark.parametrize("name", SUITES["small"])
def test_small_task_can_be_trained(name, use_stand_in):
    """The first loss is that of a guess, exactly so for the ResNet, whose last layer is
    zero. The limit is 1.5 ln(classes), or 1 for squared errors. Adam lowers the loss on
    eight examples, and every tensor moves."""
    task, data = task_of(name)
    expected = FIRST_LOSS.get(name, math.log(10))
    assert task.loss_limit == pytest.approx(1.5 * expected if expected > 1 else 1)

    @jax.jit
    def run(data):
        task = TASKS[name].build(data, KEY)
        batch = jax.tree.map(lambda x: x[:8], task.batch(KEY, "train"))
        small = task._replace(batch=lambda key, split: batch)
        setting = lambda key: small, ADAM, ADAM.init_theta(KEY)  # noqa: E731
        step = partial(tasks.inner_step, *setting)
        start = tasks.fresh(*setting[:2], KEY)
        end, losses = jax.lax.scan(step, start, jax.random.split(KEY, 40))
        return jax.tree.map(lambda a, b: (a != b).any(), start, end).params, losses

    moved, losses = run(data)
    near = {"resnet_c100_small": 1e-6}.get(name, 0.35 if expected > 1 else 0.6)
    assert losses[0] == pytest.approx(expected, rel=near)
    assert losses[-5:].mean() < (0.99 if name.startswith("es") else 0.9) * losses[0]
    assert all(jax.tree.leaves(moved))


def test_split_is_80_10_of_the_training_images(stand_in):
    """Train 80 %, valid 10 %, no picture in both, test untouched."""
    splits = [np.asarray(s.images) for s in tasks.split_images(stand_in).values()]
    n = len(stand_in.train_labels)
    assert [*map(len, splits)] == [0.8 * n, 0.1 * n, len(stand_in.test_labels)]
    train, valid, _ = ({x.tobytes() for x in images} for images in splits)
    assert train.isdisjoint(valid)


def test_batches_depend_on_the_key_alone(small_task):
    """Same key, same batch. Pictures are uint8 / 255 with their own labels."""
    build, data = small_task
    (x, y), (x2, y2), (other, _) = batches(build(data, KEY), 3, 3, 4)
    assert (x == x2).all() and (y == y2).all() and (x != other).any()
    split = map(np.asarray, data["train"])
    pairs = {(a.tobytes(), int(b)) for a, b in zip(*split, strict=True)}
    back = np.round(np.asarray(x) * 255).astype(np.uint8)
    assert all((a.tobytes(), int(b)) in pairs for a, b in zip(back, y, strict=True))


def test_quadratic_is_equation_4():
    """(phi - xi)' H (phi - xi) / 2 with xi ~ N(0, I). The test loss is its exact mean."""
    task, phi = tasks.quadratic({}, KEY), np.float32([0.7, -1.3])
    xis = jax.vmap(lambda key: task.batch(key, "train"))(jax.random.split(KEY, 20_000))
    losses = jax.vmap(lambda xi: task.loss(phi, KEY, xi))(xis)
    h, d = np.array([[1.11, 0.596], [0.596, 0.486]]), phi[None] - xis  # A.30
    all_close(losses, np.einsum("ni,ij,nj->n", d, h, d) / 2, 1e-4)
    exact = float(task.evaluate(phi)["test_loss"])
    assert exact == pytest.approx(0.5 * (phi @ h @ phi + np.trace(h)))
    assert abs(losses.mean() - exact) < 6 * losses.std() / np.sqrt(len(losses))


@pytest.mark.parametrize(
    "row, expected",
    [
        ([0, 10, 20, 40], [5, 30]),  # halves: means of two
        ([0, 8, 16, 90], [12]),  # quarters: the middle two of four, no mean of all
        ([0, 40, 80, 120, 160, 200, 240], [50, 190]),  # read at 1.25 and 4.75
        ([0, 100], [0, 25, 75, 100]),  # at -0.25, ..., 1.25, held at the borders
    ],
)
def test_resize_is_bilinear_at_half_pixels(row, expected):
    """Values worked out by hand, along both axes, with channels and images apart."""
    images, size = np.zeros((2, len(row), len(row), 3), np.uint8), len(expected)
    images[1, ..., 2] = row  # changes from left to right
    images[0, ..., 0] = np.asarray(row)[:, None]  # from top to bottom
    small = kinds.resize(images, size)
    assert small.dtype == np.uint8 and small.shape == (2, size, size, 3)
    np.testing.assert_array_equal(small[1, 0, :, 2], expected)
    np.testing.assert_array_equal(small[0, :, 0, 0], expected)
    assert not small[..., 1].any() and not small[0, ..., 2].any()


def test_text_excerpts_are_bytes_and_their_successors():
    """Token t + 1 follows token t, 3 above the byte. They start anywhere, by the key: the
    first byte and the last are drawn, nothing beyond."""
    streams = dict.fromkeys(("train", "test"), jnp.arange(7, dtype=jnp.uint8))
    task = kinds.language_model(streams, networks.lstm(259, 2, 2), 4, 200)
    (tokens, following), (again, _), (other, _) = batches(task, 1, 1, 2)
    assert tokens.shape == following.shape == (200, 4) and tokens.dtype == jnp.int32
    assert (np.diff(tokens) == 1).all() and (following == tokens + 1).all()
    assert (tokens == again).all() and (tokens != other).any()
    assert set(np.unique(tokens[:, 0])) == {3, 4, 5}


def test_text_is_evaluated_on_excerpts_that_span_the_test_split(use_stand_in):
    """The test loss is the loss of them all at once."""
    task, data = task_of("lstm_small")
    starts = np.linspace(0, len(data["test"]) - 33, 500).astype(int)
    batch = kinds.excerpts(data["test"], starts, 32)
    params = jax.jit(task.init)(KEY)
    test, loss = jax.jit(task.evaluate)(params), jax.jit(task.loss)(params, KEY, batch)
    all_close(test["test_loss"], loss)


def test_cross_entropy_and_accuracy_are_optaxs():
    """A classifier's test measures are of all examples, in however many parts."""
    images, labels = jax.random.bits(KEY, (20, 2, 2, 1), jnp.uint8), jnp.arange(20) % 4
    network = tasks.Network(None, lambda params, key, x: 9 * x.reshape(-1, 4))
    test = tasks.classifier(None, tasks.Split(images, labels), network, 4).evaluate(())
    logits = images.reshape(20, 4) / 255 * 9
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    all_close(test["test_loss"], loss)
    all_close(test["test_accuracy"], (logits.argmax(1) == labels).mean())


def test_squared_errors_are_means_over_everything():
    """MSE over batch and classes, the autoencoder's over batch and pixels."""
    logits, labels = np.array([[1.0, 0.5], [0.0, 2.0]], np.float32), np.array([0, 0])
    assert kinds.squared_error(logits, labels) == pytest.approx((0.25 + 1 + 4) / 4)
    # a logit of -ln 3 is a grey of 1 / 4
    flat = tasks.Network(None, lambda p, key, x: jnp.full((len(x), 4), -math.log(3)))
    images = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    loss = kinds.autoencoder(None, None, flat).loss((), KEY, (images, None))
    assert loss == pytest.approx((0.25**2 + 0.75**2) / 2)


def test_es_gradient_is_unbiased_and_keeps_the_value():
    """Within six standard errors on a quadratic, where smoothing changes no gradient."""
    plain = tasks.quadratic({}, KEY)
    task = kinds.es_gradient(plain, pairs=4, sigma=0.1)
    phi, xi = jnp.asarray([0.7, -1.3]), jnp.asarray([0.4, 0.1])
    keys = jax.random.split(KEY, 3000)
    grad = jax.jit(jax.vmap(jax.value_and_grad(task.loss), (None, 0, None)))
    values, grads = grad(phi, keys, xi)
    value, exact = jax.value_and_grad(plain.loss)(phi, KEY, xi)
    all_close(values, jnp.full(3000, value))
    error = grads.std(0) / math.sqrt(3000)
    assert (abs(grads.mean(0) - exact) < 6 * error).all()
    # one pair has variance |g|^2 + g_i^2 in each coordinate, four a quarter of it
    expected = jnp.sqrt(((exact**2).sum() + exact**2) / 4)
    np.testing.assert_allclose(grads.std(0), expected, rtol=0.1)


def test_initial_weights_are_cut_at_two_and_not_widened():
    """Standard deviation 0.88 / sqrt(fan-in), nothing beyond 2 / sqrt(fan-in). Inside of
    the transformer it is sqrt(2 / (layers fan-in)), of embeddings 0.88."""

    @jax.jit
    def draw(key):
        model = networks.transformer(500, width=64, layers=5, heads=2).init(key)
        return tasks.dense_init(key, 400, 100), tasks.conv_init(key, 3, 40, 100), model

    dense, kernel, model = jax.device_get(draw(KEY))
    for w, std in (
        (dense["w"], 0.8796 / 20),
        (kernel["w"], 0.8796 / math.sqrt(360)),
        (model["blocks"][1]["q"]["w"], math.sqrt(2 / 5 / 64)),
        (model["blocks"][4]["down"]["w"], math.sqrt(2 / 5 / 256)),
        (model["embedding"], 0.8796),
        (model["out"]["w"], 0.8796 / 8),
    ):
        assert float(w.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * w.size))
        assert 0.95 * 2 < float(abs(w).max()) * 0.8796 / std <= 2.001
    assert not np.asarray(dense["b"]).any() and not np.asarray(kernel["b"]).any()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "shape, size, stride", [((6, 7), 3, 1), ((7, 8), 4, 2), ((5, 4), 1, 2)]
)
def test_convolution_as_a_product_is_the_convolution(shape, size, stride):
    """Values and both gradients equal XLA's own, and so does the pooling."""
    w = jax.random.normal(KEY, (size, size, 3, 5))
    x = jax.random.normal(jax.random.key(1), (2, *shape, 3))

    def outcome(f):
        y, pull = jax.vjp(f, w, x)
        return y, *pull(jnp.sin(y))

    @jax.jit
    def both():
        blocks = (1, size, size, 1), (1, stride, stride, 1), "SAME"
        pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *blocks)
        ours = outcome(lambda w, x: tasks.conv({"w": w}, x, stride))
        xlas = outcome(lambda w, x: convolution(w, x, stride))
        return (*ours, networks.max_pool(x, size, stride)), (*xlas, pooled)

    jax.tree.map(partial(all_close, tolerance=1e-4), *both())


@pytest.mark.parametrize("shape, axes", [((8,), 3), ((1, 1, 1, 8), (0, 1, 2))])
def test_norms_normalise_over_the_right_axes(shape, axes):
    """Layer norm: each position over its channels, whatever the batch. Batch norm: each
    channel over all else, of this very batch."""
    x = 3 + 2 * jax.random.normal(KEY, (4, 5, 6, 8))
    apply, params = jax.jit(networks.norm), networks.norm_params(*shape)
    y = np.asarray(apply(params, x))
    all_close(y.mean(axes), 0, 1e-5)
    all_close(y.std(axes), 1, 1e-4)
    moved = jax.tree.map(lambda p: p + 1, params)  # scale 2, offset 1
    all_close(apply(moved, x), 2 * y + 1)
    assert np.allclose(apply(params, x[:2]), y[:2], atol=1e-5) == (axes == 3)


def test_convnet_puts_its_norm_after_the_relu():
    """conv, relu, norm three times, mean over positions, dense: written out."""
    network = networks.convnet_layernorm((4, 4, 3), 5)

    @jax.jit
    def compare(h):
        params, x = network.init(KEY), h
        for layer, stride in zip(params["convs"], (2, 1, 1), strict=True):
            h = normalised(jnp.maximum(convolution(layer["w"], h, stride), 0))
        return network.apply(params, KEY, x), h.mean((1, 2)) @ params["out"]["w"]

    all_close(*compare(jax.random.uniform(KEY, (2, 4, 4, 3))), 1e-4)


def test_lstm_is_the_formula_step_by_step():
    """Against a plain loop over tokens and sequences, gates in the order i, g, f, o."""
    network = networks.lstm(11, embedding=3, hidden=4)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, KEY)
    p = jax.tree.map(lambda p: rng.normal(0, 0.7, p.shape).astype(np.float32), shapes)
    tokens = rng.integers(0, 11, (2, 6))
    logits = jax.jit(network.apply)(p, KEY, tokens)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    h, c = np.zeros((2, 2, 4)) + np.stack([p["h"], p["c"]])[:, None]
    for t, token in enumerate(tokens.T):
        x = np.concatenate([p["embedding"][token], h], 1)
        i, g, f, o = np.split(x @ p["cell"]["w"] + p["cell"]["b"], 4, 1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        all_close(logits[:, t], h @ p["out"]["w"] + p["out"]["b"])


def test_transformer_is_its_formula():
    """One layer, two heads: softmax of q k / sqrt(d) over the tokens so far, in a loop. So
    it is causal and has no positions."""
    network = networks.transformer(7, 6, layers=1, heads=2, head_size=4, rate=0.0)
    tokens = np.array([[1, 5, 2, 2]])
    params = jax.device_get(jax.jit(network.init)(KEY))
    logits = jax.jit(network.apply)(params, KEY, tokens)
    (block,) = params["blocks"]
    dense = lambda layer, x: x @ layer["w"] + layer["b"]  # noqa: E731
    gelu = lambda x: x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))  # noqa: E731
    h = params["embedding"][tokens[0]]
    q, k, v = (dense(block[name], normalised(h)) for name in "qkv")
    mixed = np.zeros((4, 8))
    for t, head in itertools.product(range(4), (slice(0, 4), slice(4, 8))):
        weights = np.exp(k[: t + 1, head] @ q[t, head] / 2)
        mixed[t, head] = weights @ v[: t + 1, head] / weights.sum()
    h = h + dense(block["attended"], mixed)
    h = h + dense(block["down"], gelu(dense(block["up"], normalised(h))))
    all_close(logits[0], dense(params["out"], normalised(h)), 1e-4)


def test_dropout_keeps_the_mean_and_uses_the_key():
    """A tenth is zero, the rest larger by 10 / 9. The transformer draws by its key."""
    x = networks.dropout_factors(KEY, (200, 200), 0.1)
    assert float((x == 0).mean()) == pytest.approx(0.1, abs=6 * 0.3 / 200)
    assert {round(float(v), 4) for v in np.unique(x)} == {0.0, 1.1111}
    network = networks.transformer(11, width=8, layers=1, heads=2, head_size=4)
    tokens = jnp.asarray([[1, 2, 3]])
    run = jax.jit(lambda key: network.apply(network.init(KEY), key, tokens))
    a, b, again = (run(jax.random.key(i)) for i in (1, 2, 1))
    assert (a != b).any() and (a == again).all()
