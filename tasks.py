"""The inner problems: what a learned optimizer trains, each as a few pure functions.

    python tasks.py     lists them: parameters, work of a step, data, what they stand for

The tasks follow section 5.3 and appendix B of the STAR paper and the conventions of the
task suite it uses, google/learned_optimization: pixels / 255, never augmented; the first
80 % of the training set for the inner training; mean cross-entropy. See `kinds.py`;
networks and initial values are in `networks.py`.

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
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data as datasets
from companions import problems
from experiments.kinds import (
    BATCH_SIZE,
    IMAGES,
    VOCABULARY,
    autoencoder,
    by_class,
    class_family,
    classifier,
    cross_entropy,
    deterministic,
    es_gradient,
    language_model,
    pool,
    pool_to_8x8,
    quadratic,
    resize,
    sample,
    split_images,
    squared_error,
)
from experiments.networks import (
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


class TaskSpec(NamedTuple):
    load: Callable  # (source, data_dir) -> (data, about): pytree of arrays, dict for cards
    build: (
        Callable  # (data, key, batch_size=its own) -> Task; key: of a family's member
    )
    like: Callable  # () -> data of the same shapes, only fewer and zero, without files
    dataset: str
    stands_for: str  # the task of google/learned_optimization, or the source
    passes: int = 3  # evaluations of the loss that one gradient is worth


# The table.


def _load_nothing(
    source: str = "auto", data_dir: str | pathlib.Path | None = None
) -> tuple[Any, dict]:
    return {}, datasets.about_formula()


def _images(
    dataset: str,
    transform: Callable = lambda x: x,
    arrange: Callable = lambda splits: splits,
) -> tuple[Callable, Callable]:
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
    dataset: str,
    make: Callable,
    stands_for: str,
    size: int | None = None,
    batch_size: int = BATCH_SIZE,
    transform: Callable | None = None,
    passes: int = 3,
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


def _classify(
    network: Callable,
    error: Callable = cross_entropy,
    loss_limit: float | None = None,
    **sizes: Any,
) -> Callable:
    def make(draw, test, classes):
        fitted = network(test.images.shape[1:], classes, **sizes)
        return classifier(draw, test, fitted, classes, error, loss_limit)

    return make


def _reconstruct(hidden: tuple[int, ...]) -> Callable:
    def make(draw, test, classes):
        return autoencoder(draw, test, mlp_autoencoder(test.images.shape[1:], hidden))

    return make


def _es_task(
    dataset: str, make: Callable, pairs: int, stands_for: str, size: int | None = None
) -> TaskSpec:
    return _image_task(
        dataset,
        lambda *args: es_gradient(make(*args), pairs),
        stands_for,
        size,
        passes=1 + 2 * pairs,
    )


def _text_task(
    network: Network, length: int, batch_size: int, stands_for: str
) -> TaskSpec:
    def load(source="auto", data_dir=None) -> tuple[Any, dict]:
        text = datasets.text(source, data_dir)
        streams = {k: jnp.asarray(getattr(text, k)) for k in ("train", "valid", "test")}
        return streams, datasets.about(text)

    def build(data, key, batch_size=batch_size):
        return language_model(data, network, length, batch_size)

    def like():
        return {k: jnp.zeros(1000, jnp.uint8) for k in ("train", "valid", "test")}

    return TaskSpec(load, build, like, "text", stands_for)


def _family(
    hidden: tuple[int, ...], stands_for: str, transform: Callable = lambda x: x
) -> TaskSpec:
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
    "cifar10_conv_16x16": _image_task(
        "cifar10",
        _classify(convnet),
        "cifar10_conv on 16x16 pixels, 64 a batch",
        size=16,
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
    **{
        name: TaskSpec(
            load=_load_nothing,
            build=lambda data, key, batch_size=1, make=make: deterministic(make(key)),
            like=dict,
            dataset="-",
            stands_for="Maheswaranathan et al. 2020, C.1",
        )
        for name, make in problems.PROBLEMS.items()
    },
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


def multiply_adds(jaxpr: Any) -> int:
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


def main(argv: Sequence[str] | None = None) -> int:
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
