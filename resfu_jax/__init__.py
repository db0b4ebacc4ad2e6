"""resfu_jax: feature upsampling in JAX."""
