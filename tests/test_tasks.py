"""The inner tasks: sizes, first losses, gradients; the networks against plain loops."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import inner
import tasks
from baselines import BASELINES
from experiments import kinds, networks

KEY = jax.random.key(0)

# Parameters and GFLOP per step, from the closed forms of each architecture.
SIZES = {
    "fmnist": (118_282, 0.0906),
    "fmnist_small": (2_410, 0.00182),
    "cifar10_conv": (56_970, 11.0),
    "cifar10_conv_small": (56_970, 0.345),
    "cifar10_conv_16x16": (56_970, 1.38),
    "mlp_c10": (427_658, 0.328),
    "mlp_c10_wide": (4_206_602, 3.23),
    "mlp_c10_wide_small": (265_226, 0.203),
    "mlp_c10_tanh": (427_658, 0.328),
    "mlp_c10_layernorm": (428_426, 0.328),
    "mlp_c10_batchnorm": (428_426, 0.328),
    "mlp_c10_mse": (427_658, 0.328),
    "mlp_mnist": (134_794, 0.103),
    "ae_fmnist": (209_968, 0.16),
    "ae_c10": (1_707_776, 1.31),
    "ae_c10_small": (201_824, 0.153),
    "conv_c10_layernorm": (57_290, 11.0),
    "conv_c10_layernorm_small": (57_290, 0.345),
    "conv_c100": (62_820, 11.0),
    "conv_c100_small": (62_820, 0.348),
    "resnet_c100": (1_557_416 - 900 * 513, 5.63),  # 100 classes, not 1000
    "resnet_c100_small": (128_584 - 100 * 129, 0.176),  # 100, not 200
    "lstm": (494_467, 11.3),
    "lstm_small": (50_083, 0.253),
    "transformer": (4_082_179, 106),
    "transformer_small": (183_491, 0.271),
    "es_mlp": (427_658, 1.86),
    "es_mlp_small": (2_410, 0.00182),
}


def all_close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# The table.


@pytest.mark.heavy
def test_list_has_every_task_with_its_size(capsys):
    """python tasks.py, without any file: parameters exactly, the work of a step to 1 %."""
    assert tasks.main([]) == 0
    table, *suites = capsys.readouterr().out.split("\n\n")
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[1:]}
    assert set(rows) == set(tasks.TASKS) and len(suites) == 2
    for name, (count, gflop) in SIZES.items():
        assert int(rows[name][0].replace(",", "")) == count, name
        assert float(rows[name][1]) == pytest.approx(gflop, rel=0.01), name


def test_suites_are_sixteen_tasks_each():
    """Every name is in the table; the small suite's stay below half a million."""
    for names in tasks.SUITES.values():
        assert len(set(names)) == 16 and set(names) <= set(tasks.TASKS)
    assert max(SIZES[name][0] for name in tasks.SUITES["small"]) < 500_000
    assert [n.removesuffix("_small") for n in tasks.SUITES["small"]] == list(
        tasks.SUITES["full"]
    )


def test_multiply_adds_counts_loops_and_kernels():
    """A product in a loop of 7 counts 7 times; a convolution by outputs times window."""

    def f(x, w, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
        return jax.nn.relu(x).sum() + networks.conv_by_xla(
            kernel, x[None, ..., None], 2
        )

    jaxpr = jax.make_jaxpr(f)(
        jnp.ones((4, 6)), jnp.ones((6, 6)), jnp.ones((3, 3, 1, 5))
    )
    products, convolution = 7 * 4 * 6 * 6, 2 * 3 * 5 * 9
    assert tasks.multiply_adds(jaxpr) == products + convolution


FIRST_LOSS = {"mlp_c10_mse": 0.105, "ae_fmnist": 0.17, "ae_c10_small": 0.07}
FIRST_LOSS |= dict.fromkeys(("conv_c100_small", "resnet_c100_small"), math.log(100))
FIRST_LOSS |= dict.fromkeys(("lstm_small", "transformer_small"), math.log(259))


@pytest.mark.heavy
@pytest.mark.parametrize("name", tasks.SUITES["small"])
def test_small_task_can_be_trained(name, use_stand_in):
    """First loss as of a network that knows nothing, exactly so for the ResNet, whose last
    layer is zero; Adam lowers it on one batch; every
    tensor moves."""
    spec = tasks.TASKS[name]
    data, about = spec.load()
    assert about["stand_in"]

    def run(data):
        task = spec.build(data, KEY, 8)
        batch = task.batch(KEY, "train")
        flat, unravel = ravel_pytree(task.init(KEY))  # one vector: less to compile
        adam = optax.adam(3e-3)

        def step(carry, key):
            flat, state = carry
            loss, grads = jax.value_and_grad(
                lambda flat: task.loss(unravel(flat), key, batch)
            )(flat)
            updates, state = adam.update(grads, state)
            return (flat + updates, state), loss

        keys = jax.random.split(KEY, 40)
        (last, _), losses = jax.lax.scan(step, (flat, adam.init(flat)), keys)
        return unravel(flat), unravel(last), losses

    params, last, losses = jax.jit(run)(data)
    expected = FIRST_LOSS.get(name, math.log(10))
    near = {"resnet_c100_small": 1e-6}.get(name, 0.35 if expected > 1 else 0.6)
    assert float(losses[0]) == pytest.approx(expected, rel=near)
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < (0.99 if name.startswith("es") else 0.9) * losses[0]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(last), strict=True
    ):
        assert np.isfinite(b).all() and (a != b).any(), path


def test_loss_limits():
    """1.5 ln(classes), 259 for text; 1 for squared errors."""
    for name, limit in {
        "cifar10_conv": 1.5 * math.log(10),
        "resnet_c100": 1.5 * math.log(100),
        "lstm": 1.5 * math.log(259),
        "mlp_c10_mse": 1.0,
        "ae_c10": 1.0,
        "es_mlp": 1.5 * math.log(10),
    }.items():
        spec = tasks.TASKS[name]
        assert spec.build(spec.like(), KEY).loss_limit == pytest.approx(limit)


# Data and batches.


def test_split_is_80_10_of_the_training_images(stand_in, small_task):
    """Train 80 %, valid 10 %, no picture in both, test untouched."""
    _, data = small_task
    n = len(stand_in.train_labels)
    assert len(data["train"].labels) == 0.8 * n and len(data["valid"].labels) == 0.1 * n
    assert len(data["test"].labels) == len(stand_in.test_labels)
    full = kinds.split_images(stand_in)
    train_set, valid_set = (
        {x.tobytes() for x in np.asarray(full[split].images)}
        for split in ("train", "valid")
    )
    assert not train_set & valid_set


def test_batches_depend_on_the_key_alone(small_task):
    """Same key, same batch; pictures are uint8 / 255 with their own labels."""
    build, data = small_task
    task = build(data, KEY)
    (x, y), (x2, y2) = (task.batch(jax.random.key(3), "train") for _ in range(2))
    np.testing.assert_array_equal(x, x2)
    np.testing.assert_array_equal(y, y2)
    other, _ = task.batch(jax.random.key(4), "train")
    assert (x != other).any()
    pairs = {
        (a.tobytes(), int(b))
        for a, b in zip(
            np.asarray(data["train"].images),
            np.asarray(data["train"].labels),
            strict=True,
        )
    }
    back = np.round(np.asarray(x) * 255).astype(np.uint8)
    assert all((a.tobytes(), int(b)) in pairs for a, b in zip(back, y, strict=True))


def test_family_of_tasks_draws_its_classes(use_stand_in):
    """Five classes of ten in an order of their own; labels name the drawn class, and a
    run keeps its member to the end."""
    spec = tasks.TASKS["fmnist_classes_small"]
    data, _ = spec.load()
    limit = spec.build(data, KEY).loss_limit

    @jax.jit
    def look(data, key):
        task = spec.build(data, key)
        params = task.init(KEY)
        return *task.batch(jax.random.key(5), "train"), params, task.evaluate(params)

    x, y, params, test = look(data, KEY)
    x2, *_ = look(data, jax.random.key(1))
    assert set(np.unique(y)) <= set(range(5)) and limit == 1.5 * np.log(5)
    by_picture = {
        picture.tobytes(): c
        for c, pictures in enumerate(np.asarray(data["train"]))
        for picture in pictures
    }
    raw = np.round(np.asarray(x) * 255).astype(np.uint8)
    classes = [by_picture[picture.tobytes()] for picture in raw]
    names = {(int(label), c) for label, c in zip(y, classes, strict=True)}
    assert len(names) == len({c for _, c in names}) == len(set(np.unique(y)))
    assert (np.asarray(x) != np.asarray(x2)).any()
    assert params[-1]["b"].shape == (5,)
    assert float(test["test_loss"]) == pytest.approx(np.log(5), abs=0.4)
    fresh, step = inner.inner_training(
        lambda key: spec.build(data, key), BASELINES["sgd"]
    )
    carry = jax.jit(fresh)(jax.random.key(1))
    after, _ = jax.jit(step)({"learning_rate": jnp.float32(0.1)}, carry, KEY)
    np.testing.assert_array_equal(after.member, jax.random.key_data(jax.random.key(1)))


def test_initial_loss_is_near_chance(small_task):
    """A fresh network knows nothing: the loss is about ln 10, and so is the test loss."""
    build, data = small_task
    network = networks.mlp((8, 8, 1), 10, (32,))

    @jax.jit
    def look(data):
        task = build(data, KEY)
        params = task.init(jax.random.key(0))
        batch = task.batch(jax.random.key(2), "train")
        logits = network.apply(params, KEY, data["test"].images / 255.0)
        return task.loss(params, KEY, batch), task.evaluate(params), logits

    loss, test, logits = jax.device_get(look(data))
    assert float(loss) == pytest.approx(np.log(10), abs=0.35)
    expected = optax.softmax_cross_entropy_with_integer_labels(
        logits, data["test"].labels.astype(jnp.int32)
    ).mean()
    assert float(test["test_loss"]) == pytest.approx(float(expected), rel=1e-5)
    right = (logits.argmax(1) == data["test"].labels).mean()
    assert float(test["test_accuracy"]) == pytest.approx(float(right), abs=1e-6)


def test_quadratic_is_equation_4():
    """The loss is (phi - xi)' H (phi - xi) / 2: its mean, its gradient's mean H phi."""
    task = kinds.quadratic()
    phi = jnp.asarray([0.7, -1.3])
    keys = jax.random.split(jax.random.key(0), 20_000)

    def sample(key):
        xi = task.batch(key, "train")
        return jax.value_and_grad(task.loss)(phi, key, xi)

    losses, grads = jax.vmap(sample)(keys)
    h = np.array([[1.11, 0.596], [0.596, 0.486]])  # A.30
    exact = 0.5 * (phi @ h @ phi + np.trace(h))
    for samples, mean in [(losses, exact), *zip(grads.T, h @ phi, strict=True)]:
        error = samples.std() / np.sqrt(len(samples))
        assert abs(samples.mean() - mean) < 6 * error
    assert float(task.evaluate(phi)["test_loss"]) == pytest.approx(float(exact))


@pytest.mark.parametrize(
    "row, size, expected",
    [
        # halves: means of two; quarters: the middle two of four, unlike a mean of all
        ([0, 10, 20, 40], 2, [5, 30]),
        ([0, 8, 16, 90], 1, [12]),
        # 7 -> 2: read at 1.25 and 4.75
        ([0, 40, 80, 120, 160, 200, 240], 2, [50, 190]),
        # 2 -> 4: read at -0.25, 0.25, 0.75, 1.25, held at the borders
        ([0, 100], 4, [0, 25, 75, 100]),
        ([1, 2, 3], 3, [1, 2, 3]),
    ],
)
def test_resize_is_bilinear_at_half_pixels(row, size, expected):
    """Values worked out by hand, along both axes; channels and images apart."""
    images = np.zeros((2, len(row), len(row), 3), np.uint8)
    images[1, ..., 2] = row  # changes from left to right
    images[0, ..., 0] = np.asarray(row)[:, None]  # from top to bottom
    small = kinds.resize(images, size)
    assert small.dtype == np.uint8 and small.shape == (2, size, size, 3)
    np.testing.assert_array_equal(small[1, 0, :, 2], expected)
    np.testing.assert_array_equal(small[0, :, 0, 0], expected)
    assert not small[..., 1].any() and not small[0, ..., 2].any()


def test_text_windows_are_bytes_and_their_successors(use_stand_in, stand_ins):
    """Token t + 1 follows token t, 3 above the byte; windows start anywhere, by the key."""
    spec = tasks.TASKS["lstm_small"]
    data, _ = spec.load()
    task = spec.build(data, KEY)
    tokens, following = task.batch(jax.random.key(1), "train")
    assert tokens.shape == following.shape == (32, 32) and tokens.dtype == jnp.int32
    raw = stand_ins["text"].train.tobytes()
    starts = set()
    for x, y in zip(np.asarray(tokens), np.asarray(following), strict=True):
        np.testing.assert_array_equal(x[1:], y[:-1])
        starts.add(raw.find(bytes((np.append(x, y[-1]) - 3).tolist())))
    assert -1 not in starts and len(starts) > 25
    again, _ = task.batch(jax.random.key(1), "train")
    other, _ = task.batch(jax.random.key(2), "train")
    assert (tokens == again).all() and (tokens != other).any()


def test_text_windows_reach_both_ends():
    """The first byte and the last are drawn, nothing beyond."""
    network = networks.lstm(kinds.VOCABULARY, 2, 2)
    streams = dict.fromkeys(("train", "test"), jnp.arange(7, dtype=jnp.uint8))
    task = kinds.language_model(streams, network, 4, 200)
    tokens, following = task.batch(KEY, "train")
    assert set(np.unique(tokens[:, 0])) == {3, 4, 5}
    np.testing.assert_array_equal(following, tokens + 1)


def test_evaluate_is_the_loss_over_the_test_split(use_stand_in):
    """Autoencoder: over all pictures at once. Text: over windows that span the split."""
    for name in ("ae_c10_small", "lstm_small"):
        spec = tasks.TASKS[name]
        data, _ = spec.load()
        task = spec.build(data, KEY)
        params = jax.jit(task.init)(KEY)
        if name == "lstm_small":
            starts = np.linspace(0, len(data["test"]) - 33, 500).astype(int)
            batch = kinds.windows(data["test"], starts, 32)
        else:
            batch = kinds.to_batch(data["test"])
        test = jax.jit(task.evaluate)(params)
        expected = jax.jit(task.loss)(params, KEY, batch)
        assert float(test["test_loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert set(test) == {"test_loss", "test_accuracy"}
    assert 0 <= test["test_accuracy"] < 0.1


# Losses.


def test_squared_errors_are_means_over_everything():
    """MSE over batch and classes; the autoencoder over batch and pixels."""
    logits, labels = np.array([[1.0, 0.5], [0.0, 2.0]], np.float32), np.array([0, 0])
    assert kinds.squared_error(logits, labels) == pytest.approx((0.25 + 1 + 4) / 4)
    flat = networks.Network(
        lambda key: (), lambda p, key, x: jnp.full((len(x), 4), 0.25)
    )
    split = kinds.Split(jnp.zeros((2, 2, 2, 1), jnp.uint8), jnp.zeros(2, jnp.uint8))
    task = kinds.autoencoder(None, split, flat)
    images = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    expected = (0.25**2 + 0.75**2) / 2
    assert float(task.loss((), KEY, (images, None))) == pytest.approx(expected)
    assert task.evaluate(())["test_loss"] == pytest.approx(0.25**2)


def test_es_gradient_is_unbiased_and_keeps_the_value():
    """On a quadratic, where smoothing leaves the gradient as it is; six standard errors."""
    plain = kinds.quadratic()
    task = kinds.es_gradient(plain, pairs=4, sigma=0.1)
    phi, xi = jnp.asarray([0.7, -1.3]), jnp.asarray([0.4, 0.1])
    keys = jax.random.split(KEY, 3000)
    grad = jax.jit(jax.vmap(jax.value_and_grad(task.loss), (None, 0, None)))
    values, grads = grad(phi, keys, xi)
    value, exact = jax.value_and_grad(plain.loss)(phi, KEY, xi)
    all_close(values, jnp.full(3000, value))
    assert float(task.loss(phi, KEY, xi)) == pytest.approx(float(value))
    error = grads.std(0) / math.sqrt(3000)
    assert (abs(grads.mean(0) - exact) < 6 * error).all()
    assert (grads.std(0) > 0.1).all()
    # one pair has variance |g|^2 + g_i^2 in each coordinate, four a quarter of it
    expected = jnp.sqrt(((exact**2).sum() + exact**2) / 4)
    np.testing.assert_allclose(grads.std(0), expected, rtol=0.1)


# Networks.


def test_initial_weights_are_cut_at_two_and_not_widened():
    """Standard deviation 0.88 / sqrt(fan-in), nothing beyond 2 / sqrt(fan-in); inside of
    the transformer sqrt(2 / (layers fan-in)); embeddings 0.88."""

    @jax.jit
    def draw(key):
        model = networks.transformer(500, width=64, layers=5, heads=2).init(key)
        conv = networks.conv_init(key, 3, 40, 100)
        return networks.dense_init(key, 400, 100), conv, model

    dense, kernel, model = jax.device_get(draw(KEY))
    for w, std, widened in (
        (dense["w"], 0.8796 / 20, 0.8796),
        (kernel["w"], 0.8796 / math.sqrt(360), 0.8796),
        (model["blocks"][1]["q"]["w"], math.sqrt(2 / 5 / 64), 0.8796),
        (model["blocks"][4]["down"]["w"], math.sqrt(2 / 5 / 256), 0.8796),
        (model["embedding"], 0.8796, 0.8796),
        (model["out"]["w"], 0.8796 / 8, 0.8796),
    ):
        assert float(w.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * w.size))
        assert 0.95 * 2 < float(abs(w).max()) * widened / std <= 2.001
    assert not np.asarray(dense["b"]).any() and not np.asarray(kernel["b"]).any()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "shape, size, stride",
    [((6, 7), 3, 1), ((7, 8), 4, 2), ((5, 4), 1, 2)],
)
def test_convolution_as_a_product_is_the_convolution(shape, size, stride):
    """Values and both gradients equal XLA's own; so does the pooling."""
    keys = jax.random.split(KEY, 2)
    w = jax.random.normal(keys[0], (size, size, 3, 5))
    x = jax.random.normal(keys[1], (2, *shape, 3))

    def outcome(f):
        y, pull = jax.vjp(partial(f, stride=stride), w, x)
        return y, *pull(jnp.sin(y))

    @jax.jit
    def both(w, x):
        window, strides = (1, size, size, 1), (1, stride, stride, 1)
        pooled = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, window, strides, "SAME"
        )
        return (
            (*outcome(networks.conv_as_product), networks.max_pool(x, size, stride)),
            (*outcome(networks.conv_by_xla), pooled),
        )

    for ours, xlas in zip(*both(w, x), strict=True):
        all_close(ours, xlas, 1e-4)


def test_norms_normalise_over_the_right_axes():
    """Layer norm: each position over its channels. Batch norm: each channel over all else,
    of this very batch; its parameters are (1, ..., 1, C), those of layer norm (C,)."""
    x = 3 + 2 * jax.random.normal(KEY, (4, 5, 6, 8))
    for norm, axes, shape in (
        (networks.LAYER_NORM, 3, (8,)),
        (networks.BATCH_NORM, (0, 1, 2), (1, 1, 1, 8)),
    ):
        apply, params = jax.jit(norm.apply), norm.init(8, 4)
        assert {p.shape for p in jax.tree.leaves(params)} == {shape}
        y = np.asarray(apply(params, x))
        all_close(y.mean(axes), 0, 1e-5)
        all_close(y.std(axes), 1, 1e-4)
        moved = jax.tree.map(lambda p: p + 1, params)  # scale 2, offset 1
        all_close(apply(moved, x), 2 * y + 1)


def test_batch_norm_sees_the_batch_and_layer_norm_does_not():
    """An image's logits change with its company, in the one and not in the other."""
    x = jax.random.uniform(KEY, (3, 4, 4, 1))
    for norm, sees in ((networks.BATCH_NORM, True), (networks.LAYER_NORM, False)):
        network = networks.mlp((4, 4, 1), 5, (7,), norm=norm)

        @jax.jit
        def logits(x, network=network):
            params = network.init(KEY)
            return [network.apply(params, KEY, x[:n])[0] for n in (2, 3)]

        alone, together = logits(x)
        assert (not np.allclose(alone, together, atol=1e-5)) == sees


def test_convnet_puts_its_norm_after_the_relu():
    """conv, relu, norm, mean over positions, dense: written out for one layer."""
    network = networks.convnet((4, 4, 3), 5, (8,), norm=networks.LAYER_NORM)

    @jax.jit
    def compare(x):
        params = network.init(KEY)
        (layer,) = params["convs"]
        h = jnp.maximum(networks.conv_by_xla(layer["w"], x, 2), 0)  # (2, 2, 2, 8)
        h = (h - h.mean(3, keepdims=True)) / jnp.sqrt(h.var(3, keepdims=True) + 1e-5)
        return network.apply(params, KEY, x), h.mean((1, 2)) @ params["out"]["w"]

    all_close(*compare(jax.random.uniform(KEY, (2, 4, 4, 3))))


def test_lstm_is_the_formula_step_by_step():
    """Against a plain loop over tokens and sequences, gates in the order i, g, f, o."""
    network = networks.lstm(11, embedding=3, hidden=4)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, KEY)
    p = jax.tree.map(lambda p: rng.normal(0, 0.7, p.shape).astype(np.float32), shapes)
    tokens = rng.integers(0, 11, (2, 6))
    logits = jax.jit(network.apply)(p, KEY, tokens)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for sequence, found in zip(tokens, logits, strict=True):
        h, c = p["h"], p["c"]
        for token, row in zip(sequence, found, strict=True):
            z = np.append(p["embedding"][token], h) @ p["cell"]["w"] + p["cell"]["b"]
            i, g, f, o = np.split(z, 4)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            all_close(row, h @ p["out"]["w"] + p["out"]["b"])


def test_transformer_is_causal_and_has_no_positions():
    """A later token changes no earlier logit; with one layer, what stands before a token
    may stand in any order."""
    network = networks.transformer(
        11, width=8, layers=1, heads=2, head_size=4, rate=0.0
    )

    @jax.jit
    def run(tokens):
        return network.apply(network.init(KEY), KEY, tokens)

    later, swapped = [1, 2, 3, 9, 5, 6], [2, 1, 3, 4, 5, 6]
    logits = np.asarray(run(jnp.asarray([[1, 2, 3, 4, 5, 6], later, swapped])))
    all_close(logits[1, :3], logits[0, :3])
    assert (abs(logits[1, 3:] - logits[0, 3:]).max(1) > 1e-3).all()
    all_close(logits[2, 2:], logits[0, 2:])
    assert (abs(logits[2, :2] - logits[0, :2]).max(1) > 1e-3).all()


def test_attention_is_a_mean_of_values():
    """One layer, one head: softmax of q k / sqrt(d) over the tokens so far, in a loop."""
    network = networks.transformer(7, width=6, layers=1, heads=1, head_size=4, rate=0.0)
    tokens = np.array([[1, 5, 2, 2]])

    @jax.jit
    def run(tokens):
        params = network.init(KEY)
        return params, network.apply(params, KEY, tokens)

    params, logits = jax.device_get(run(tokens))
    (block,) = params["blocks"]
    dense = lambda layer, x: x @ layer["w"] + layer["b"]  # noqa: E731
    gelu = lambda x: x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))  # noqa: E731

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + 1e-5
        )

    h = params["embedding"][tokens[0]]
    q, k, v = (dense(block[name], norm(h)) for name in "qkv")
    mixed = []
    for t in range(4):
        weights = np.exp(k[: t + 1] @ q[t] / 2)
        mixed.append(weights @ v[: t + 1] / weights.sum())
    h = h + dense(block["attended"], np.stack(mixed))
    h = h + dense(block["down"], gelu(dense(block["up"], norm(h))))
    all_close(logits[0], dense(params["out"], norm(h)), 1e-4)


def test_dropout_keeps_the_mean_and_uses_the_key():
    """A tenth is zero, the rest larger by 10 / 9; the transformer draws by its key."""
    x = networks.dropout_factors(KEY, (200, 200), 0.1)
    assert float((x == 0).mean()) == pytest.approx(0.1, abs=6 * 0.3 / 200)
    assert {round(float(v), 4) for v in np.unique(x)} == {0.0, 1.1111}
    network = networks.transformer(11, width=8, layers=1, heads=2, head_size=4)

    @jax.jit
    def run(key):
        return network.apply(network.init(KEY), key, jnp.asarray([[1, 2, 3]]))

    a, b, again = (run(jax.random.key(i)) for i in (1, 2, 1))
    assert (a != b).any() and (a == again).all()
