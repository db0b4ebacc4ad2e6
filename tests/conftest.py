"""Test-wide settings: strict numerics, eight fake CPU devices, and where the golden tensors are."""

import os

# Workers of pytest-xdist share the machine: without this each would start a thread per core.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# grain's multiprocess prefetch reads absl flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()
