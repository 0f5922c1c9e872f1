"""The table of claims, computed from result files: python -m experiments.claims

It writes docs/claims.md and prints it. Numbers come from the cards and logs in weights/ and
from experiments/results/. With two arguments it first keeps the numbers of a figure there:

    python -m experiments.claims runs/figure-2a/2a.json "python -m figures 2a"
"""

import csv
import json
import math
import os
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import store
from figures.star_runs import DECAYS, LABELS

# Headings are links to the section that tells more. A row: paper | claim | verdict, then
# keys of NUMBERS, or a test.
CLAIMS = """
errata.md
STAR, 4.1 to 4.3 | P within the bounds makes training stable
    | does not hold here for P that is not symmetric | pytest test_nqm.py

results.md#stars-noisy-quadratic-model
STAR, fig. 1 | Nominal term, decay and preconditioner together do so
    | holds | radius
STAR, fig. 2a | A nominal term can lower gradient noise dramatically
    | holds | variance
STAR, fig. 2a | Every alpha within the bounds lowers that noise, at every T
    | does not hold here near the upper bound | at_the_bound
STAR, fig. 2c | A good alpha is near-optimal within 1,000 meta-steps
    | holds here but only when P starts at 0 | near_optimal
STAR, fig. 2c | A poor alpha can need 100 times as many
    | holds here but with fewer | times_as_long
STAR, fig. 2c | A poor alpha can fail to train
    | holds here but only when P starts at random | arrived

recipes.md#what-bounds-beta3
STAR, B.2 | STAR meta-trains with all betas 1e-3
    | does not hold here | paper_beta3

results.md#figure-3-full-size
STAR, 5.3 | STAR meta-trains faster and better than blackbox
    | holds here but on convolutions with one meta-seed | than_blackbox
STAR, 5.3 | STAR meta-trains faster than hyperparam
    | holds here but only from 80,000 inner steps on | faster
STAR, fig. 3 | STAR ends better than hyperparam
    | holds here but not beyond the horizon, save on two of three seeds on fmnist
    | than_hyperparam | hyperparam_far
STAR, 5.3 | STAR stays stable far beyond its horizon
    | holds here but with single bad stretches | star_far
STAR, C.2 | Weight decay 1 over-damps
    | holds | decays
STAR, C.2 | Weight decay buys stability
    | holds here but as a lower end, nothing diverged without it | decays_end | decays_far
STAR, C.2 | Low weight decay does not harm meta-training
    | holds | decays
STAR, C.2 | The preconditioner lowers the meta-loss
    | holds | preconditioner

results.md#figure-3-full-size
STAR, fig. 3c | Blackbox diverges far beyond its horizon, on the MLP
    | holds here but for two of six runs | blackbox_far
STAR, C.2 | The nominal term makes meta-training faster and better
    | holds | nominal
STAR, C.2 | Without a nominal term the end is comparable on Fashion-MNIST
    | holds here but a little worse, and one seed of three does not start | nominal

results.md#nominal-terms
STAR, 5.1 | Adam combined with AggMo serves as the nominal term
    | holds here but tried on the small network alone, where it is the best of five
    | nominal_terms

results.md#convolutions
STAR, fig. 3d | Blackbox diverges far beyond its horizon, on the CNN
    | holds here but with one meta-seed, at 16x16 and at 32x32 pixels | conv_far

results.md#generalization-over-tasks
STAR, fig. 4 | STAR generalizes to other tasks and stays stable
    | holds here but not on mlp_c10_mse, where it bursts | suite_far
STAR, 5.3 | STAR is comparable to tuned Adam
    | holds | adam | suite_far
STAR, 5.3 | STAR beats blackbox nearly everywhere
    | holds here but with one meta-seed, within one horizon | suite_blackbox
STAR, C.3 | Blackbox is unstable on almost all tasks
    | does not hold here: on three of 16, within one horizon | suite_blackbox
STAR, C.3 | STAR against hyperparam is mixed
    | holds here but with one meta-seed, within one horizon | suite_hyperparam

results.md#exploding-gradients-figures-2-and-9
Metz, 2.3 | Meta-gradients explode with the unroll
    | holds | explosion

results.md#truncation-bias-figure-3
Metz, fig. 3 | Truncation biases what is learned
    | holds | truncation
Metz, 2.4 | Truncated gradients oppose the true one
    | holds here but only near the best rate | opposed

results.md#variance-and-the-merge-figure-4
Metz, 3 | The merge has at most the lower variance
    | holds here but within 1.15 times, from 128 pairs on | merge_variance

results.md#ablations-figure-8
Metz, fig. 8 | The merge trains better than gradients alone
    | does not hold here | gradients_alone
Metz, fig. 8 | The merge trains better than ES alone
    | holds | es_alone
Metz, fig. 8 | A growing unroll beats a fixed one
    | holds | unrolls
Metz, fig. 8 | Without momentum features training fails
    | does not hold here: it is only worse | no_momentum
Metz, fig. 8 | Without time features it is nearly as good
    | holds | no_time

results.md#the-convolutional-problem-where-backpropagation-explodes-figures-5-6-and-8
Metz, 4.5 | Where gradients explode the merge trains better than they alone
    | holds | conv_gradients | conv_noise
Metz, 4.5 | Where gradients explode the merge trains better than ES alone
    | does not hold here: ES alone ends lower on 8 of 8 networks | conv_es
Metz, fig. 6 | Trained for the validation loss it ends with a lower test loss
    | holds here but it then hardly trains | conv_valid
Metz, fig. 6 | It beats Adam with eight tuned hyperparameters
    | holds here but only in training loss, and Adam's best rate beats both | conv_adam8

results.md#not-tried
Metz, figs. 5 to 7 | The MLP optimizer beats tuned ones at scale
    | not tried

results.md#maheswaranathan-et-al-2020
GRU, A | A GRU optimizer learns momentum
    | holds here but off by up to 20 % | momentum
GRU, A | The leading mode alone does what the GRU does
    | does not hold here | modes
GRU, C.2 | A GRU optimizer beats tuned baselines on three tasks
    | does not hold here: on one of three | three_tasks
"""
INTRO = """# Claims: what the papers say, and what we measured

[`experiments/claims.py`](../experiments/claims.py) makes this page from result files.
[`tests/test_claims.py`](../tests/test_claims.py) fails where the two differ.

{}

- A claim is our paraphrase. The link of its paper leads to the section that tells more.
- "Seeds" counts meta-seeds. "Here" is then their mean, "spread" their standard deviation.
- A number without seeds is exact, or of one run, or a count.
- A mean loss, in nats, is over 2,000 inner steps of three fresh networks per theta.
  Some rows say otherwise.
- The first row has no numbers. Tests show it.
"""
ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs/claims.md", "experiments/results"
SEARCH = f"{RESULTS}/search_fmnist.json"
COMMANDS = {}  # of files that do not have it
for name, flags in {
    "search_fmnist": "fmnist",
    "search_fmnist_64_pairs": "fmnist",
    "search_fmnist_k": "fmnist",
    "search_fmnist_long": "fmnist",
    "search_blackbox": "fmnist",
    "beta3_fmnist_small": "fmnist_small --seeds 2",
    "beta3_mnist_small": "mnist_small --seeds 2",
}.items():
    path = f"{RESULTS}/{name}.json"  # a results.json holds its candidates
    COMMANDS[path] = f"python -m experiments.search {path} --task {flags}"
COMMANDS[f"{RESULTS}/beta3.json"] = "python -m experiments.beta3"
COMMANDS[f"{RESULTS}/floor.json"] = "python -m experiments.floor"


def show(x: float) -> str:
    """Four decimals below 1, three below 10, none up to 100,000, then powers of ten."""
    if isinstance(x, int) or math.isinf(x):
        return "never" if x == math.inf else str(x)
    places = 4 if abs(x) < 1 else 3 if abs(x) < 10 else 0
    return f"{x:,.{places}f}" if abs(x) < 1e5 else f"{x:.1e}"


def cells(numbers: dict[str, float | list]) -> list[str]:
    """Here, seeds, spread. Numbers: each of one run, or a list over meta-seeds."""
    lists = {k: x if isinstance(x, list) else [x] for k, x in numbers.items()}
    here = [f"{k}: {show(statistics.mean(x))}" for k, x in lists.items()]
    many = any(isinstance(x, list) for x in numbers.values())
    seeds = [str(len(x)) if isinstance(x, list) else "none" for x in numbers.values()]
    spread = [
        show(statistics.stdev(x)) if len(x) > 1 else "none" for x in lists.values()
    ]
    spread = spread if any(len(x) > 1 for x in lists.values()) else []
    return [", ".join(here), ", ".join(seeds) if many else "", ", ".join(spread)]


# --- Files
def read(name: str) -> Any:
    """A JSON file, or the rows of a CSV file; name from the root."""
    text = (ROOT / name).read_text()
    if name.endswith(".csv"):
        return [*csv.DictReader(text.splitlines())]
    return json.loads(text)


def figure(read: Callable, name: str) -> dict:
    return read(f"{RESULTS}/figure_{name}.json")


def runs(read: Callable, variant: str, file: str = "theta.json") -> list:
    """That file of every meta-seed of weights/FOLDER/VARIANT."""
    found = sorted(ROOT.glob(f"weights/{variant}-seed*/{file}"))
    if not found:
        raise FileNotFoundError(f"weights/{variant}-seed*/{file}")
    return [read(path.relative_to(ROOT).as_posix()) for path in found]


def kept(x: Any) -> Any:
    """Six digits. Of more than 20 numbers in a row: first, last, least and greatest."""
    if isinstance(x, dict):
        return {name: kept(value) for name, value in x.items()}
    if isinstance(x, list) and len(x) > 20 and isinstance(x[0], float):
        return kept({"first": x[0], "last": x[-1], "least": min(x), "greatest": max(x)})
    if isinstance(x, list):
        return [kept(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def keep(path: str, command: str) -> None:
    """Writes figure_NAME.json, or figure_NAME_TASK.json, under experiments/results/."""
    numbers = json.loads(pathlib.Path(path).read_text())
    if numbers["quick"] or numbers["stand_in"]:
        raise store.UserError(f"{path} is of --quick or of the stand-in data")
    task, name = numbers.get("task"), f"figure_{pathlib.Path(path).stem}"
    name += f"_{task}" if isinstance(task, str) else ""
    machine = f"{os.cpu_count()} virtual cores, jax {version('jax')}"
    about = {"command": command, "machine": machine} | kept(numbers)
    text = ",\n".join(f" {json.dumps(k)}: {json.dumps(x)}" for k, x in about.items())
    (ROOT / RESULTS / f"{name}.json").write_text(f"{{\n{text}\n}}\n")


# --- Numbers: functions of `read` that give what was measured, and {name: numbers}
STAR = "star_wd0.5"  # where one decay stands for all
Numbers = Iterator[tuple[str, dict[str, float | list]]]


def every(*functions: Callable) -> Callable:
    return lambda read: (x for function in functions for x in function(read))


def in_a_cell(label: str) -> str:
    label = label.replace(", begun trained", " (begun trained)")
    return label.replace(", ", " at ")


def name_of(variant: str, cards: list) -> str:
    begun = ", begun trained" * bool(cards[0]["recipe"]["init"])
    return in_a_cell(LABELS[variant] + begun)


def losses(
    *variants: str, of: Sequence[str] = ("fig3_fmnist", "fig3_small")
) -> Callable:
    """Mean losses, from the cards in these folders of weights/."""

    def numbers(read):
        for folder in of:
            x = {}
            for variant in variants:
                cards = runs(read, f"{folder}/{variant}")
                x[name_of(variant, cards)] = [card["fresh_loss"] for card in cards]
            yield f"`{cards[0]['task']}`, mean loss", x

    return numbers


def faster(variant: str) -> Callable:
    """Meta-losses on fmnist of the 50 meta-steps, of 400 inner steps each, before."""

    def mean(log, last):
        rows = [row for row in log if last - 50 < float(row["step"]) <= last]
        return statistics.mean(float(row["meta_loss"]) for row in rows)

    def numbers(read):
        for last in (100, 200, 500):
            x = {}
            for run in (f"fig3_fmnist/{STAR}", f"fig3_fmnist/{variant}"):
                name = name_of(pathlib.Path(run).name, runs(read, run))
                x[name] = [mean(log, last) for log in runs(read, run, "log.csv")]
            yield f"`fmnist`, meta-loss after {400 * last:,} inner steps", x

    return numbers


def far(name: str, *variants: str) -> Callable:
    """What becomes of the thetas of a figure within its steps."""

    def numbers(read):
        found, counts, ratios = figure(read, name), {}, {}
        for variant in variants:
            x, label = found["variants"][variant], in_a_cell(found["labels"][variant])
            counts[f"of {len(x['diverged'])} {label}"] = sum(map(int, x["diverged"]))
            pairs = zip(x["loss_at_10000"], x["loss_at_2000"], strict=True)
            ratios[label] = [later / sooner for later, sooner in pairs]
        task, steps = f"`{found['task']}`", f"{found['steps']:,.0f} steps"
        yield f"{task}, how many diverge by {steps}", counts
        yield f"{task}, loss at 10,000 over loss at 2,000", ratios

    return numbers


def later(name: str, steps: int) -> Callable:
    """Where STAR and hyperparam stand far beyond the horizon."""
    what = f"last 200 of {steps:,} steps"
    return drawn(name, f"loss_at_{steps}", what, STAR, "hyperparam")


def drawn(name: str, key: str, what: str, *variants: str) -> Callable:
    """Numbers of these variants that a figure has."""

    def numbers(read):
        found = figure(read, name)
        labels = {k: in_a_cell(found["labels"][k]) for k in variants}
        x = {label: found["variants"][k][key] for k, label in labels.items()}
        yield f"`{found['task']}`, {what}", x

    return numbers


def radius(read: Callable) -> Numbers:
    found = figure(read, "1")
    radii = dict(zip(found["intervention"], found["radius_before_after"], strict=True))
    before, _ = radii["all three"]
    after = {name: after for name, (_, after) in radii.items()}
    yield "spectral radius", {"before": before} | after


def variance(read: Callable) -> Numbers:
    found = figure(read, "2a")
    x = zip(found["horizon"], found["ratio_at_zero_to_best"], strict=True)
    x = {f"T = {t:.0f}": ratio for t, ratio in x if t in (1, 10, 1000)}
    yield "variance at alpha = 0 over the least", x


def at_the_bound(read: Callable) -> Numbers:
    found = figure(read, "2a")
    x = zip(found["horizon"], found["exact"], strict=True)
    x = {f"T = {t:.0f}": y["last"] / y["first"] for t, y in x if t in (1, 10, 1000)}
    yield "variance at the upper bound over that at alpha = 0", x


def until_near(read: Callable) -> dict:
    """{setting: meta-steps until within 10 % of the optimum, (alphas, seeds)}."""
    found, steps = figure(read, "2c"), {}
    near = found["meta_steps_until_within_10_percent"]
    for (std, clip), rows in zip(found["start_std_and_clip"], near, strict=True):
        name = f"P from {'random' if std else 0} {'' if clip else 'not '}clipped"
        steps[name] = [[math.inf if x is None else x for x in row] for row in rows]
    return steps


def near_optimal(read: Callable) -> Numbers:
    for name, rows in until_near(read).items():
        medians = [*map(statistics.median, rows)]
        x = {"alpha = 0": medians[0], "best alpha": min(medians)}
        yield f"{name}: meta-steps, median of {len(rows[0])} seeds", x


def times_as_long(read: Callable) -> Numbers:
    medians = {k: [*map(statistics.median, x)] for k, x in until_near(read).items()}
    x = {name: x[0] / min(x) for name, x in medians.items()}
    yield "meta-steps at alpha = 0 over those at the best alpha", x


def arrived(read: Callable) -> Numbers:
    steps = until_near(read)
    x = {name: sum(map(math.isfinite, rows[0])) for name, rows in steps.items()}
    yield "of 5 seeds, how many arrive at alpha = 0", x


def paper_beta3(read: Callable) -> Numbers:
    rows = read(SEARCH)["rows"]  # the best recipe comes first
    rows = [(row["candidate"], row["loss"]) for row in rows]
    x = {b: [y for c, y in rows if c.get("beta3") == b][0] for b in (3e-6, 1e-3)}
    x = {f"beta3 {beta3:g}": y for beta3, y in x.items()}
    yield "`fmnist`, mean loss of the best recipe tried", x


def adam(read: Callable) -> Numbers:
    card = read("weights/star_fmnist.json")
    x = {"the shipped STAR": [card["fresh_loss"]], "tuned Adam": card["adam_loss"]}
    yield "`fmnist`, mean loss", x


def nominal_terms(read: Callable) -> Numbers:
    rows = read(f"{RESULTS}/nominal_fmnist_small.json")["rows"]
    for key in ("alone", "meta_trained"):
        x = {row["nominal"].replace("_", " and "): row[key] for row in rows}
        yield f"`fmnist_small`, mean loss, {key.replace('_', '-')}", x


def decays_end(read: Callable) -> Numbers:
    rows = read(f"{RESULTS}/search_fmnist_long.json")["rows"]
    ends, key = {}, "last_200_of_20000"
    for row in rows[:2]:  # the third has another floor under v
        ends[f"decay {row['candidate']['weight_decay']}"] = row[key]
    yield "`fmnist`, 2,040,000 inner steps of training, last 200 of 20,000", ends


def suite(read: Callable) -> Numbers:
    """STAR of three meta-seeds against tuned baselines, on tasks that no theta has seen."""
    rows = read(f"{RESULTS}/suite_10000.json")["rows"]
    of = {(row["task"], row["name"]): row for row in rows}
    tasks, stars = {task for task, _ in of}, sorted({n for _, n in of if "STAR" in n})
    for rival in ("Adam", "NAdamW"):
        key, words = "last_200", f"tuned {rival}, last 200 of 10,000"
        ratios = [
            [of[t, star][key] / of[t, rival][key] for t in tasks] for star in stars
        ]
        below = [sum(x < 1 for x in row) for row in ratios]
        yield f"of {len(tasks)} tasks, how many below {words}", {"STAR": below}
        yield (
            f"over {words}, geometric mean",
            {"STAR": [statistics.geometric_mean(row) for row in ratios]},
        )
    lost = [sum(of[task, star]["diverged"] for task in tasks) for star in stars]
    yield f"of {len(tasks)} tasks, how many diverge by 10,000 steps", {"STAR": lost}


def one_horizon(*others: str) -> Callable:
    """STAR against these on the suite, each trained on `fmnist` with the same budget."""

    def numbers(read):
        rows = read(f"{RESULTS}/suite_2000.json")["rows"]
        of = {(row["task"], row["name"]): row for row in rows}
        tasks = {task for task, _ in of}
        ends = {k: math.inf if x["diverged"] else x["last_200"] for k, x in of.items()}
        for other in others:
            below = sum(ends[task, "STAR"] < ends[task, other] for task in tasks)
            what = f"of {len(tasks)} tasks, how many below {other}, last 200 of 2,000"
            yield what, {"STAR": below}
        x = {k: sum(of[t, k]["diverged"] for t in tasks) for k in ("STAR", *others)}
        yield f"of {len(tasks)} tasks, how many diverge by 2,000 steps", x

    return numbers


def explosion(read: Callable) -> Numbers:
    for name, what, key, at in (
        ("metz2abc", "one weight, slope at the threshold", "max_slope_at_threshold", 0),
        ("metz2ef", "momentum SGD, largest slope", "max_slope", None),
        ("metz2ef", "the same, smoothed", "max_slope_smoothed", None),
    ):
        found = figure(read, name)
        x, t = (y if at is None else y[at] for y in (found[key], found["horizon"]))
        yield what, {f"T = {t[i]:.0f}": x[i] for i in (0, -1)}


def truncation(read: Callable) -> Numbers:
    found = figure(read, "metz3")
    for i, start in enumerate(found["starts"]):
        ends = [of_length[0][i] for of_length in found["final_rate"]]
        x = dict(zip(found["estimators"], ends, strict=True))
        what = f"Adam's rate learned from {start:g}, K = {found['lengths'][0]:.0f}"
        yield what, x | {"best": found["best_rate"]}


def opposed(read: Callable) -> Numbers:
    found = figure(read, "metz3")
    for i, rate in enumerate(found["probes"]):
        x = {"whole": found["full_gradient"][i]}
        for length, grads in zip(
            found["lengths"], found["truncated_gradient"], strict=True
        ):
            x[f"K = {length:.0f}"] = grads[i]
        yield f"gradient by ln(rate) at rate {rate:.2g}", x


def merge_variance(read: Callable) -> Numbers:
    """The merge of the most pairs, at the shortest unroll, the middle one and the last."""
    found = figure(read, "metz4")
    pairs, ratios = found["pairs_merged"][-1], found["merged_over_better"][-1]
    for rate, row in zip(found["learning_rates"], ratios, strict=True):
        x = dict(zip(found["lengths"], row, strict=True))
        x = {f"unroll {t:.0f}": ratio for t, ratio in x.items() if t in (3, 20, 200)}
        yield f"merge of {pairs:.0f} pairs over the better variance, rate {rate:g}", x


def ablation(*names: str) -> Callable:
    """Mean losses over T = 500 steps, of Metz's recipe with one thing changed."""

    def numbers(read):
        found = figure(read, "metz8")
        x = dict(zip(found["ablations"], found["fresh_loss"], strict=True))
        yield "`fmnist_small`, mean loss over 500 steps", {k: x[k] for k in names}

    return numbers


def conv_classes(key: str, *names: str) -> Callable:
    """Means over fresh members of the family, each of one meta-seed."""
    what = {
        "mean_loss": "mean training loss over 1,000 steps",
        "last_loss": "training loss, last 100 of 1,000 steps",
        "test_loss": "test loss after 1,000 steps",
    }[key]

    def numbers(read):
        found = figure(read, "metz6_conv_classes_small")
        x = dict(zip(found["optimizers"], found[key], strict=True))
        yield f"`conv_classes_small`, {what}", {k: statistics.mean(x[k]) for k in names}

    return numbers


def conv_noise(read: Callable) -> Numbers:
    found = figure(read, "metz6_conv_classes_small")["median_gradient_noise"]
    yield "median noise of the meta-gradient", found


def momentum(read: Callable) -> Numbers:
    found = figure(read, "gru7c")
    decay, _, rate, _ = found["first_modes"][-1][0]
    for i, (name, x) in enumerate({"learning rate": rate, "momentum": decay}.items()):
        tuned, theory = found["tuned_momentum"][i], found["heavy_ball"][i]
        yield name, {"first mode": [x], "tuned momentum": tuned, "heavy ball": theory}


def modes(read: Callable) -> Numbers:
    found = figure(read, "gru7c")
    x = dict(zip(found["optimizers"], found["mean_loss_and_error"], strict=True))
    names = {
        "itself": "the GRU",
        "linearised": "linearized",
        "first mode alone": "one mode",
    }
    yield "mean loss", {to: [x[f"trained: {name}"][0]] for name, to in names.items()}


def three_tasks(read: Callable) -> Numbers:
    found = figure(read, "gru9")
    for task, (*baselines, gru) in zip(found["task"], found["mean_loss"], strict=True):
        x = {"the GRU": [gru], "best baseline": min(baselines)}
        yield f"{task.replace('_', ' ')}, mean loss", x


CONV = "fig3_cifar10_conv_16x16"
CONV_32 = "3_cifar10_conv", "mean_loss_over_horizon", "mean loss, one fresh network"
PLACES = "fig3_fmnist", "fig3_small", CONV
NUMBERS = {
    "adam": adam,
    "arrived": arrived,
    "at_the_bound": at_the_bound,
    "blackbox_far": every(
        far("3_fmnist", "blackbox"), far("3_fmnist_small", "blackbox")
    ),
    "conv_adam8": conv_classes("last_loss", "merged", "Adam's eight"),
    "conv_es": conv_classes("mean_loss", "merged", "ES only"),
    "conv_gradients": conv_classes("mean_loss", "merged", "gradients only"),
    "conv_far": every(
        far("3_cifar10_conv_16x16", "blackbox"), far("3_cifar10_conv", "blackbox")
    ),
    "conv_noise": conv_noise,
    "conv_valid": conv_classes("test_loss", "merged", "merged, validation loss"),
    "decays": losses(*DECAYS),
    "decays_end": decays_end,
    "decays_far": every(far("app2_fmnist", *DECAYS), far("app2_fmnist_small", *DECAYS)),
    "es_alone": ablation("merged", "ES only"),
    "explosion": explosion,
    "faster": faster("hyperparam"),
    "hyperparam_far": every(
        later("3_fmnist", 10_000),
        later("3_fmnist_small", 100_000),
        later("3_cifar10_conv_16x16", 10_000),
        later("3_cifar10_conv", 10_000),
    ),
    "gradients_alone": ablation("merged", "gradients only"),
    "merge_variance": merge_variance,
    "modes": modes,
    "momentum": momentum,
    "near_optimal": near_optimal,
    "no_momentum": ablation("merged", "no momentum"),
    "no_time": ablation("merged", "no time"),
    "nominal": losses(STAR, "no_nominal"),
    "nominal_terms": nominal_terms,
    "opposed": opposed,
    "paper_beta3": paper_beta3,
    "preconditioner": losses(STAR, "no_preconditioner"),
    "radius": radius,
    "star_far": every(
        far("3_fmnist", "star_wd0.1", STAR), far("3_fmnist_small", "star_wd0.1", STAR)
    ),
    "suite_blackbox": one_horizon("blackbox"),
    "suite_far": suite,
    "suite_hyperparam": one_horizon("hyperparam"),
    "than_blackbox": every(
        losses(STAR, "blackbox", of=("fig3_fmnist", CONV)),
        drawn(*CONV_32, STAR, "blackbox"),
        faster("blackbox"),
    ),
    "than_hyperparam": every(
        losses(STAR, "hyperparam", of=PLACES), drawn(*CONV_32, STAR, "hyperparam")
    ),
    "three_tasks": three_tasks,
    "times_as_long": times_as_long,
    "truncation": truncation,
    "unrolls": ablation("merged", "unroll 10", "unroll 50", "unroll 200"),
    "variance": variance,
}


# --- The page
def claims() -> Iterator[tuple[str, str, str, str, list[str]]]:
    """(link, paper, claim, verdict, sources) of every row of CLAIMS."""
    for section in re.sub(r"\n +\|", " |", CLAIMS).strip().split("\n\n"):
        link, *rows = section.splitlines()
        for row in rows:
            paper, claim, verdict, *sources = (cell.strip() for cell in row.split("|"))
            yield link, paper, claim, verdict, sources


def place(name: str) -> str:
    """A link to a result file, or to the folder of a sweep."""
    path = pathlib.Path(name)
    path = path.parents[1] if name.startswith("weights/fig3") else path
    return f"[{path.name}](../{path.as_posix()})"


def table(header: str, rows: list) -> str:
    rows = [header.split(", "), ["---"] * len(header.split(", ")), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary() -> str:
    """How many claims have which verdict."""
    verdicts = [verdict for _, _, _, verdict, _ in claims()]
    but = sum(verdict.startswith("holds here but") for verdict in verdicts)
    lost = [*not_here()]
    some = sum(any(x in NUMBERS for x in sources) for *_, sources in claims())
    return (
        f"Of {len(verdicts)} claims {verdicts.count('holds')} hold, {but} hold here with"
        f" a restriction, {len(lost)} do not hold here, {verdicts.count('not tried')} was"
        f" not tried.\nResult files have numbers for {some} of them."
        " These do not hold here:\n\n" + "\n".join(lost)
    )


def not_here() -> Iterator[str]:
    for _, paper, claim, verdict, _ in claims():
        if verdict.startswith("does not hold here"):
            how = verdict.removeprefix("does not hold here").strip(":, ")
            yield f"- {paper}: {claim}" + (f" ({how})." if how else ".")


def page() -> str:
    """A row for each measurement. The first row of a claim names it."""
    body, seen, commands = [], [], {}

    def reader(name):
        seen.append(name)
        return read(name)

    def measured(source):
        if source not in NUMBERS:
            file = f"no file: `{source}` shows it"
            return [["", "", "", "", file]]
        found = NUMBERS[source](reader)
        return [[what, *cells(x), place(seen[-1])] for what, x in found]

    for link, paper, claim, verdict, sources in claims():
        rows = [row for source in sources for row in measured(source)] or [[""] * 5]
        named = [f"[{paper}]({link})", claim, verdict], *[[""] * 3] * (len(rows) - 1)
        body += [left + right for left, right in zip(named, rows, strict=True)]
    seen += [f"{RESULTS}/{x.name}" for x in sorted((ROOT / RESULTS).glob("*.json"))]
    for name in filter(lambda name: name.endswith("json"), seen):
        such = "each card has its own, such as " * name.startswith("weights/fig3")
        command = COMMANDS.get(name) or read(name)["command"]
        commands.setdefault(place(name), f"{such}`{command}`")
    header = "paper, claim, verdict, what, here, seeds, spread, file"
    made = table("file, made by", [[*x] for x in commands.items()])
    top = INTRO.format(summary())
    return "\n".join((top, table(header, body), "\n## The files\n", made, ""))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) not in (0, 2):
        raise store.UserError(
            "either no arguments, or the JSON of a figure and its command"
        )
    if argv:
        keep(*argv)
    PAGE.write_text(page())
    print(PAGE.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(store.run_command("experiments.claims", main))
