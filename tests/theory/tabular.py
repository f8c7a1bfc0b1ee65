"""METHOD.md's facts on tabular policies: a policy is a vector of logits over all responses."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize


def minimise(loss, *starts):
  """The logits at which a smooth loss is least, from each start."""
  value_and_slope = jax.jit(jax.value_and_grad(loss))

  def as_numpy(logits):
    value, slope = value_and_slope(jnp.asarray(logits))
    return float(value), np.asarray(slope, float)

  options = {"maxiter": 5000, "maxfun": 20000, "gtol": 1e-10, "ftol": 1e-15, "maxls": 50}
  return [
    scipy.optimize.minimize(as_numpy, start, jac=True, method="L-BFGS-B", options=options).x
    for start in starts
  ]
