"""Options with which tests build members whose layers or windows are large by default."""

SMALL: dict[str, dict] = {
    "anyup": dict(qk_dim=16),
    "featup_jbu": dict(key_dim=8, radius=1),
    "freqfusion": dict(compressed_channels=8),
    "jafar": dict(qk_dim=16),
    "loftup": dict(n_freqs=3, num_layers=1, lr_size=4),
    "naf": dict(dim=32, kernel_size=3),
    "raysup": dict(qk_dim=32),
    "uplift": dict(encoder=((8,), (8,)), decoder=((8,), (20,)), decoder_convs=1),
    "upsample_anything": dict(r_max=2, steps=3),
}
