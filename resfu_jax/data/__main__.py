"""Command line: `python -m resfu_jax.data prepare NAME` and `python -m resfu_jax.data list`."""

import argparse
import sys

import tensorflow_datasets as tfds

from resfu_jax.data import (
    dataset_info,
    default_data_dir,
    is_prepared,
    list_datasets,
    open_source,
    prepare,
)


def main() -> None:
    """Prepares a dataset, or lists them; a failure ends with one readable line."""
    parser = argparse.ArgumentParser("python -m resfu_jax.data", description=__doc__)
    parser.add_argument(
        "--data-dir", help=f"where datasets are kept (default: {default_data_dir()})"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, number of classes, and which are prepared")
    build = commands.add_parser("prepare", help="download if need be, and build a dataset")
    build.add_argument("name", help=f"one of: {', '.join(list_datasets())}")
    build.add_argument("--manual-dir", help="folder of raw files that were fetched by hand")
    build.add_argument("--data-dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.command == "list":
            for name in list_datasets():
                state = "prepared" if is_prepared(name, args.data_dir) else "not prepared"
                print(f"{name:24} {dataset_info(name).num_classes:3} classes   {state}")
        else:
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()  # in a log its lines would pile up
            path = prepare(args.name, args.data_dir, args.manual_dir)
            counts = {
                split: len(open_source(args.name, split, args.data_dir))
                for split in ("train", "validation")
            }
            print(f"{args.name}: {counts['train']} train, {counts['validation']} validation")
            print(f"prepared in {path}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
