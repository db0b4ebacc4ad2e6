"""MIRL's decoders and loss against a literal transcription of the equations in NumPy.

No official tensors exist: the authors' code is for PaddlePaddle and its weights are behind a login.
What is compared is `resfu_jax/heads/mirl.py` and the visible patches' pass of the ViT with plain
loops in float64, written from the equations at the head of that file; gradients with differences of
the transcription's loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from resfu_jax.backbones import ViT
from resfu_jax.heads.mirl import (
    MIRLHead,
    images_of,
    normalise_patches,
    pair_sums,
    patches_of,
)
from resfu_jax.tasks.mirl import MIRLModel

WIDTH, DECODER, HEADS, PATCH, GRID = 8, 12, 2, 2, (3, 4)
VISIBLE = np.array([[1, 4, 11], [0, 2, 7]])
MASKED = np.array([np.setdiff1d(np.arange(12), row) for row in VISIBLE])


def model_of(segments, scan=False, depth=4):
    rngs = nnx.Rngs(0)
    vit = ViT(
        "s54",
        width=WIDTH,
        depth=depth,
        heads=HEADS,
        patch_size=PATCH,
        scan=scan,
        layers=tuple(range(depth // segments - 1, depth, depth // segments)),
        rngs=rngs,
    )
    head = MIRLHead(
        WIDTH, 3 * PATCH**2, segments=segments, width=DECODER, depth=2, heads=HEADS, rngs=rngs
    )
    return MIRLModel(vit, head, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 4.0))


def loss_of(model, images):
    predictions = model(images, jnp.asarray(VISIBLE))
    target, _, _ = normalise_patches(model.patches(images))
    errors = [
        jnp.square(jnp.take_along_axis(x - target, jnp.asarray(MASKED)[..., None], axis=1)).mean()
        for x in pair_sums(predictions)
    ]
    return sum(errors) / len(errors)


# ---------------------------------------------------------------------- the equations, in NumPy
def norm(p, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def attention(p, x, context):
    q, k, v = linear(p["query"], x), linear(p["key"], context), linear(p["value"], context)
    size = q.shape[-1] // HEADS
    out = np.zeros_like(q)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            scores = np.exp([np.dot(q[i, part], row) / np.sqrt(size) for row in k[:, part]])
            out[i, part] = scores @ v[:, part] / scores.sum()
    return linear(p["out"], out)


def ffn(p, x):
    y = linear(p["expand"], x)
    return linear(p["contract"], y * (1 + erf(y / np.sqrt(2))) / 2)


def encoder_block(p, x):
    y = norm(p["attention_norm"], x)
    x = x + attention(p["attention"], y, y)
    return x + ffn(p["ffn"], norm(p["ffn_norm"], x))


def decoder_block(p, x, context):
    y = norm(p["attention_norm"], x)
    x = x + attention(p["attention"], y, y)
    y = norm(p["context_norm"], context)
    x = x + attention(p["cross_attention"], norm(p["cross_norm"], x), y)
    return x + ffn(p["ffn"], norm(p["ffn_norm"], x))


def positions(width):
    table = np.zeros((*GRID, width))
    quarter = width // 4
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            for k in range(quarter):
                frequency = 1 / 10000 ** (k / quarter)
                table[y, x, k] = np.sin(x * frequency)
                table[y, x, quarter + k] = np.cos(x * frequency)
                table[y, x, 2 * quarter + k] = np.sin(y * frequency)
                table[y, x, 3 * quarter + k] = np.cos(y * frequency)
    return table.reshape(-1, width)


def patches(image):
    return np.array(
        [
            image[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].ravel()
            for y in range(GRID[0])
            for x in range(GRID[1])
        ]
    )


def predictions_of(p, image, visible, segments, depth):
    vit, head = p["backbone"], p["head"]
    z = patches(image) @ vit["embed"]["kernel"].reshape(-1, WIDTH) + vit["embed"]["bias"]
    z = (z + positions(WIDTH))[visible]
    z = np.concatenate([vit["class_token"][None], z])
    tokens = [z]
    for i in range(depth):
        z = encoder_block(vit["blocks"][i], z)
        if (i + 1) % (depth // segments) == 0:
            tokens.append(z)
    context = linear(head["image_embed"], norm(head["image_norm"], tokens[0]))
    found = []
    for s in range(segments):
        d = head["decoders"][s]
        last = s == segments - 1
        tokens_norm = vit["norm"] if last else head["norms"][s]
        seen = linear(d["embed"], norm(tokens_norm, tokens[s + 1]))
        q = np.repeat(d["mask_token"], GRID[0] * GRID[1], axis=0)
        for token, place in enumerate(visible):
            q[place] = seen[1 + token]
        q = np.concatenate([seen[:1], q + positions(DECODER)])
        for block in range(2):
            q = decoder_block(d["blocks"][block], q, context)
        q = norm(d["norm"], q)
        weight = d["predict"]["direction"]
        weight = weight / np.sqrt((weight**2).sum(axis=1, keepdims=True) + 1e-12)
        found.append((q @ weight + d["predict"]["bias"])[1:])
        context = np.concatenate([seen, context])
    return found


def literal_loss(p, images, segments, depth=4):
    total, pairs = 0.0, max(1, segments // 2)
    for image, visible, masked in zip(images, VISIBLE, MASKED, strict=True):
        image = (image - [1, 2, 3]) / [2, 2, 4]
        x = predictions_of(p, image, visible, segments, depth)
        for s in range(pairs):
            pair = x[s] if segments == 1 else x[s] + x[segments - 1 - s]
            for place in masked:
                patch = patches(image)[place]
                target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
                total += ((pair[place] - target) ** 2).mean()
    return total / MASKED.size / pairs


# ------------------------------------------------------------------------------------------- tests
def in_float64(segments):
    graphdef, params, rest = nnx.split(model_of(segments), nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = nnx.as_pure(params)
    params = jax.tree.map(lambda x: np.float64(x) + 0.1 * rng.normal(size=x.shape), params)
    images = rng.uniform(0, 9, (2, GRID[0] * PATCH, GRID[1] * PATCH, 3))
    return graphdef, params, rest, images


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_equations(segments):
    with jax.enable_x64(True):
        graphdef, params, rest, images = in_float64(segments)

        def ours(params):
            return loss_of(nnx.merge(graphdef, params, rest, copy=True), jnp.asarray(images))

        loss, gradients = jax.jit(jax.value_and_grad(ours))(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(loss, literal_loss(params, images, segments), rtol=1e-12)

    # Along a random direction of every part of the model that has its own place in the equations.
    rng = np.random.default_rng(1)
    leaves, structure = jax.tree.flatten_with_path(params)
    slopes = jax.tree.leaves(gradients)
    groups = {}
    for i, (path, _) in enumerate(leaves):
        groups.setdefault(tuple(str(k) for k in path[:3]), []).append(i)
    assert len(groups) > 8
    for group, members in groups.items():
        along = {i: rng.normal(size=leaves[i][1].shape) for i in members}

        def moved(step, along=along):
            values = [x + step * along.get(i, 0.0) for i, (_, x) in enumerate(leaves)]
            return literal_loss(jax.tree.unflatten(structure, values), images, segments)

        slope = sum(np.vdot(slopes[i], along[i]) for i in members)
        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8, err_msg=str(group))


def test_a_prediction_does_not_see_what_is_masked():
    model = model_of(2)
    images = jax.random.uniform(jax.random.key(0), (2, 6, 8, 3)) * 9
    hidden = np.ones((2, 12, 1), np.float32)
    hidden[np.arange(2)[:, None], VISIBLE] = 0
    noise = images_of(jnp.asarray(np.repeat(hidden, 12, axis=2)), GRID, PATCH)
    call = jax.jit(lambda model, images: model(images, jnp.asarray(VISIBLE)))
    for a, b in zip(call(model, images), call(model, images + noise), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (images_of(patches_of(images, PATCH), GRID, PATCH) == images).all()


def test_deep_segments_reach_what_shallow_ones_found():
    """The gradient of the deepest prediction reaches the first segment, not the other way."""
    model = model_of(2, scan=True)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.uniform(jax.random.key(0), (2, 6, 8, 3)) * 9

    def energy(params, s):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.square(model(images, jnp.asarray(VISIBLE))[s]).sum()

    for s, reached in ((0, [True, False]), (1, [True, True])):
        slope = nnx.as_pure(jax.jit(jax.grad(energy), static_argnums=1)(params, s))
        decoders = [jnp.abs(slope["head"]["decoders"][d]["embed"]["kernel"]).max() for d in (0, 1)]
        assert [d > 0 for d in decoders] == reached
        blocks = jnp.abs(slope["backbone"]["blocks"]["ffn"]["expand"]["kernel"]).max(axis=(1, 2))
        assert [(b > 0).item() for b in blocks] == [True, True, *[s == 1] * 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segments=3), "segments must be even, or 1, got 3"),
        (dict(width=10, heads=2), "width must be a multiple of 4, got 10"),
        (dict(width=12, heads=5), "heads must divide width"),
        (dict(depth=0), "depth must be"),
    ],
)
def test_decoders_that_cannot_be_built(options, message):
    given = dict(segments=2, width=8, depth=1, heads=2) | options
    with pytest.raises(ValueError, match=message):
        MIRLHead(8, 12, **given, rngs=nnx.Rngs(0))


def test_tokens_of_another_number_of_segments():
    head = MIRLHead(8, 12, segments=2, width=8, heads=2, rngs=nnx.Rngs(0))
    tokens = [jnp.zeros((1, 4, 8))] * 2
    with pytest.raises(ValueError, match="tokens must be of the image and 2 segments, got 2"):
        head(tokens, jnp.zeros((1, 3), jnp.int32), GRID)
