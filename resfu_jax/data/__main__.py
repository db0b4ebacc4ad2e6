"""Command line: `python -m resfu_jax.data prepare NAME` and `python -m resfu_jax.data list`."""

import argparse
import functools
import sys

import tensorflow_datasets as tfds

from resfu_jax._output import readers_may_leave
from resfu_jax.data import (
    OwnDepth,
    OwnImages,
    OwnMattes,
    damaged_datasets,
    dataset_info,
    default_data_dir,
    is_prepared,
    label_pixels,
    list_datasets,
    open_source,
    prepare,
)


def main(argv: list[str] | None = None) -> None:
    """Prepares a dataset, or lists them; a failure ends with one readable line.

    Args:
      argv: arguments; None takes those of the process.
    """
    try:
        with readers_may_leave():
            _run(_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command starts again, and removes what is half built")


def _parser() -> argparse.ArgumentParser:
    def plain(text: str) -> str:
        return text.replace("%", "%%")  # argparse formats it

    parser = argparse.ArgumentParser("python -m resfu_jax.data", description=__doc__)
    place = plain(f"where datasets are kept (default: {default_data_dir()})")
    parser.add_argument("--data-dir", help=place)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, classes, sizes, terms of use, and which are prepared")
    build = commands.add_parser("prepare", help="download if need be, and build a dataset")
    build.add_argument(
        "name",
        help=f"one of: {', '.join(list_datasets())}; or image_folder/NAME for your own images, "
        "depth_folder/NAME for your own depth maps, matting_folder/NAME for your own mattes",
    )
    build.add_argument("--manual-dir", help="folder of raw files that were fetched by hand")
    own = build.add_argument_group("your own images (image_folder/NAME)")
    own.add_argument("--images", help="folder of the images")
    own.add_argument("--labels", help="folder of their label maps, PNG files of the same names")
    own.add_argument(
        "--validation-images",
        help="folder of the images for validation (default: subfolders train and validation of the "
        "others, or a fifth of them, chosen by their names)",
    )
    own.add_argument("--validation-labels", help="folder of their label maps")
    own.add_argument(
        "--classes",
        nargs="+",
        help="a file of lines `name`, `name, R, G, B` or `NUMBER = name`, or JSON; or such lines "
        "(default: what the label maps hold, after a question)",
    )
    own.add_argument(
        "--ignore-label", type=int, help="number of pixels that do not count (default: 255)"
    )
    own.add_argument(
        "--ignore-exif",
        action="store_true",
        help="leave images as they are stored, not turned as their EXIF data say",
    )
    own.add_argument("--yes", action="store_true", help="take the classes that the label maps hold")
    depth = build.add_argument_group("your own depth maps (depth_folder/NAME, with --images)")
    depth.add_argument(
        "--depth", help="folder of the depth maps: PNG, TIFF, .npy or .npz files of the same names"
    )
    depth.add_argument("--validation-depth", help="folder of the depth maps of --validation-images")
    depth.add_argument(
        "--scale", type=float, help="metres that the number 1 stands for (default: 0.001)"
    )
    depth.add_argument(
        "--invalid", type=float, help="number that says that nothing is known (default: 0)"
    )
    mattes = build.add_argument_group("your own mattes (matting_folder/NAME)")
    mattes.add_argument("--foregrounds", help="folder of foregrounds")
    mattes.add_argument("--alphas", help="folder of their alpha mattes, images of the same names")
    mattes.add_argument("--backgrounds", help="folder of images to compose them over")
    mattes.add_argument(
        "--trimaps", help="folder of trimaps for validation (default: drawn from alpha)"
    )
    mattes.add_argument(
        "--trimap-width",
        type=int,
        help="of those, the diameter in pixels by which known regions are eroded (default: 25)",
    )
    build.add_argument(
        "--overwrite", action="store_true", help="build anew, and replace what is prepared"
    )
    build.add_argument("--data-dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.command == "list":
        _print_list(args.data_dir)
        return
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # in a log its lines would pile up
    before = is_prepared(args.name, args.data_dir) and not args.overwrite
    path = prepare(
        args.name, args.data_dir, args.manual_dir, own=_own(args), overwrite=args.overwrite
    )
    _print_prepared(args.name, args.data_dir)
    again = " before; --overwrite builds it anew" if before else ""
    print(f"prepared in {path}{again}")


# Options of each kind of files of one's own.
_OWN_OPTIONS = {
    "image_folder": (
        *("images", "labels", "validation_images", "validation_labels"),
        *("classes", "ignore_label"),
    ),
    "depth_folder": (
        *("images", "depth", "validation_images", "validation_depth"),
        *("scale", "invalid"),
    ),
    "matting_folder": ("foregrounds", "alphas", "backgrounds", "trimaps", "trimap_width"),
}


def _own(args: argparse.Namespace) -> OwnImages | OwnDepth | OwnMattes | None:
    """What the command says of one's own files; None if that is nothing."""
    kind = args.name.partition("/")[0]
    allowed = _OWN_OPTIONS.get(kind, _OWN_OPTIONS["image_folder"])
    given = {}
    for name in dict.fromkeys(name for names in _OWN_OPTIONS.values() for name in names):
        value = getattr(args, name)
        if value is not None and name not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} is no option of {args.name}.")
        if value is not None:
            given[name] = value
    if kind == "matting_folder":
        return OwnMattes(**given) if given else None
    if kind == "depth_folder":
        if args.ignore_exif:
            given["orientation"] = False
        return OwnDepth(**given) if given else None
    if args.classes:
        given["classes"] = args.classes if args.classes[1:] else args.classes[0]
    if args.ignore_exif:
        given["orientation"] = False
    if given or args.yes:
        return OwnImages(**given, confirm=functools.partial(_confirm, args.yes))
    return None


def _confirm(yes: bool, text: str) -> bool:
    """Shows classes that were found; a terminal is asked about them, a script has to say --yes."""
    if not yes and not sys.stdin.isatty():
        return False
    print(text)
    return yes or input("Take these classes? [y/N] ").strip().lower() in ("y", "yes")


def _print_prepared(name: str, data_dir: str | None) -> None:
    counts = tuple(len(open_source(name, split, data_dir)) for split in ("train", "validation"))
    print(f"{name}: {counts[0]} train, {counts[1]} validation ({sum(counts)} images)")
    info = dataset_info(name, data_dir)
    for note in info.notes:
        print(note)
    if info.examples not in (None, counts):
        print(f"warning: published are {info.examples[0]} and {info.examples[1]}; files missing?")
    pixels = label_pixels(name, data_dir)
    if pixels is None or not info.num_classes:
        return
    classes, ignored = pixels[: info.num_classes], pixels[info.ignore_label]
    shares = classes / max(classes.sum(), 1)
    texts = [f"{n} {share:.1%}" for n, share in zip(info.class_names, shares, strict=True)]
    print("of the labelled pixels: " + ", ".join(texts))
    print(f"ignored: {ignored / pixels.sum():.1%} of all pixels")
    if never := [n for n, count in zip(info.class_names, classes, strict=True) if not count]:
        verb = "occurs" if len(never) == 1 else "occur"
        print(f"warning: of the classes, never {verb}: {', '.join(never)}")


def _print_list(data_dir: str | None) -> None:
    form = "{:24} {:>7} {:>8} {:>10}  {:9} {:32} {}"
    titles = ("name", "classes", "train", "validation", "prepared", "download", "terms")
    print(form.format(*titles))
    for name in list_datasets(data_dir):
        info = dataset_info(name, data_dir)
        state = "yes" if is_prepared(name, data_dir) else "no"
        counts = info.examples or ("?", "?")
        classes = info.num_classes if info.depth is None else "depth"
        print(form.format(name, classes, *counts, state, info.download, info.terms))
    for name, problem in damaged_datasets(data_dir).items():
        print(f"warning: {name} is damaged: {problem}. Prepare it again with --overwrite.")


if __name__ == "__main__":
    main()
