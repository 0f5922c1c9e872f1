"""Every case of make_vectors.py: STAR's nominal terms, ablations and odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import star
from experiments import make_vectors

ARRAYS = np.load(make_vectors.VECTORS)


@pytest.mark.parametrize("case", make_vectors.CASES)
def test_star_equals_the_authors_code(case):
    """The same parameters after every update as google/learned_optimization's."""
    own = {
        k.removeprefix(f"{case}/"): x
        for k, x in ARRAYS.items()
        if case == k.split("/")[0]
    }
    theta = {k[6:]: jnp.asarray(x) for k, x in own.items() if k.startswith("theta/")}
    optimizer = star.learned_optimizer(make_vectors.CASES[case][0])
    update = jax.jit(optimizer.update)
    params = jnp.asarray(own["params0"])
    state = optimizer.init(params)._replace(count=jnp.asarray(own["step0"]))
    for grads, expected in zip(own["grads"], own["params"], strict=True):
        updates, state = update(theta, jnp.asarray(grads), state, params)
        params = params + updates
        np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-7)
