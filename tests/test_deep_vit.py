"""Deep ViTs: blocks as one array in a scan, fixed positions, MIRL's variants and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.backbones import ViT
from resfu_jax.convert import load_backbone, load_pretrained
from resfu_jax.convert.vit import load_vit, options_of
from resfu_jax.training import Layout, OptimizerConfig, ParallelConfig
from resfu_jax.training.flops import count_flops
from resfu_jax.training.optimizer import create_optimizer, decay_mask, learning_rate_multiples

SMALL = dict(width=8, depth=6, heads=2, patch_size=4, image_size=8)
IMAGES = jax.random.normal(jax.random.key(7), (2, 8, 12, 3))


def both(**options):
    """A ViT with its blocks one by one, and one that scans over the same blocks."""
    options = SMALL | options
    loop = ViT(**options, rngs=nnx.Rngs(0))
    scanned = ViT(**options, scan=True, rngs=nnx.Rngs(1))
    for name, module in vars(loop).items():
        if name not in ("blocks", "scan"):
            setattr(scanned, name, module)
    scanned.set_blocks([loop.block(i) for i in range(loop.depth)])
    return loop, scanned


def value_and_gradients(vit, blocks=lambda g: g):
    graphdef, params, rest = nnx.split(vit, nnx.Param, ...)

    @jax.jit
    def run(params, images):
        maps = nnx.merge(graphdef, params, rest, copy=True)(images)
        return sum((jnp.sin(3 * y)).sum() for y in maps), maps

    (_, maps), slopes = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, IMAGES)
    return maps, nnx.as_pure(slopes[0]), slopes[1]


@pytest.mark.parametrize(
    "options",
    [
        dict(layers=(1, 3, 5), layer_scale=True, drop_path=0.5),  # equal steps: scans in a scan
        dict(layers=(0, 3), positions="sincos", remat=True),  # other steps; blocks that do not run
        dict(positions="rope", registers=2, key_bias=False),
    ],
)
def test_scan_equals_the_loop(options):
    loop, scanned = both(**options)
    maps, params, images = value_and_gradients(loop)
    found, stacked, along = value_and_gradients(scanned)
    assert len(found) == len(maps)
    for a, b in zip(found, maps, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(along, images, atol=2e-5)
    blocks = params.pop("blocks")
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(blocks[i] for i in range(6)))
    for a, b in ((stacked.pop("blocks"), expected), (stacked, params)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


def test_dropped_paths_are_drawn_anew_in_the_loop_and_in_the_scan():
    loop, scanned = both(drop_path=0.5)
    first, second = scanned(IMAGES)[0], scanned(IMAGES)[0]
    assert not np.allclose(first, second, atol=1e-3)
    loop(IMAGES)
    np.testing.assert_allclose(second, loop(IMAGES)[0], atol=2e-6)
    still = nnx.view(scanned, deterministic=True)
    np.testing.assert_array_equal(still(IMAGES)[0], still(IMAGES)[0])


def test_the_program_does_not_grow_with_the_depth():
    """Neither the forward pass nor its gradient, with the outputs of six segments."""

    def size(depth):
        layers = tuple(range(depth // 6 - 1, depth, depth // 6))
        vit = nnx.eval_shape(
            lambda: ViT(**(SMALL | dict(depth=depth)), scan=True, layers=layers, rngs=nnx.Rngs(0))
        )
        graphdef, state = nnx.split(nnx.view(vit, deterministic=True))
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def energy(params, rest, images):
            return sum(y.sum() for y in nnx.merge(graphdef, params, rest)(images))

        lowered = jax.jit(jax.grad(energy)).lower(params, rest, IMAGES)
        return len(lowered.as_text().splitlines())

    assert size(54) == size(12)


def test_flops_of_the_scan_are_those_of_the_loop():
    counts = []
    for vit in both(layers=(1, 3, 5)):
        graphdef, state = nnx.split(vit)
        counts.append(
            count_flops(lambda s, x, g=graphdef: nnx.merge(g, s, copy=True)(x), state, IMAGES)
        )
    assert counts[0] == counts[1] > 1e5


def test_visible_patches_alone(as_users_call):
    for options in (dict(positions="sincos"), dict(positions="rope", registers=1), {}):
        vit = ViT(**(SMALL | options), rngs=nnx.Rngs(0))
        every = jnp.tile(jnp.arange(6, dtype=jnp.int32)[None], (2, 1))
        _, whole = vit.encode_visible(IMAGES, every)
        prefix = 1 + options.get("registers", 0)
        maps = vit.norm(whole)[:, prefix:].reshape(2, 2, 3, 8)
        np.testing.assert_allclose(maps, vit(IMAGES)[0], atol=1e-6)
        # Order does not matter, but for the order of what comes out.
        some = jnp.array([[5, 0, 3], [1, 2, 4]], jnp.int32)
        entering, after = vit.encode_visible(IMAGES, some)
        assert entering.shape == after.shape == (2, prefix + 3, 8)
        _, turned = vit.encode_visible(IMAGES, some[:, ::-1])
        turned = jnp.concatenate([turned[:, :prefix], turned[:, prefix:][:, ::-1]], axis=1)
        np.testing.assert_allclose(after, turned, atol=1e-6)
    with pytest.raises(ValueError, match="visible must be whole numbers"):
        vit.encode_visible(IMAGES, jnp.zeros((2, 3)))


def test_the_last_activations_of_a_scanned_classifier():
    loop, scanned = both(num_classes=3)
    for vit in (loop, scanned):
        vit.head.kernel.set_value(jnp.ones_like(vit.head.kernel[...]))
        activations, logits = vit.last_activations(IMAGES)
        np.testing.assert_allclose(logits(activations), vit.classify(IMAGES), atol=1e-6)


# ------------------------------------------------------------------------------ what trains with it
def test_stacked_blocks_decay_and_learn_as_the_blocks_do():
    rates = OptimizerConfig(layer_decay=0.5, learning_rate=0.1, warmup_steps=0, weight_decay=0.3)
    updates, masks = [], []
    for vit in both(layer_scale=True):
        params = {"backbone": nnx.as_pure(nnx.state(vit, nnx.Param))}
        optimizer = create_optimizer(rates, 4)
        slopes = jax.tree.map(jnp.ones_like, params)
        with jax.numpy_dtype_promotion("standard"):  # optax
            update, _ = optimizer.update(slopes, optimizer.init(params), params)
        updates.append(update["backbone"])
        masks.append(decay_mask(params)["backbone"])
        multiples = learning_rate_multiples(rates, params)["backbone"]
    blocks = updates[0].pop("blocks")
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(blocks[i] for i in range(6)))
    jax.tree.map(np.testing.assert_allclose, updates[1].pop("blocks"), expected)
    jax.tree.map(np.testing.assert_allclose, updates[1], updates[0])
    assert masks[1]["blocks"] == masks[0]["blocks"][0]
    assert not masks[1]["blocks"]["attention_scale"] and masks[1]["blocks"]["ffn"]["expand"]
    scale = multiples["blocks"]["attention"]["query"]["bias"]
    assert scale.shape == (6, 1) and scale[-1] == 0.5 and multiples["norm"]["bias"] == 1


def test_stacked_blocks_are_sharded_along_a_long_axis():
    layout = Layout(ParallelConfig(shard_parameters=True, shard_at_least=1))
    vit = nnx.eval_shape(lambda: ViT(**(SMALL | dict(depth=4)), scan=True, rngs=nnx.Rngs(0)))
    kernel = layout.sharding(vit.blocks.ffn.expand.kernel.get_value())
    assert kernel.spec == jax.sharding.PartitionSpec(None, None, "data")


# ------------------------------------------------------------------------------------ MIRL's models
def test_the_published_sizes():
    """Parameters of the encoders: 12 C^2 + 13 C a block, the patches', class token and norm."""
    for variant, (width, depth, heads) in {
        "s54": (384, 54, 12),
        "b24": (768, 24, 12),
        "b48": (768, 48, 12),
    }.items():
        vit = nnx.eval_shape(lambda v=variant: ViT(v, rngs=nnx.Rngs(0)))
        count = sum(p.size for p in jax.tree.leaves(nnx.state(vit, nnx.Param)))
        assert count == depth * (12 * width**2 + 13 * width) + (768 + 1) * width + 3 * width
        assert (vit.heads, vit.scan, vit.positions, vit.strides) == (heads, True, None, (16,))


def published(rng, depth=6, width=8, patch=4, side=2):
    """Entries of a file of the authors' `MIRLViT`, as PaddlePaddle stores them."""
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)))  # here w goes first
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    halves = [np.concatenate([np.sin(a), np.cos(a)], 1) for a in grid.reshape(2, -1, 1) * omega]
    table = np.concatenate([np.zeros((1, width)), np.concatenate(halves, axis=1)])
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "mask_token0": (1, 1, 12),
        "decoder_embed0.weight": (width, 12),
        "decoder_embed0_1.bias": (12,),
        "decoder_pos_embed0": (1, 5, 12),
        "decoder_blocks0.0.cross_attn.kv.weight": (12, 24),
        "decoder_norm0.weight": (12,),
        "decoder_pred0.weight_v": (12, 48),
    }
    for norm in ("norm", "norm_low", "norm0", "norm4"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(depth):
        for name, (n, m) in {
            "attn.qkv": (width, 3 * width),
            "attn.proj": (width, width),
            "mlp.fc1": (width, 4 * width),
            "mlp.fc2": (4 * width, width),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (n, m), f"blocks.{i}.{name}.bias": (m,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    entries = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return entries | {"pos_embed": table[None].astype(np.float32)}


def turned(entries):
    """The same as PyTorch stores them, as the authors' script converts a file."""
    inside = ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    return {k: v.T if k.endswith(inside) and v.ndim == 2 else v for k, v in entries.items()}


@pytest.mark.parametrize("scan", [False, True])
def test_files_of_the_authors(scan, tmp_path):
    entries = published(np.random.default_rng(0))
    options = SMALL | dict(image_size=16)
    vit, other = (
        ViT("s54", **(options | dict(scan=scan)), rngs=nnx.Rngs(seed)) for seed in range(2)
    )
    np.savez(tmp_path / "mirl.npz", **entries)
    unused = load_pretrained(tmp_path / "mirl.npz", vit)
    assert "decoder_pred0.weight_v" in unused and "norm_low.bias" in unused
    assert not [n for n in unused if n.startswith(("blocks", "cls", "patch", "pos", "norm."))]
    query = vit.block(5).attention.query
    np.testing.assert_array_equal(query.kernel[...], entries["blocks.5.attn.qkv.weight"][:, :8])
    np.testing.assert_array_equal(
        vit.block(2).ffn.contract.kernel[...], entries["blocks.2.mlp.fc2.weight"]
    )
    load_vit(turned(entries), other, "converted.pth")
    np.testing.assert_array_equal(vit(IMAGES)[0], other(IMAGES)[0])


def test_files_that_are_no_such_model():
    entries = published(np.random.default_rng(0))
    vit = ViT("s54", **SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unexpected 'fc_norm\.weight'"):
        load_vit(entries | {"fc_norm.weight": np.ones(8, np.float32)}, vit, "fine-tuned")
    with pytest.raises(ValueError, match="'pos_embed' is not the table of sines and cosines"):
        load_vit(entries | {"pos_embed": entries["pos_embed"] + 1}, vit, "fine-tuned")
    before = vit.block(0).attention.key.kernel[...]
    with pytest.raises(ValueError, match=r"missing 'blocks\.3\.attn\.k\.bias'"):
        load_vit({k: v for k, v in entries.items() if k != "blocks.3.attn.qkv.bias"}, vit, "cut")
    np.testing.assert_array_equal(vit.block(0).attention.key.kernel[...], before)


def test_a_file_is_recognised_by_its_sizes(tmp_path):
    shapes = {k: v.shape for k, v in published(np.random.default_rng(0), depth=2).items()}
    found = options_of(shapes)
    assert (found["depth"], found["mlp_ratio"], found["positions"]) == (2, 4, "learned")
    shapes = {
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "pos_embed": (1, 197, 384),
        "blocks.0.attn.qkv.weight": (384, 1152),
        "blocks.0.mlp.fc1.weight": (384, 1536),
    } | {f"blocks.{i}.norm1.weight": (384,) for i in range(54)}
    found = options_of(shapes)
    assert (found["heads"], found["positions"], found["scan"]) == (12, "sincos", True)
    assert options_of({**shapes, "blocks.0.attn.qkv.weight": (1152, 384)})["mlp_ratio"] != 4
    entries = published(np.random.default_rng(0))
    np.savez(tmp_path / "tiny.npz", **entries)
    vit = load_backbone(tmp_path / "tiny.npz", heads=2, positions="sincos", scan=True)
    assert vit(IMAGES)[0].shape == (2, 2, 3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positions="sincos", width=6, heads=3), "multiple of 4, got width=6"),
        (dict(initial="he"), "initial must be one of normal, xavier, got 'he'"),
        (dict(scan="yes"), "scan must be"),
    ],
)
def test_options_that_do_not_fit(options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        ViT(**(SMALL | options), rngs=nnx.Rngs(0))
