"""The authors' numbers for tests/test_vectors.npz: python -m experiments.make_vectors

`--library FOLDER` is a checkout of google/learned_optimization. `against.py` says what it
needs. The command runs the authors' optimizers on the inputs of each case in the file and
prints the largest difference to the file's results. `--out FILE` writes what it computed.
A case that the file lacks gets inputs that are drawn.

A case consists of arrays for T updates of one tensor of shape S. CASE/theta/NAME is as in
star.py. CASE/step0 () int32 counts the updates done before. CASE/params0 (*S) and
CASE/grads (T, *S) are inputs, CASE/params (T, *S) results. The middle gradient is 0.
"""

import pathlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import star
from experiments.against import import_library
from store import Arguments, read_npz, run_command, write_atomically

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "tests" / "test_vectors.npz"
STAR, BLACKBOX = star.CONSTANTS["star"], star.CONSTANTS["blackbox"]
THEIR_NAMES = dict(sgd="SGD", sgdm="SGDM", aggmo="AggMo", adam="Adam")


# Name -> constants and shape of the tensor.
CASES = {
    "star_matrix": (STAR, (5, 7)),
    "star_vector": (STAR, (6,)),
    "star_conv": (STAR, (3, 3, 4, 6)),
    "blackbox_matrix": (BLACKBOX, (5, 7)),
    "hyperparam_matrix": (star.CONSTANTS["hyperparam"], (7, 5)),
    "scalar": (STAR, ()),
    "one_row": (STAR, (1, 6)),
    "rank_three": (STAR, (2, 5, 3)),
    "no_nominal": (star.CONSTANTS["no_nominal"], (4, 6)),
    "no_preconditioner": (star.CONSTANTS["no_preconditioner"], (4, 6)),
} | {f"nominal_{n}": (STAR._replace(nominal=n), (4, 6)) for n in THEIR_NAMES}


def drawn(c: star.Constants, shape: tuple[int, ...], seed: int) -> dict:
    """Inputs of a case with T = 8 and gradients between 1e-3 and 10 in size."""
    rng = np.random.default_rng(seed)
    grads = 10 ** rng.uniform(-3, 1) * rng.normal(size=(8, *shape))
    grads[4] = 0
    inputs = {"params0": rng.normal(size=shape), "grads": grads}
    for name, size in star.theta_shapes(c).items():
        scale = size[0] ** -0.5 if name.startswith("w") else 0.02
        inputs[f"theta/{name}"] = scale * rng.normal(size=size)
    return jax.tree.map(np.float32, inputs) | {"step0": np.int32(rng.integers(5000))}


def their_optimizer(nominal: Any, adafac: Any, c: star.Constants) -> Any:
    """MLPNomLOpt with our constants, or AdafacMLPLOpt (small_fc_lopt) for blackbox."""
    if c == BLACKBOX:
        return adafac.AdafacMLPLOpt()
    return nominal.MLPNomLOpt(
        exp_mult=(c.beta4, c.beta2, 0.0),
        step_mult=c.beta3,
        nominal_stepsize=0.0 if c.nominal == "none" else c.beta1,
        nominal_controller=c.nominal != "none",
        nominal_grad_estimator=THEIR_NAMES.get(c.nominal, "AdamAggMo"),
        normalize_blackbox=c.preconditioner,
    )


def their_params(optimizer: Any, case: dict[str, np.ndarray]) -> np.ndarray:
    """Parameters (T, *S) after each update of their optimizer on a case's inputs."""
    theta = {k[6:]: jnp.asarray(x) for k, x in case.items() if k.startswith("theta/")}
    network = optimizer.init(jax.random.PRNGKey(0))["nn"]["~"]
    for name, x in network.items():  # MLPNomLOpt has four heads, the unused ones 0 here
        heads = theta[name].shape[-1]
        network[name] = jnp.zeros_like(x).at[..., :heads].set(theta[name])
    one = optimizer.opt_fn(theta | {"nn": {"~": network}})
    state = one.init({"x": jnp.asarray(case["params0"])}, num_steps=len(case["grads"]))
    state, params = state.replace(iteration=jnp.asarray(case["step0"])), []
    for g in case["grads"]:
        state = one.update(state, {"x": jnp.asarray(g)}, loss=jnp.float32(0))
        params.append(np.asarray(state.params["x"]))
    return np.stack(params)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Arguments()
    parser.add_argument("--library", required=True)
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    names = "learned_optimizers.adafac_nominal", "learned_optimizers.adafac_mlp_lopt"
    modules = import_library(args.library, *names)
    before, out = read_npz(VECTORS), {}
    for seed, (name, (constants, shape)) in enumerate(CASES.items()):
        start = f"{name}/"
        old = {k[len(start) :]: x for k, x in before.items() if k.startswith(start)}
        new = dict(old) or drawn(constants, shape, seed)
        new["params"] = their_params(their_optimizer(*modules, constants), new)
        out |= {start + key: x for key, x in new.items()}
        print(name, abs(new["params"] - old["params"]).max() if old else "is new")
    if args.out:
        write_atomically(pathlib.Path(args.out), partial(np.savez_compressed, **out))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("make_vectors.py", main))
