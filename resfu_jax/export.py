"""Models as single files that run without their code: StableHLO, weights, and what they mean.

    export_model(model, "camvid.zip", class_names=info.class_names, palette=info.palette)
    labels = load_exported("camvid.zip")(images)  # resfu_jax.serving: needs JAX only

The file is a zip of `model.stablehlo`, `weights.safetensors` and `meta.json`. The program is
lowered for all platforms at once, by default for any batch and size. Weights are its arguments:
constants would be there for the compiler to fold, and for no other tool to read.
"""

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import resfu_jax
from resfu_jax.inference import Inference
from resfu_jax.model import SegmentationModel, evaluating
from resfu_jax.predictor import check_classes
from resfu_jax.preprocess import Preprocess, check_preprocess, is_integer, preprocess_of
from resfu_jax.serving import FORMAT, META, PROGRAM, WEIGHTS

Output = Literal["labels", "probabilities", "logits"]
PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    model: SegmentationModel,
    path: str | os.PathLike[str],
    *,
    output: Output = "labels",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    multiple: int | None = None,
    preprocess: Preprocess | None = None,
    inference: Inference | None = None,
    platforms: Sequence[str] = PLATFORMS,
    class_names: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] = (),
) -> pathlib.Path:
    """Writes a model, uint8 images `(b, h, w, 3)` to one of `output`, as a file.

    The colours' mean and deviation are inside, and the file says the rest of the preprocessing: the
    loader resizes and pads images as `Predictor` does, sees them whole or in windows as it does,
    and brings the outputs back to their size. Both give an image the same labels.

    Args:
      model: the model; it is exported as in evaluation.
      path: the file to write; its folder is made if needed, and `~` is the home folder.
      output: `"labels"`, `(b, h, w)`, uint8 up to 256 classes, else int32; `"probabilities"` or
        `"logits"`, `(b, h, w, k)`, float32.
      batch: number of images; None is any.
      size: height and width of the images; None is any. A fixed size lets the compiler, and
        ReSFU's blocks of rows, know it. Windows have theirs.
      multiple: what sides are multiples of where `size` is None, instead of the number in
        `preprocess`. All strides of the backbone divide it: 32 for MiT, 16 or 14 for a ViT.
      preprocess: how images are resized and padded, as in `Predictor`: give `predictor.preprocess`
        or `training.create_preprocess(config)`. None: they are not resized. Where it resizes, the
        program for `"labels"` returns probabilities, from which the loader decides the labels at
        the size of the image.
      inference: how images become logits, in one pass or in windows: give `predictor.inference`.
        Windows are the program's images, and the loader averages their logits. Mirrored and
        rescaled views are not exported. None: one pass.
      platforms: what it can run on: "cpu", "cuda", "rocm" or "tpu".
      class_names: names of the classes.
      palette: their colours.

    Returns:
      The path.

    Raises:
      ValueError: an argument is wrong, or the model cannot be traced for such sizes.
    """
    if output not in get_args(Output):
        raise ValueError(f"output must be one of {', '.join(get_args(Output))}, got {output!r}")
    path = _checked_path(path)
    if batch is not None and (not is_integer(batch) or batch < 1):
        raise ValueError(f"batch must be a whole number, at least 1, or None, got {batch!r}")
    if size is not None:
        two = isinstance(size, Sequence) and len(size) == 2
        if not two or not all(is_integer(side) and side >= 1 for side in size):
            raise ValueError(f"size must be (height, width), at least 1, or None, got {size!r}")
    windows = _windows(inference or Inference())
    if windows and size is not None:
        raise ValueError(
            f"size must be None where images are seen in windows, of {windows['crop']}, got "
            f"{size!r}; with mode 'whole' it is that of the images"
        )
    size = windows["crop"] if windows else size
    check_classes(class_names, palette)
    changes: dict[str, Any] = {} if multiple is None else {"multiple": multiple}
    if preprocess is None:
        preprocess = preprocess_of(model, **changes)
    elif not isinstance(preprocess, Preprocess):
        raise ValueError(f"preprocess must be a Preprocess or None, got {preprocess!r}")
    else:
        preprocess = check_preprocess(dataclasses.replace(preprocess, **changes), model)
    m = preprocess.multiple
    height, width = (f"{m}*h", f"{m}*w") if size is None else size
    inputs = {"images": f"uint8[{'b' if batch is None else batch}, {height}, {width}, 3]"}

    def finish(logits: jax.Array) -> jax.Array:
        classes = logits.shape[3]
        for name, given in (("class_names", class_names), ("palette", palette)):
            if len(given) not in (0, classes):
                raise ValueError(
                    f"{name} must have the model's {classes} entries, got {len(given)}"
                )
        if windows:
            return logits.astype(jnp.float32)  # of which the loader takes the mean
        if output == "labels" and not preprocess.resizes:
            labels = jnp.argmax(logits, axis=-1)
            return labels.astype(jnp.uint8 if classes <= 256 else jnp.int32)
        logits = logits.astype(jnp.float32)
        return logits if output == "logits" else jax.nn.softmax(logits)

    meta = {
        "output": output,
        "preprocess": dataclasses.asdict(preprocess),
        "windows": windows,
        "class_names": list(class_names),
        "palette": [[int(c) for c in color] for color in palette],
    }
    return _write(model, finish, path, inputs, (), platforms, meta)


def export_module(
    module: nnx.Module,
    path: str | os.PathLike[str],
    inputs: Mapping[str, str],
    *,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] = PLATFORMS,
) -> pathlib.Path:
    """Writes any module as a file: an upsampler, or a backbone with one behind it.

        export_module(
            create_upsampler("resfu", features=384, guide_features=32, scale=4),
            "resfu.zip",
            {"features": "float32[b, h, w, 384]", "guide": "float32[b, 4*h, 4*w, 32]"},
        )

    Args:
      module: called as `module(*inputs)`, as in evaluation; returns an array, or several in tuples,
        lists and dictionaries.
      path: the file to write; its folder is made if needed.
      inputs: names of the inputs in their order, their types and shapes. Letters stand for any
        number, as in `jax.export.symbolic_shape`.
      constraints: what may be assumed of them, for instance `"h >= 7"`.
      platforms: what it can run on: "cpu", "cuda", "rocm" or "tpu".

    Returns:
      The path.

    Raises:
      ValueError: an argument is wrong, or the module cannot be traced for such sizes.
    """
    meta: dict[str, Any] = dict(
        output=None, preprocess=None, windows=None, class_names=[], palette=[]
    )
    return _write(module, lambda y: y, _checked_path(path), inputs, constraints, platforms, meta)


def _windows(inference: Inference) -> dict[str, Sequence[int]] | None:
    """What the file says of windows; a `ValueError` for what is not exported."""
    if not isinstance(inference, Inference):
        raise ValueError(f"inference must be an Inference or None, got {inference!r}")
    for name, only in (("scales", [1.0]), ("flip", False), ("whole_up_to", 0)):
        value = getattr(inference, name)
        if (list(value) if name == "scales" else value) != only:
            raise ValueError(
                f"inference.{name} must be {only}, got {value}: files see all images in one way"
            )
    if inference.mode == "whole":
        return None
    return {name: [int(n) for n in getattr(inference, name)] for name in ("crop", "stride")}


def _write(
    module: nnx.Module,
    finish: Callable[[Any], Any],
    path: pathlib.Path,
    inputs: Mapping[str, str],
    constraints: Sequence[str],
    platforms: Sequence[str],
    meta: dict[str, Any],
) -> pathlib.Path:
    listed = isinstance(platforms, Sequence) and not isinstance(platforms, str)
    if not listed or not platforms or set(platforms) - {*PLATFORMS, "rocm"}:
        raise ValueError(f"platforms must be of cpu, cuda, rocm and tpu, got {platforms!r}")
    specs = _specs(inputs, constraints)
    # Evaluation draws no random numbers: the shapes of the random state are enough.
    graphdef, *states = nnx.split(evaluating(module), nnx.Not(nnx.RngState), ...)
    state, random = states
    random = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random)
    variables = {".".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
    weights = {name: np.asarray(v[...]) for name, (_, v) in variables.items()}

    def program(weights: dict[str, jax.Array], *arrays: jax.Array) -> Any:
        flat = [(path, v.replace(weights[name])) for name, (path, v) in variables.items()]
        return finish(nnx.merge(graphdef, nnx.from_flat_state(flat), random)(*arrays))

    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    try:
        exported = jax.export.export(jax.jit(program), platforms=platforms)(shapes, *specs)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"the module cannot be traced for any {', '.join(inputs.values())}: give fixed sizes, "
            f"or constraints. {str(error).splitlines()[0]}"
        ) from error
    avals = exported.in_avals[len(exported.in_avals) - len(specs) :]
    meta = {
        "format": FORMAT,
        "inputs": {name: str(aval) for name, aval in zip(inputs, avals, strict=True)},
        "constraints": list(constraints),
        "outputs": [str(aval) for aval in exported.out_avals],
        **meta,
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "resfu_jax": resfu_jax.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it and renamed, so that no server ever reads half a file.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            program_bytes = bytes(exported.serialize())
            archive.writestr(PROGRAM, program_bytes, zipfile.ZIP_DEFLATED)
            archive.writestr(WEIGHTS, safetensors.numpy.save(weights))
            archive.writestr(META, json.dumps(meta, indent=1))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _checked_path(path: Any) -> pathlib.Path:
    """Where to write, known before the work starts."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be that of the file to write, got {path!r}")
    if re.match(r"[a-z][a-z0-9+]+://", os.fspath(path)):
        raise ValueError(f"path must be local, got {path}: write it here, and copy it there")
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        raise ValueError(f"path must be that of the file to write, got the folder {path}")
    return path


def _specs(inputs: Mapping[str, str], constraints: Sequence[str]) -> list[jax.ShapeDtypeStruct]:
    """Abstract arrays of what reads "float32[b, h, w, 3]", all of one scope of letters."""
    scope = jax.export.SymbolicScope(constraints)
    specs = []
    for name, text in inputs.items():
        match = re.fullmatch(r"(\w+)\[(.*)\]", text)
        try:
            if match is None:
                raise ValueError("it has no brackets")
            shape = jax.export.symbolic_shape(match[2], scope=scope)
            specs.append(jax.ShapeDtypeStruct(shape, jnp.dtype(match[1])))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"inputs[{name!r}] must be like 'float32[b, h, w, 3]', got {text!r}: {error}"
            ) from error
    return specs
