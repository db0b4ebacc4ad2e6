"""Released weights of upsamplers by name."""

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx

from resfu_jax import convert
from resfu_jax.convert._download import download
from resfu_jax.convert._files import find_weights
from resfu_jax.convert._state import Misfit
from resfu_jax.convert.catalogue import RELEASES, Release, find_releases


def load_upsampler(
    name: str, weights: Any = None, *, prefix: str | None = None, **options: Any
) -> nnx.Module:
    """Build an upsampler with the weights that its authors released.

        up = load_upsampler("anyup")
        up = load_upsampler("jafar_dinov2_vits14", "~/vit_small_patch14_dinov2.lvd142m.pth")

    `resfu upsamplers --weights` lists what there is, with licences. Nothing in a file is executed.

    Args:
      name: of released weights; or a member of the registry that has some, if it has them of one
        network or `weights` say which of its networks it is.
      weights: where they are, if not where they were released: all that `from_torch` takes, such as
        a path, a repository of Hugging Face (`"owner/name:file"`) or an address. None fetches the
        released file once, by https, and compares its SHA-256 where that is known.
      prefix: as of `from_torch`: what the names in the file begin with, where it holds more.
      **options: `dtype`, `param_dtype`, `implementation`; and arguments of the official constructor
        that are other than the released model's.

    Raises:
      ValueError: unknown name or option (near matches are named), a member of several releases
        without `weights`, a file with another sum, of another network or format, or damaged.
      FileNotFoundError: no such file, or it could not be fetched; the error says what to do.
    """
    releases = find_releases(name)
    if weights is None and len(releases) > 1:
        listed = ", ".join(f"{n} ({release.backbone})" for n, release in releases.items())
        raise ValueError(
            f"{name!r} has {len(releases)} released models, of different backbones: choose one by "
            f"its name, or give its file, weights='path'. They are {listed}"
        )
    networks = _networks(releases)
    for release in networks:
        _check_options(release, options)  # before anything is fetched or read
    if weights is None:
        weights = _fetched(name, *networks)
    elif isinstance(weights, str | os.PathLike):
        weights = find_weights(weights)

    misfits = []
    for release in networks:
        try:
            return _load(release, weights, prefix, options)
        except Misfit as error:
            misfits.append(error)
    nearest = min(misfits, key=lambda misfit: misfit.lacks)
    nearest.causes[:0] = _causes(releases, weights)
    raise nearest


def _networks(releases: Mapping[str, Release]) -> list[Release]:
    """One release of each network."""
    networks: dict[str, Release] = {}
    for release in releases.values():
        networks.setdefault(f"{release.official_class} {release.arguments}", release)
    return list(networks.values())


def _load(
    release: Release, weights: Any, prefix: str | None, options: Mapping[str, Any]
) -> nnx.Module:
    arguments = {**release.arguments, **options}
    return convert.from_torch(release.official_class, weights, prefix=prefix, **arguments)


def _check_options(release: Release, options: Mapping[str, Any]) -> None:
    try:
        _load(release, {}, None, options)
    except Misfit:  # only the weights are missing
        pass


def _fetched(name: str, release: Release) -> os.PathLike[str]:
    try:
        if release.weights == release.url:
            return download(release.url, release.sha256)
        return find_weights(release.weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the released weights of {name!r} cannot be had: {error}\n"
            f"Get {release.url} in another way, and give its path: "
            f"load_upsampler({name!r}, weights='path')"
        ) from error


def _causes(releases: Mapping[str, Release], weights: Any) -> list[str]:
    """Which other released network it is."""
    others = {name: release for name, release in RELEASES.items() if name not in releases}
    for release in _networks(others):
        try:
            _load(release, weights, None, {})
        except ValueError:
            continue
        name = next(n for n, r in others.items() if r is release)
        return [f"it holds the network of {name!r}"]
    return []
