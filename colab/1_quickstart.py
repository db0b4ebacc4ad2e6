# %% [markdown]
# # Drop an upsampler into a JAX model
#
# Make any upsampler by name, train it inside a Flax model, and use the same module from Linen, Equinox
# and plain JAX.
#
# **Run time**: about 4 minutes on two CPU cores (7 minutes of processor time), after the installation. No GPU is needed.

# %% tags=["active-ipynb"]
# # Install. Where resfu_jax is there already, this only says so.
# SOURCE = ""  # a clone, a wheel, or "git+https://..."; empty: what is installed, or beside this notebook
#
# from importlib.metadata import version
# from importlib.util import find_spec
# from pathlib import Path
#
# package = find_spec("resfu_jax")
# wheels = sorted(Path().glob("resfu_jax*.whl"), reverse=True)
# folders = [*Path().glob("resfu_jax*"), Path("..")]
# clones = [folder for folder in folders if (folder / "resfu_jax" / "__init__.py").is_file()]
# if not SOURCE and package and package.origin:  # a clone's folder is a package of no origin
#     found = "installed"
# elif not (found := SOURCE or next(iter(wheels + clones), "")):
#     raise FileNotFoundError("no resfu_jax: put a clone or a wheel of it beside this notebook, or name one in SOURCE")
# else:
#     # This Colab's JAX may be too old. Keep its kind of accelerator when it is replaced.
#     plugins = {"jax_cuda13_plugin": "cuda13", "jax_cuda12_plugin": "cuda12", "libtpu": "tpu"}
#     accelerator = next((extra for name, extra in plugins.items() if find_spec(name)), "")
#     address = Path(found).resolve().as_uri() if Path(found).exists() else found
#     %pip install --quiet "jax[{accelerator}]>=0.10" "resfu_jax[notebooks] @ {address}"
#     # If Colab then asks to restart the session: do so, and go on with the next cell.
# print(f"resfu_jax {version('resfu_jax')}: {found}")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import resfu_jax
from resfu_jax.data.shapes import PALETTE, draw_example
from resfu_jax.visualize import colorize

SMALL = "RESFU_NOTEBOOK_SMALL" in os.environ  # a test of this notebook: a few steps only
print("JAX", jax.__version__, "on", jax.devices())

# %% [markdown]
# ## By name
#
# Features are `(batch, height, width, channels)`. *Guided* upsamplers also look at a map of the high
# resolution, here with 32 channels, to see where the outlines are. The others ignore `guide_features`, so
# that all are made in the same way.

# %%
print(*resfu_jax.list_upsamplers())

features = jax.random.normal(jax.random.key(0), (1, 9, 13, 32))
guide = jax.random.normal(jax.random.key(1), (1, 36, 52, 32))


@nnx.jit
def apply(up, features, guide):
    return up(features, guide) if up.guide == "features" else up(features)


for name in ["bilinear", "carafe", "dysample", "sapa", "fade", "resfu"]:
    up = resfu_jax.create_upsampler(name, features=32, guide_features=32, scale=4, rngs=nnx.Rngs(0))
    y = apply(up, features, guide)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param)))
    print(
        f"{name:10} guide: {up.guide:9} {features.shape} -> {y.shape}, {parameters:6,} parameters"
    )

# %% [markdown]
# ## In a Flax model
#
# The toy: images of shapes, and what a perfect network of stride 4 would know of them, the share of each
# class in every cell of 4 x 4 pixels. A decoder brings that back to full resolution. Only the upsampler
# differs.


# %%
class Decoder(nnx.Module):
    """Shares of the classes, at 1/4 of the image's sides, to logits of every pixel."""

    def __init__(self, upsampler, *, rngs):
        self.embed = nnx.Linear(8, 32, rngs=rngs)
        self.stem1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)  # the guide
        self.stem2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.up = resfu_jax.create_upsampler(
            upsampler, features=32, guide_features=32, scale=4, rngs=rngs
        )
        self.classify = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, shares, image):
        x = self.embed(shares)
        if self.up.guide == "features":
            x = self.up(x, self.stem2(nnx.relu(self.stem1(image))))
        else:
            x = self.up(x)
        return self.classify(x)


def draw(seed, count=8, size=64):
    rng = np.random.default_rng(seed)
    images, labels = zip(
        *(draw_example(rng, size, max_shapes=4) for _ in range(count)), strict=True
    )
    shares = np.eye(8, dtype=np.float32)[np.stack(labels)]
    shares = shares.reshape(count, size // 4, 4, size // 4, 4, 8).mean(axis=(2, 4))
    return shares, np.stack(images).astype(np.float32) / 127.5 - 1, np.stack(labels)


@nnx.jit
def train_step(model, optimizer, shares, image, label):
    def loss_fn(model):
        logits = model(shares, image)
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, 8)).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model, shares, image):
    return jnp.argmax(model(shares, image), axis=-1)


# %%
steps = 3 if SMALL else 150
names = (
    ["bilinear", "sapa"]
    if SMALL
    else ["nearest", "bilinear", "dysample", "carafe", "sapa", "resfu", "fade"]
)
train = [draw(seed) for seed in range(1, 1 + min(steps, 50))]
test = draw(0, count=8 if SMALL else 32)

predictions, losses = {}, {}
for name in names:
    model = Decoder(name, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses[name] = [
        float(train_step(model, optimizer, *train[i % len(train)])) for i in range(steps)
    ]
    predictions[name] = np.asarray(predict(model, *test[:2]))
    right = np.mean(predictions[name] == test[2])
    print(
        f"{name:10} loss {np.mean(losses[name][-20:]):.3f}, {right:.1%} of the test's pixels right"
    )

# %% [markdown]
# The outlines tell the members apart: `nearest` and `bilinear` can only guess them; `dysample` and `carafe`
# learn how outlines of blobs usually run; `sapa`, `resfu` and `fade` look them up in the image.
# (`fade` mixes the guide itself into its output, so that here it has a small network of the full
# resolution at hand.)
#
# 150 steps are few: after 300, `resfu` has 98.9 % of the pixels right and `bilinear` 97.5 %.

# %%
rows = [0, 1, 2]
columns = ["image", "shares at 1/4", *names, "truth"]
_, axes = plt.subplots(
    len(rows), len(columns), figsize=(1.6 * len(columns), 1.7 * len(rows)), layout="constrained"
)
for i, row in zip(rows, axes, strict=True):
    pictures = [(test[1][i] + 1) / 2, test[0][i] @ np.asarray(PALETTE) / 255]
    pictures += [colorize(predictions[name][i], PALETTE) for name in names]
    pictures += [colorize(test[2][i], PALETTE)]
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
for axis, title in zip(axes[0], columns, strict=True):
    axis.set_title(title, fontsize=9)
plt.show()

# %% [markdown]
# ## In Linen
#
# `bridge.to_linen` makes the upsampler an ordinary Linen module, its weights entries of `params`.

# %%
from flax import linen as nn
from flax.nnx import bridge


class LinenDecoder(nn.Module):
    upsampler: str

    @nn.compact
    def __call__(self, shares, image):
        x = nn.Dense(32)(shares)
        guide = nn.Conv(32, (3, 3))(image)
        x = bridge.to_linen(
            resfu_jax.create_upsampler,
            self.upsampler,
            features=32,
            guide_features=32,
            scale=4,
            name="up",
        )(x, guide)
        return nn.Dense(8)(x)


linen_model = LinenDecoder("sapa")
shares, image, label = train[0]
variables = jax.jit(linen_model.init)(jax.random.key(0), shares, image)
print(
    {name: sum(p.size for p in jax.tree.leaves(tree)) for name, tree in variables["params"].items()}
)


@jax.jit
def linen_step(params, optimizer_state, shares, image, label):
    def loss_fn(params):
        logits = linen_model.apply({"params": params}, shares, image)
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, 8)).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, optimizer_state = adam.update(gradients, optimizer_state)
    return optax.apply_updates(params, updates), optimizer_state, loss


adam = optax.adam(3e-3)
params, optimizer_state = variables["params"], adam.init(variables["params"])
linen_losses = []
for i in range(max(2, steps // 3)):
    params, optimizer_state, loss = linen_step(params, optimizer_state, *train[i % len(train)])
    linen_losses.append(float(loss))
print(f"loss {linen_losses[0]:.3f} -> {linen_losses[-1]:.3f}")

# %% [markdown]
# ## In Equinox
#
# An NNX module splits into its structure, which is static, and a tree of arrays. An `eqx.Module` that holds
# both is the same function, and Equinox sees the arrays as its parameters.

# %%
import equinox as eqx


class Upsampler(eqx.Module):
    graphdef: nnx.GraphDef = eqx.field(static=True)
    weights: dict

    def __init__(self, name, **options):
        self.graphdef, weights = nnx.split(resfu_jax.create_upsampler(name, **options))
        self.weights = nnx.as_pure(weights)

    def __call__(self, *inputs):
        return nnx.merge(self.graphdef, self.weights)(*inputs)


class EquinoxDecoder(eqx.Module):
    embed: eqx.nn.Linear
    stem: eqx.nn.Conv2d
    up: Upsampler
    classify: eqx.nn.Linear

    def __init__(self, upsampler, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(8, 32, key=keys[0])
        self.stem = eqx.nn.Conv2d(3, 32, 3, padding=1, key=keys[1])
        self.up = Upsampler(upsampler, features=32, guide_features=32, scale=4)
        self.classify = eqx.nn.Linear(32, 8, key=keys[2])

    def __call__(self, shares, image):
        """One image, as is the habit in Equinox."""
        x = jax.vmap(jax.vmap(self.embed))(shares)
        guide = jnp.moveaxis(self.stem(jnp.moveaxis(image, -1, 0)), 0, -1)
        x = self.up(x[None], guide[None])[0]
        return jax.vmap(jax.vmap(self.classify))(x)


@eqx.filter_value_and_grad
def equinox_loss(model, shares, image, label):
    logits = jax.vmap(model)(shares, image)
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, 8)).mean()


@eqx.filter_jit
def equinox_step(model, optimizer_state, shares, image, label):
    loss, gradients = equinox_loss(model, shares, image, label)
    updates, optimizer_state = adam.update(gradients, optimizer_state)
    return eqx.apply_updates(model, updates), optimizer_state, loss


equinox_model = EquinoxDecoder("sapa", jax.random.key(0))
optimizer_state = adam.init(eqx.filter(equinox_model, eqx.is_inexact_array))
equinox_losses = []
for i in range(max(2, steps // 3)):
    equinox_model, optimizer_state, loss = equinox_step(
        equinox_model, optimizer_state, *train[i % len(train)]
    )
    equinox_losses.append(float(loss))
print(f"loss {equinox_losses[0]:.3f} -> {equinox_losses[-1]:.3f}")

# %% [markdown]
# The values and the gradients are those of the NNX module:

# %%
up = resfu_jax.create_upsampler("sapa", features=32, guide_features=32, scale=4)
wrapped = Upsampler("sapa", features=32, guide_features=32, scale=4)
value, gradients = nnx.jit(nnx.value_and_grad(lambda up: jnp.sum(up(features, guide) ** 2)))(up)
value2, gradients2 = eqx.filter_jit(
    eqx.filter_value_and_grad(lambda up: jnp.sum(up(features, guide) ** 2))
)(wrapped)
print("values", float(value), float(value2))
for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients2), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b)))
print("gradients of", len(jax.tree.leaves(gradients)), "parameters are equal")

# %% [markdown]
# ## Without any framework
#
# `resfu_jax.ops` has the parts as pure functions, and importing it does not import Flax. Here a
# similarity-based upsampler without weights: every pixel compares its colour with the mean colours of the
# 5 x 5 cells around it, and takes its classes from those that are most alike.


# %%
@jax.jit
def by_colour(shares, image):
    small = resfu_jax.ops.adaptive_avg_pool(image, shares.shape[1:3])
    # -|p - q|^2 up to a term that is the same for all q: <(2p, 1), (q, -|q|^2)>
    queries = jnp.concatenate([2 * image, jnp.ones_like(image[..., :1])], axis=-1)
    keys = jnp.concatenate([small, -jnp.sum(small**2, axis=-1, keepdims=True)], axis=-1)
    scores = resfu_jax.ops.local_similarity(queries, keys, kernel_size=5)
    return resfu_jax.ops.local_attention(20 * scores, shares)


guessed = np.asarray(jnp.argmax(by_colour(*test[:2]), axis=-1))
smooth = resfu_jax.ops.resize(test[0], test[1].shape[1:3], method="bilinear")
print(f"resize:    {np.mean(np.argmax(smooth, axis=-1) == test[2]):.1%} of the pixels right")
print(f"by colour: {np.mean(guessed == test[2]):.1%}")

_, axes = plt.subplots(1, 4, figsize=(8, 2.3), layout="constrained")
pictures = {
    "image": (test[1][1] + 1) / 2,
    "resize": colorize(np.argmax(smooth[1], axis=-1), PALETTE),
    "by colour": colorize(guessed[1], PALETTE),
    "truth": colorize(test[2][1], PALETTE),
}
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow(picture)
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# On: [train a segmentation network](2_train.ipynb),
# [features of a frozen ViT](3_vit_features.ipynb),
# [official checkpoints](4_official_checkpoints.ipynb).
