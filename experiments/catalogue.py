"""Every task by name, and two suites of sixteen: python -m experiments.catalogue lists them

The list has sizes, the work of a step, and the task of google/learned_optimization that
each stands for. The suites span the families of the STAR paper's figures App. 5 and App. 6.
The paper's own list is not in its text. `small` is what a CPU does in 20 ms a step.

Deviations: CIFAR-100 replaces ImageNet, whose pictures may not be passed on. Bytes of any
text replace the One Billion Word benchmark (see `kinds.language_model`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import data as datasets
import store
import tasks
from companions import metz, problems
from experiments import kinds, networks
from experiments.networks import lstm, mlp, norm_params, resnet, transformer
from tasks import TaskSpec, classifier, convnet, cross_entropy, sample


def image_task(
    dataset: str, make: Callable, size: int | None = None, batch_size: int = 128
) -> TaskSpec:
    """dataset: a function of data.py. make: (draw, test split, classes) -> Task.

    size: of the pictures, which are resized to it. None leaves them as they are.
    """

    def load(source="auto", data_dir=None):
        images = getattr(datasets, dataset)(source, data_dir)
        transform = partial(kinds.resize, size=size) if size else lambda x: x
        return tasks.split_images(images, transform), datasets.about(images)

    def build(data, key):
        def draw(key, split):
            return sample(key, data[split], batch_size)

        return make(draw, data["test"], 100 if dataset == "cifar100" else 10)

    return TaskSpec(load, build)


def classify(network, error=cross_entropy, loss_limit=None, **sizes) -> Callable:
    """make, for `image_task`: classification by network(shape, classes, **sizes)."""

    def make(draw, test, classes):
        fitted = network(test.images.shape[1:], classes, **sizes)
        return classifier(draw, test, fitted, classes, error, loss_limit)

    return make


def reconstruct(*hidden: int) -> Callable:
    """make, for `image_task`: an autoencoder with these hidden layers."""

    def make(draw, test, classes):
        shape = test.images.shape[1:]
        network = tasks.mlp(shape, math.prod(shape), hidden)
        return kinds.autoencoder(draw, test, network)

    return make


def by_es(make: Callable, pairs: int) -> Callable:
    """make, for `image_task`: the same with gradients by evolution strategies."""
    return lambda *args: kinds.es_gradient(make(*args), pairs)


def text_task(network: Callable, length: int, batch_size: int, **sizes) -> TaskSpec:
    """network: (vocabulary, **sizes) -> Network. Batches are (batch_size, length)."""
    fitted = network(kinds.VOCABULARY, **sizes)

    def load(source="auto", data_dir=None):
        text = datasets.text(source, data_dir)
        streams = {k: jnp.asarray(getattr(text, k)) for k in ("train", "valid", "test")}
        return streams, datasets.about(text)

    def build(data, key):
        return kinds.language_model(data, fitted, length, batch_size)

    return TaskSpec(load, build)


MLP3 = partial(mlp, hidden=(128, 128, 128))
TASKS: dict[str, TaskSpec] = {
    **tasks.TASKS,
    **metz.TASKS,
    **problems.TASKS,
    "cifar10_conv_small": image_task("cifar10", classify(convnet), 8, 64),
    "cifar10_conv_16x16": image_task("cifar10", classify(convnet), 16, 64),
    "mnist_small": image_task("mnist", classify(mlp, hidden=(32, 32)), 14),
    "mlp_c10": image_task("cifar10", classify(MLP3)),
    "mlp_c10_wide": image_task("cifar10", classify(mlp, hidden=(1024, 1024))),
    "mlp_c10_wide_small": image_task("cifar10", classify(mlp, hidden=(256, 256)), 16),
    "mlp_c10_tanh": image_task("cifar10", classify(MLP3, activation=jnp.tanh)),
    "mlp_c10_layernorm": image_task("cifar10", classify(MLP3, norm_init=norm_params)),
    "mlp_c10_batchnorm": image_task(
        "cifar10", classify(MLP3, norm_init=partial(norm_params, 1))
    ),
    "mlp_c10_mse": image_task(
        "cifar10", classify(MLP3, kinds.squared_error, loss_limit=1.0)
    ),
    "mlp_mnist": image_task("mnist", classify(MLP3)),
    "ae_fmnist": image_task("fashion_mnist", reconstruct(128, 32, 128)),
    "ae_c10": image_task("cifar10", reconstruct(256, 256, 256)),
    "ae_c10_small": image_task("cifar10", reconstruct(32, 32, 32)),
    "conv_c10_layernorm": image_task("cifar10", classify(networks.convnet_layernorm)),
    "conv_c10_layernorm_small": image_task(
        "cifar10", classify(networks.convnet_layernorm), 8, 64
    ),
    "conv_c100": image_task("cifar100", classify(convnet)),
    "conv_c100_small": image_task("cifar100", classify(convnet), 8, 64),
    "resnet_c100": image_task("cifar100", classify(resnet)),
    "resnet_c100_small": image_task(
        "cifar100", classify(resnet, channels=(64, 128, 128, 128), first=3), 16, 64
    ),
    "lstm": text_task(lstm, 32, 128, embedding=128, hidden=256),
    "lstm_small": text_task(lstm, 32, 32, embedding=32, hidden=64),
    "transformer": text_task(transformer, 128, 32, width=256, layers=5, heads=8),
    "transformer_small": text_task(transformer, 32, 8, width=64, layers=3, heads=2),
    "es_mlp": image_task("cifar10", by_es(classify(MLP3), pairs=8)),
    "es_mlp_small": image_task(
        "fashion_mnist", by_es(classify(mlp, hidden=(32,)), pairs=1), 8
    ),
}
FULL = tuple(
    """
    mlp_c10 mlp_c10_wide mlp_c10_tanh mlp_c10_layernorm mlp_c10_batchnorm mlp_c10_mse
    mlp_mnist ae_fmnist ae_c10 cifar10_conv conv_c10_layernorm conv_c100 resnet_c100 lstm
    transformer es_mlp
    """.split()
)
SUITES: dict[str, tuple[str, ...]] = {
    # the small form where there is one
    "small": tuple(f"{n}_small" if f"{n}_small" in TASKS else n for n in FULL),
    "full": FULL,
}

# Of google/learned_optimization, or the paper.
STANDS_FOR = {
    "fmnist": "ImageMLP_FashionMnist_Relu128x128 (STAR, 5.3)",
    "fmnist_small": "fmnist on 8x8 pixels, 32 hidden units",
    "cifar10_conv": "Conv_Cifar10_32x64x64 (STAR, 5.3)",
    "cifar10_conv_small": "cifar10_conv on 8x8 pixels, 64 a batch",
    "cifar10_conv_16x16": "cifar10_conv on 16x16 pixels, 64 a batch",
    "quadratic": "noisy quadratic model (STAR, equation 4)",
    "mnist_small": "FC 2x32 on 14x14 MNIST (Metz et al. 2019, F)",
    "conv_classes": "ten classes of CIFAR-100, in any order (Metz et al. 2019, D.2)",
    "conv_classes_small": "conv_classes on 8x8 pixels, 100 of a class, 32 a batch",
    **dict.fromkeys(problems.TASKS, "Maheswaranathan et al. 2020, C.1"),
    "mlp_c10": "ImageMLP_Cifar10_128x128x128_Relu",
    "mlp_c10_wide": "ImageMLP_Cifar10_1024x1024_Relu",
    "mlp_c10_wide_small": "ImageMLP_Cifar10_256x256_Relu on 16x16 pixels",
    "mlp_c10_tanh": "ImageMLP_Cifar10_128x128x128_Tanh_bs128",
    "mlp_c10_layernorm": "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu",
    "mlp_c10_batchnorm": "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu",
    "mlp_c10_mse": "ImageMLP_Cifar10_128x128x128_Relu_MSE",
    "mlp_mnist": "ImageMLP_Mnist_128x128x128_Relu",
    "ae_fmnist": "ImageMLPAE_FashionMnist_128x32x128_bs128",
    "ae_c10": "ImageMLPAE_Cifar10_256x256x256_bs128",
    "ae_c10_small": "ImageMLPAE_Cifar10_32x32x32_bs128",
    "conv_c10_layernorm": "Conv_Cifar10_32x64x64_layernorm",
    "conv_c10_layernorm_small": "conv_c10_layernorm on 8x8 pixels, 64 a batch",
    "conv_c100": "Conv_Cifar100_32x64x64",
    "conv_c100_small": "conv_c100 on 8x8 pixels, 64 a batch",
    "resnet_c100": "Resnet_MultiRuntime_5, ImageNet at 32x32 replaced by CIFAR-100",
    "resnet_c100_small": "Resnet_MultiRuntime_2, ImageNet at 16x16 by CIFAR-100",
    "lstm": "RNNLM_lm1bbytes_Patch32_LSTM256_Embed128 on other text",
    "lstm_small": "RNNLM as above, LSTM64, embedding 32, 32 a batch",
    "transformer": "TransformerLM_LM1B_5layer_256width on bytes of other text",
    "transformer_small": "TransformerLM as above, 3 layers, width 64, 8 x 32 a batch",
    "es_mlp": "ESWrapped_8pair_ImageMLP_Cifar10_128x128x128_Relu",
    "es_mlp_small": "ESWrapped_1pair_ImageMLP_FashionMnist8_Relu32",
}


# The list


def multiply_adds(jaxpr: Any) -> int:
    """Of the matrix products and convolutions in a jaxpr, times the length of their loops.

    A `while` and each branch of a `cond` count once. Padding counts as pixels do.
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


def blank(name: str) -> datasets.Images | datasets.Text:
    """Zeros of the shapes of a data set, by its name in data.py."""
    zeros = np.zeros(1000, np.uint8)
    if name == "text":
        return datasets.Text(zeros, zeros, zeros, name, "", True)
    classes, shape = 100 if name == "cifar100" else 10, (32, 32, 3)
    images = np.zeros((1000, *(shape if "cifar" in name else (28, 28, 1))), np.uint8)
    labels = (np.arange(1000) % classes).astype(np.uint8)
    return datasets.Images(images, labels, images, labels, classes, name, "", True)


def measure(name: str) -> tuple[int, float, str]:
    """(parameters, GFLOP of a gradient, data set), from shapes alone, without files.

    Only matrix products and convolutions count, two operations a multiply-add.
    Backpropagation counts as two more evaluations of the loss.
    """
    names = ("fashion_mnist", "mnist", "cifar10", "cifar100", "text")
    blanks = {n: lambda *_, n=n: blank(n) for n in names}
    with mock.patch.multiple(datasets, **blanks):
        data, about = TASKS[name].load()
    key = jax.random.key(0)
    task = TASKS[name].build(data, key)
    params = jax.eval_shape(task.init, key)
    batch = jax.eval_shape(partial(task.batch, split="train"), key)
    loss = jax.make_jaxpr(task.loss)(params, key, batch)
    passes = 1 + 2 * 8 if name == "es_mlp" else 3  # its pairs; one pair costs as much
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    return count, 2e-9 * passes * multiply_adds(loss), about["dataset"]


def main(argv: Sequence[str] | None = None) -> int:
    store.Arguments(description=__doc__).parse_args(argv)
    print(f"{'task':24} {'parameters':>10} {'GFLOP/step':>10}  {'data':22}  stands for")
    for name in TASKS:
        count, gflop, dataset = measure(name)
        text = STANDS_FOR[name]
        print(f"{name:24} {count:10,} {gflop:10.3g}  {dataset:22}  {text}")
    for name, names in SUITES.items():
        print(f"\nsuite {name}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("experiments.catalogue", main))
