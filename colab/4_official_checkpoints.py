# %% [markdown]
# # Official PyTorch checkpoints: load, check, export
#
# Weights of the official modules go into the JAX ones, whose values and gradients are then compared with
# what the official modules gave. After that: your own `.pth`, and one file that runs without this library.
#
# **Run time**: about 2 minutes on two CPU cores (2.3 minutes of processor time), after the installation. No GPU is needed.

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
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import resfu_jax
from resfu_jax.export import export_module
from resfu_jax.serving import load_exported

SMALL = "RESFU_NOTEBOOK_SMALL" in os.environ  # a test of this notebook: fewer members
# tests/goldens is no part of the installed package.
places = [
    pathlib.Path(resfu_jax.__file__).parents[1],
    *pathlib.Path().glob("resfu_jax*"),
    pathlib.Path(".."),
]
REPOSITORY = next((place for place in places if (place / "tests" / "goldens").is_dir()), None)
if REPOSITORY is None:
    raise FileNotFoundError("no tests/goldens: put a clone of the repository beside this notebook")
print("JAX", jax.__version__, "on", jax.devices())

# The comparison is one of float32: without this, GPUs and TPUs round the inputs of products.
jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## What the official modules computed
#
# The repository has files with a `state_dict` of each official module, inputs, outputs and gradients, as
# NumPy arrays: no PyTorch is needed to read them. They were computed in float64 from float32 inputs.

# %%
GOLDENS = REPOSITORY / "tests" / "goldens"


def read(name):
    """What the file says of the official module, and its arrays by group: param, in, out, grad."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        groups = {}
        for key in file.files:
            if key != "meta":
                group, _, entry = key.partition("/")
                groups.setdefault(group, {})[entry] = file[key]
    return meta, groups


meta, arrays = read("resfu_s2_k3_gf1")
print(meta["repo"], meta["official_class"], meta["args"])
for key, value in arrays["param"].items():
    print(f"    {key:30} {value.shape}")

# %% [markdown]
# ## Load
#
# The class as its repository spells it, the `state_dict`, and the arguments of the official constructor.

# %%
up = resfu_jax.from_torch("zmhhmz/ReSFU:ReSFU", arrays["param"], **meta["args"])
print(
    type(up).__name__, sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))), "parameters"
)

# %% [markdown]
# Files do as well (`.pth`, `.safetensors`), and what wrappers put before the names (`module.`) is found. A `state_dict`
# that does not fit is refused; the error says the likely cause first, then what is wrong:

# %%
try:
    resfu_jax.from_torch(
        "zmhhmz/ReSFU:ReSFU",
        {f"module.{key}": value for key, value in arrays["param"].items()},
        **meta["args"] | {"embedding_dim": 32},
    )
except ValueError as error:
    print(error)

# %% [markdown]
# ## Parity
#
# For each member the largest difference over the largest value, for the output and for the gradients to the
# inputs and to every parameter. Official arrays are `(batch, channels, height, width)`, those here have the
# channels last. A dictionary of gradients has the names and shapes of a `state_dict`, so `from_torch` brings
# it into our layout, too.


# %%
@jax.jit
def value_and_gradients(up, inputs, cotangent):
    graphdef, params, rest = nnx.split(up, nnx.Param, ...)
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p, rest)(*i), params, inputs)
    return y, *vjp(cotangent)


def relative_error(actual, official):
    return float(np.max(np.abs(actual - official)) / np.max(np.abs(official)))


def parity(name):
    meta, arrays = read(name)
    official = f"{meta['repo']}:{meta['official_class'].split()[0]}"
    last = {key: jnp.moveaxis(jnp.asarray(x), 1, -1) for key, x in arrays["in"].items()}
    order = [key for key in ("de", "en", "x", "y") if key in last]  # features, then the guide
    up = resfu_jax.from_torch(official, arrays["param"], **meta["args"])
    y, d_params, d_inputs = value_and_gradients(up, [last[key] for key in order], last["cotangent"])

    output_error = relative_error(y, np.moveaxis(arrays["out"]["y"], 1, -1))
    grad = arrays["grad"]
    errors = [
        relative_error(d, np.moveaxis(grad[f"in/{key}"], 1, -1))
        for key, d in zip(order, d_inputs, strict=True)
    ]
    # Buffers have no gradient, but a state_dict is not complete without them.
    state = {key.removeprefix("param/"): g for key, g in grad.items() if key.startswith("param/")}
    state |= {key: arrays["param"][key] for key in meta["buffers"]}
    wanted = nnx.state(resfu_jax.from_torch(official, state, **meta["args"]), nnx.Param)
    for d, w in zip(jax.tree.leaves(d_params), jax.tree.leaves(wanted), strict=True):
        if np.any(w):  # a bias before a normalisation has none
            errors.append(relative_error(d, w))
    return official, output_error, max(errors), meta["torch_float32_relerr"]


names = ["resfu_s2_k3_gf1", "fade_l2h_s2", "carafe_s2_k5_g1", "dysample_lp_s2"]
if not SMALL:
    names += ["sapa_b_s2_k5", "sapa_deform_s2_p9_low", "lda_aqu_s2_nh2"]
    names += ["resfu_s4_k3_gf2_stages", "carafe_s4_k5_g2", "dysample_pl_s4_dyscope"]
rows = []
print(f"{'official module':36} {'file':24} {'output':>8} {'worst gradient':>15}")
for name in names:
    rows.append((name, *parity(name)))
    _, official, output_error, gradient_error, _ = rows[-1]
    print(f"{official:36} {name:24} {output_error:8.1e} {gradient_error:15.1e}")
    assert output_error < 2e-5 and gradient_error < 5e-5

# %% [markdown]
# float32 itself rounds, at 6e-8 of a value and more over many operations. The circles are the official
# module's own float32 results against its float64 ones: ours are of the same size.

# %%
figure, axis = plt.subplots(figsize=(7, 1.2 + 0.35 * len(rows)), layout="constrained")
for i, (_, _, output_error, gradient_error, torch_error) in enumerate(rows):
    for offset, color, ours, theirs in (
        (-0.13, "tab:blue", output_error, torch_error["out"]),
        (0.13, "tab:red", gradient_error, torch_error["grad_worst"]),
    ):
        axis.plot(ours, i + offset, "x", color=color)
        axis.plot(theirs, i + offset, "o", color=color, fillstyle="none")
axis.set(
    xscale="log", xlim=(1e-8, 1e-4), xlabel="relative error to float64, official PyTorch module"
)
axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
axis.invert_yaxis()
axis.grid(axis="x", alpha=0.3)
handles = [
    plt.Line2D([], [], color=color, marker=marker, fillstyle=fill, linestyle="", label=label)
    for color, marker, fill, label in (
        ("tab:blue", "x", "full", "output, JAX float32"),
        ("tab:blue", "o", "none", "output, PyTorch float32"),
        ("tab:red", "x", "full", "worst gradient, JAX float32"),
        ("tab:red", "o", "none", "worst gradient, PyTorch float32"),
    )
]
figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# These are some of the files; `make test` in the repository compares all of them, in float64 as well.
#
# ## Your own `.pth`
#
# A checkpoint of a whole network has the upsampler under a prefix. Name the file, the prefix, the class
# and its arguments (they are in your network's code; the official defaults apply to what is left out). The file is read
# without PyTorch, and without executing what is in it. Without a file, the arrays from above stand in for one.

# %%
CHECKPOINT = ""  # for instance "segformer_b1_resfu.pth"; upload it in Colab's file browser
PREFIX = "decode_head.upsampler."
OFFICIAL, ARGUMENTS = "zmhhmz/ReSFU:ReSFU", meta["args"]

stand_in = {PREFIX + key: value for key, value in arrays["param"].items()}
stand_in["backbone.patch_embed1.proj.bias"] = np.zeros(64, np.float32)

up = resfu_jax.from_torch(OFFICIAL, CHECKPOINT or stand_in, prefix=PREFIX, **ARGUMENTS)

# %% [markdown]
# ## Export
#
# One file for CPU, CUDA and TPU. Letters stand for any number: any batch, any size.

# %%
features, guide_features, scale = up.features, up.guide_features, ARGUMENTS["scale_factor"]
folder = pathlib.Path(tempfile.mkdtemp())
file = export_module(
    up,
    folder / "upsampler.zip",
    {
        "features": f"float32[b, h, w, {features}]",
        "guide": f"float32[b, {scale}*h, {scale}*w, {guide_features}]",
    },
)
print(file.name, f"{file.stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# A fresh process reads it, with JAX and neither the model's code nor Flax, and gives the same values at several
# sizes.

# %%
rng = np.random.default_rng(0)
sizes = [(1, 8, 8), (3, 5, 9)] if SMALL else [(1, 8, 8), (3, 5, 9), (2, 17, 12)]
inputs, expected = {}, {}
for i, (b, h, w) in enumerate(sizes):
    x = rng.normal(size=(b, h, w, features)).astype(np.float32)
    g = rng.normal(size=(b, scale * h, scale * w, guide_features)).astype(np.float32)
    inputs |= {f"features{i}": x, f"guide{i}": g}
    expected[f"y{i}"] = np.asarray(nnx.jit(lambda up, *a: up(*a))(up, x, g))
np.savez(folder / "inputs.npz", **inputs)

program = """
import sys
import numpy as np
from resfu_jax.serving import load_exported

folder, count = sys.argv[1], int(sys.argv[2])
run = load_exported(f"{folder}/upsampler.zip")
inputs = np.load(f"{folder}/inputs.npz")
outputs = {f"y{i}": run(inputs[f"features{i}"], inputs[f"guide{i}"]) for i in range(count)}
np.savez(f"{folder}/outputs.npz", **outputs)
print("Flax imported:", "flax" in sys.modules)
"""
command = [sys.executable, "-c", program, str(folder), str(len(sizes))]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")
with np.load(folder / "outputs.npz") as outputs:
    for key, y in expected.items():
        print(f"{y.shape}: relative error {relative_error(outputs[key], y):.1e}")
        np.testing.assert_allclose(outputs[key], y, rtol=1e-4, atol=1e-5)

# %% [markdown]
# Inside other JAX code, `load_exported(file).call` is a function of arrays that `jax.jit` takes:

# %%
run = load_exported(file)
total = jax.jit(lambda x, g: jnp.sum(run.call(x, g)))(inputs["features0"], inputs["guide0"])
print(float(total), "=", float(np.sum(expected["y0"])))

# %% [markdown]
# Whole networks: `export_model`, or `resfu export` with a trained checkpoint. The file's format, servers, ONNX:
# [docs/export.md](../docs/export.md).
