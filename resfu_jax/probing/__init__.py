"""The parts of `resfu_jax.probe`: its settings, the images it sees, the results it keeps."""
