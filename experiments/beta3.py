"""What bounds beta3: python -m experiments.beta3

An untrained network's direction d has one sign over most of a tensor. The blackbox steps
beta3 d / v of its parameters therefore add up in the next layer. For each task this
measures, after 100 nominal steps,

- v, and the share of parameters whose mean squared gradient is below its floor, 1e-6
- |d| of ten untrained thetas, and by how much a perturbation of theta changes d
- how far one blackbox step with beta3 = 1 moves the logits, and its change likewise

and draws the losses of trained thetas over beta3, which come from results of
`experiments.search`. In the grey band one step moves the logits by 0.2 to 10. All thetas
train below it and none above. Inside, the seed decides.
"""

import json
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import star
import store
import tasks
import train
from baselines import LEGEND, WIDTH, color_of
from experiments.catalogue import TASKS
from experiments.networks import mlp
from experiments.search import read_candidates

NETWORKS = {
    "fmnist": tasks.mlp((28, 28, 1), 10),
    "fmnist_small": tasks.small_mlp((8, 8, 1), 10),
    "mnist_small": mlp((14, 14, 1), 10, hidden=(32, 32)),
    "cifar10_conv_small": tasks.convnet((8, 8, 3), 10),
}
RESULTS = pathlib.Path(__file__).with_name("results")
TRAINED = {  # what `experiments.search` found, and settings that its rows must have
    "fmnist": "search_fmnist.json",
    "fmnist_small": "beta3_fmnist_small.json",
    "mnist_small": "beta3_mnist_small.json",
}
SETTINGS = {"optimizer": "star_small_beta3", "steps": 500, **train.PRESETS["small"]}
NOMINAL_STEPS, THETAS, SIGMA = 100, 10, 0.01
BAND = 0.2, 10  # logits


def after_nominal_steps(task, theta, key):
    """(params, state, gradient) after NOMINAL_STEPS steps without a blackbox term."""
    optimizer = star.PRESETS["hyperparam"]
    carry = tasks.fresh(lambda _: task, optimizer, key)
    step = partial(tasks.inner_step, lambda _: task, optimizer, theta)
    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, NOMINAL_STEPS))
    grads = jax.grad(task.loss)(carry.params, key, task.batch(key, "train"))
    return carry.params, carry.optimizer, grads


def blackbox_step(theta, params, state, grads):
    """(d, f_b for beta3 = 1), lists over the tensors of params."""
    c = star.PAPER._replace(beta3=1.0, nominal="none")

    def one(grad, p, s):
        outputs = star.network(theta, star.PAPER, state.count, grad, p, s)
        return outputs[0], -star.step(c, outputs[:2], grad, s)

    found = jax.tree.map(one, grads, params, state.tensors)
    pairs = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
    return [d for d, _ in pairs], [f_b for _, f_b in pairs]


def rms(tree) -> jax.Array:
    return jnp.sqrt(jnp.mean(ravel_pytree(tree)[0] ** 2))


def logits_moved(name, params, step: list, images) -> jax.Array:
    """Root mean square of the logits' change by a step along f_b, to first order."""
    step, apply = jax.tree.structure(params).unflatten(step), NETWORKS[name].apply
    key = jax.random.key(0)  # for dropout, which these networks do not have
    return rms(jax.jvp(lambda p: apply(p, key, images), (params,), (step,))[1])


def measure(name: str, data) -> dict:
    """Quantiles 0.1, 0.5, 0.9 of v over parameters. The rest: least, median, largest of
    root mean squares over THETAS thetas. `of_noise`: changes under SIGMA."""
    task, key = TASKS[name].build(data, jax.random.key(0)), jax.random.key(1)
    thetas = [star.init_theta(k, star.PAPER) for k in jax.random.split(key, THETAS)]
    params, state, grads = jax.jit(partial(after_nominal_steps, task))(thetas[0], key)
    images, _ = task.batch(key, "train")
    moved = partial(logits_moved, name, params, images=images)

    @jax.jit
    def of_theta(theta):
        flat, unravel = ravel_pytree(theta)
        noisy = unravel(flat + SIGMA * jax.random.normal(key, flat.shape))
        d, f_b = blackbox_step(theta, params, state, grads)
        other = blackbox_step(noisy, params, state, grads)
        d_change, change = jax.tree.map(jnp.subtract, (d, f_b), other)
        return rms(d), rms(d_change), moved(f_b), moved(change)

    v2, _ = ravel_pytree(jax.tree.map(lambda _, s: s.v2, params, state.tensors))
    line = {"parameters": v2.size, "below_floor": float((v2 < 1e-6).mean())}
    line["v"] = np.quantile(np.sqrt(v2 + 1e-6), [0.1, 0.5, 0.9]).tolist()
    names = ("d", "d_of_noise", "logits", "logits_of_noise")
    found = np.quantile([of_theta(theta) for theta in thetas], [0, 0.5, 1], 0)
    return line | dict(zip(names, found.T.tolist(), strict=True))


def trained(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(beta3 (n,), mean losses over T (n, seeds)) of the search's rows with SETTINGS."""
    text = (RESULTS / TRAINED[name]).read_text()
    usual, found = {"estimator": "noise_reuse", "task": name}, {}
    rows = json.loads(text)["rows"]
    for candidate, row in zip(read_candidates(text), rows, strict=True):
        candidate = usual | candidate
        beta3 = candidate.pop("beta3")
        if candidate == usual | SETTINGS:
            found[beta3] = row["loss"]
    beta3 = sorted(found)
    return np.array(beta3), np.array([found[b] for b in beta3])


def figure_of(result: dict) -> Figure:
    """A panel for each task: losses of trained thetas over beta3, and what is predicted."""
    figure = Figure(figsize=(WIDTH, 2.8))
    panels, color = figure.subplots(1, len(TRAINED)), color_of("STAR")
    for axes, name in zip(panels, TRAINED, strict=True):
        beta3, losses = trained(name)
        axes.plot(beta3, losses.mean(1), color=color)
        axes.plot(beta3, losses, "o", color=color, ms=4)
        low, high = (logits / result[name]["logits"][1] for logits in BAND)
        label = "a step moves the logits by {} to {}".format(*BAND)
        axes.axvspan(low, high, color="0.88", label=label)
        axes.axhline(np.log(10), color="k", ls="--", lw=1, label="chance, ln 10")
        axes.set(xscale="log", yscale="log", xlabel="beta3", title=name)
    figure.axes[0].set_ylabel("mean training loss over T (nats)")
    figure.legend(*axes.get_legend_handles_labels(), **LEGEND)
    return figure


def parse(argv=None):
    parser = store.Arguments("experiments.beta3", description=__doc__.splitlines()[0])
    parser.add_data()
    parser.add_argument("--out", default="runs/beta3", help="folder of the results")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args, result = parse(argv), {}
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        data, about = TASKS[name].load(args.data, args.data_dir)
        result[name] = about | measure(name, data)
        print(name, json.dumps(result[name]), flush=True)
    store.save_json(folder / "beta3.json", result)
    store.save_figure(folder / "beta3.png", figure_of, result)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("experiments.beta3", main))
