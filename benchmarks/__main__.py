"""Measures the upsamplers side by side with their peers.

    python -m benchmarks                                       ours against the literal form
    python -m benchmarks --peer-root DIR --json results.json   and against the official modules
    python -m benchmarks --plot docs/scaling.png               how time and memory grow
    python -m benchmarks --overhead --upsamplers carafe        what Python adds to a call
    python -m benchmarks --target v5e --json v5e.json          compiled for a TPU; nothing runs

DIR holds checkouts of the official repositories as owner/repository (zmhhmz/ReSFU,
poppinace/sapa, poppinace/fade, tiny-smart/sapa, tiny-smart/dysample, duzw9311/LDA-AQU); their
modules run in PyTorch, from `pip install -e '.[bench]'`.

A form takes `time x` times as long as ours, and `memory x` times the temporary memory: above 1,
ours is ahead.

With --target all figures are made at compile time, by the target's own compiler, on a machine that
needs no such device. Memory and traffic are in multiples of the output's bytes; docs/targets.md
explains the columns.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from benchmarks import plot, targets
from benchmarks.measure import DIRECTIONS, DTYPES, compare
from benchmarks.overhead import overhead
from benchmarks.targets import TARGETS
from benchmarks.workloads import GROUPS, WORKLOADS, Workload
from resfu_jax import list_upsamplers

UPSAMPLERS = ("resfu", "sapa", "fade", "carafe", "dysample", "lda_aqu")
_DEFAULTS = {
    "here": dict(
        upsamplers=UPSAMPLERS,
        workloads=("shapes", "segmenter", "segformer"),
        dtypes=("float32",),
        directions=DIRECTIONS,
    ),
    "target": dict(
        upsamplers=tuple(list_upsamplers()),
        workloads=("segmenter", "dino", "detection"),
        dtypes=("bfloat16", "float32"),
        directions=DIRECTIONS,
    ),
}
_PACKAGES = ("resfu_jax", "jax", "jaxlib", "flax", "numpy", "torch")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def choice(flag: str, choices, text: str):
        defaults = [_DEFAULTS[way].get(flag[2:]) for way in ("here", "target")]
        if all(defaults):
            here, target = (" ".join(d) if len(d) < len(choices) else "all" for d in defaults)
            text = f"{text}; default: {here}; with --target: {target}"
        text = f"{text}; of {' '.join(choices)}"
        parser.add_argument(flag, nargs="+", choices=choices, metavar="NAME", help=text)

    choice("--target", TARGETS, "compiles for these, instead of measuring this machine")
    choice("--upsamplers", list_upsamplers(), "what to measure")
    choice("--workloads", [*WORKLOADS, *GROUPS], "sizes")
    choice("--dtypes", DTYPES, "of inputs and computation")
    choice("--directions", DIRECTIONS, "with and without gradients")
    parser.add_argument("--peer-root", metavar="DIR", help="the official repositories")
    parser.add_argument("--torch-compile", action="store_true", help="compiles them, too")
    parser.add_argument(
        "--torch-plain",
        action="store_true",
        help="and with a plain stand-in for ReSFU's CUDA operator, beside the fastest",
    )
    parser.add_argument("--no-literal", action="store_true", help="leaves the literal form out")
    parser.add_argument("--runs", type=int, default=7, help="turns of each form, default 7")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="no further round of turns starts after that long; default 30",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the inputs, default 0; another draw, where in this one a pixel lies on a kink and "
        "the frameworks fall on different sides",
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="writes all figures")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=pathlib.Path,
        help="measures nothing; prints what --json wrote as a table",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=pathlib.Path,
        help="measures how cost grows, instead of the workloads, and draws it",
    )
    parser.add_argument(
        "--overhead", action="store_true", help="measures Python's part of a call, instead"
    )
    args = parser.parse_args(argv)
    for name in ("torch_compile", "torch_plain"):
        if getattr(args, name) and not args.peer_root:
            parser.error(f"--{name.replace('_', '-')} needs --peer-root")
    if args.peer_root and importlib.util.find_spec("torch") is None:
        parser.error("--peer-root needs PyTorch: pip install -e '.[bench]'")
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    if args.target and (args.peer_root or args.plot or args.overhead):
        parser.error("--target compiles only: it goes without --peer-root, --plot and --overhead")
    for name, value in _DEFAULTS["target" if args.target else "here"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def machine(compiled_for: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on.

    Args:
      compiled_for: the targets, if nothing runs.
    """
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys(
        (*_PACKAGES, *(p for t in compiled_for for p in TARGETS[t].packages))
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if compiled_for:
        device = f"none: compiled for {' '.join(compiled_for)}, nothing ran"
    else:
        device = f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(s.partition(":")[2].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


_COLUMNS = (
    ("", "form", "<15", "s"),
    ("ms", "ms", ">9", ".1f"),
    ("least ms", "ms_min", ">9", ".1f"),
    ("first ms", "ms_first", ">9", ".1f"),
    ("temp. MB", "temporary_mb", ">9", ".1f"),
    ("GFLOP", "gflop", ">8", ".2f"),
    ("compile s", "compile_s", ">9", ".1f"),
    ("time x", "time_ratio", ">7", ".2f"),
    ("memory x", "memory_ratio", ">8", ".2f"),
    ("difference", "error", ">10", ".0e"),
)
# Of what was compiled for a target. Bytes are in multiples of the output's.
_TARGET_COLUMNS = (
    ("", "form", "<8", "s"),
    ("temp.", "temporary", ">7", ".2f"),
    ("hbm", "hbm", ">7", ".1f"),
    ("xla", "xla", ">7", ".0f"),
    ("GFLOP", "gflop", ">8", ".2f"),
    ("est. ms", "estimate_ms", ">8", ".2f"),
    ("kernels", "kernels", ">7", "d"),
    ("loops", "loops", ">5", "s"),
    ("compile s", "compile_s", ">9", ".1f"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """The forms of one comparison under a heading."""
    head = rows[0]
    what = " ".join(_comparison(head))
    if "channels" in head:
        (h, w), scale = head["size"], head["scale"]
        what += f": {head['channels']} channels, {h}x{w} to {h * scale}x{w * scale}"
        what += f", guide {head['guide']}{head['note']}" if head["guided"] else ""
    columns = _COLUMNS
    if "target" in head:
        columns = _TARGET_COLUMNS
        rows = [_in_outputs(row) for row in rows]
    titles = " ".join(f"{title:{width}}" for title, _, width, _ in columns)
    return "\n".join([what, "  " + titles.rstrip(), *("  " + _line(row, columns) for row in rows)])


def _line(row: dict[str, Any], columns: tuple[tuple[str, ...], ...]) -> str:
    if "skipped" in row:
        return f"{row['form']:{columns[0][2]}} skipped: {row['skipped']}"
    values = [(row.get(key), width, spec) for _, key, width, spec in columns]
    cells = [f"{'' if v is None else format(v, spec):{width}}" for v, width, spec in values]
    return " ".join(cells).rstrip()


def _in_outputs(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a target, with bytes in multiples of the output's, and totals."""
    if "skipped" in row:
        return row
    shown = dict(row, loops=_loops(row["loops"]))
    for what in ("temporary", "hbm", "xla"):
        if row[f"{what}_mb"] is not None:
            shown[what] = row[f"{what}_mb"] / row["output_mb"]
    return shown


def _loops(turns: Sequence[int]) -> str:
    """`2 (8, 32)`: two loops, of 8 and 32 turns."""
    return f"{len(turns)} ({', '.join(map(str, turns))})" if turns else "0"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each comparison with the official module, eager, or for each target's program."""
    if "target" in rows[0]:
        return _markdown_of_targets(rows)
    lines = [
        "| upsampler | workload | | ours ms | PyTorch ms | faster | temporaries MB | PyTorch MB "
        "| compile s |",
        "|---" * 9 + "|",
    ]
    ours = {_comparison(row): row for row in rows if row["form"] == "ours" and "ms" in row}
    for row in rows:
        mine = ours.get(_comparison(row))
        if row["form"] != "torch" or mine is None:
            continue
        head = f"| `{row['upsampler']}` | `{row['workload']}` | {_direction(row)} "
        head += f"| {mine['ms']:.1f} |"
        tail = f" {mine['temporary_mb']:.1f} | - | {mine['compile_s']:.1f} |"
        if "ms" in row:
            factor = row["ms"] / mine["ms"]
            head += f" {row['ms']:.1f} | {factor:.1f} |"
            tail = tail.replace("| - |", f"| {row['temporary_mb']:.1f} |")
        else:
            head += f" - ({row['skipped'].split(';')[0]}) | - |"
        lines.append(head + tail)
    return "\n".join(lines)


def _markdown_of_targets(rows: list[dict[str, Any]]) -> str:
    """A line for each program of our form, and beside it what the literal form's moves."""
    columns = {key: (title, spec) for title, key, _, spec in _TARGET_COLUMNS[1:]}
    beside = ("temporary", "hbm", "xla")
    titles = [title for title, _ in columns.values()]
    titles += [f"literal {columns[key][0]}" for key in beside]
    lines = [
        f"| upsampler | target | workload | | {' | '.join(titles)} |",
        "|---" * (4 + len(titles)) + "|",
    ]
    literal = {_comparison(row): _in_outputs(row) for row in rows if row["form"] == "literal"}
    for row in rows:
        if row["form"] != "ours":
            continue
        if "skipped" in row:
            values = [row["skipped"]]
        else:
            ours, other = _in_outputs(row), literal.get(_comparison(row), {})
            cells = [(ours.get(key), columns[key][1]) for key in columns]
            cells += [(other.get(key), columns[key][1]) for key in beside]
            values = ["-" if value is None else format(value, spec) for value, spec in cells]
        head = f"| `{row['upsampler']}` | {row['target']} | `{row['workload']}` "
        lines.append(f"{head}| {_direction(row)} | {' | '.join(values)} |")
    return "\n".join(lines)


def _direction(row: dict[str, Any]) -> str:
    direction = row["direction"].replace("forward+", "with ")
    return direction + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def _comparison(row: dict[str, Any]) -> tuple[str, ...]:
    keys = ("target", "upsampler", "workload", "dtype", "direction")
    return tuple(row[key] for key in keys if key in row)


def _in_a_process(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`f(*args, **options)`, on a CPU in a new process.

    What the process allocated before decides whether a call gets its memory from what was freed or
    page by page from the system, which can take a fast call as long as all the rest.
    """
    if jax.default_backend() != "cpu":
        return f(*args, **options)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(f, *args, **options).result()


def _compiled(target: str, up: str, name: str, sizes: Workload, **options: str) -> dict[str, Any]:
    """A row of `targets.measure`; a program that the compiler breaks down at costs its row only."""
    try:
        return _in_a_process(targets.measure, target, up, name, sizes, **options)
    except BrokenProcessPool:
        row = targets.head(target, up, name, **options)
        return row | dict(skipped="the compiler broke down")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())["rows"]))
        return 0
    peers = ("torch", "torch.compile") if args.torch_compile else ("torch",)
    peers += ("torch.plain",) if args.torch_plain else ()
    forms = ("ours", *(() if args.no_literal else ("literal",)), *(peers if args.peer_root else ()))
    if args.plot:
        workloads, forms = plot.sweep(), ("ours",)
    else:
        names = [n for group in args.workloads for n in GROUPS.get(group, (group,))]
        workloads = {name: WORKLOADS[name] for name in names}

    if args.target:
        jax.config.update("jax_platforms", "cpu")  # a device that is there has nothing to do
        for target in args.target:
            try:
                targets.device(target)
            except targets.Missing as missing:
                print(f"error: {missing}", file=sys.stderr)
                return 1
    about = machine(args.target or ())
    print(", ".join(f"{key} {about[key]}" for key in ("device", "cpu", "cores")))
    print(", ".join(f"{package} {version}" for package, version in about["versions"].items()))
    if about["GLIBC_TUNABLES"]:
        print(f"GLIBC_TUNABLES={about['GLIBC_TUNABLES']}, for both sides")
    if about["load"] > 0.5:
        print(f"the machine is busy (load {about['load']:.1f}): do not trust times")
    if args.overhead:
        for up in args.upsamplers:
            print(f"{up}: microseconds of a call")
            for way, microseconds in overhead(up).items():
                print(f"  {microseconds:8.0f}  {way}")
        return 0
    rows: list[dict[str, Any]] = []
    for target, (name, sizes), up, dtype, direction in itertools.product(
        args.target or (None,), workloads.items(), args.upsamplers, args.dtypes, args.directions
    ):
        options = dict(dtype=dtype, direction=direction)
        if target is None:
            options |= dict(forms=forms, peer_root=args.peer_root, runs=args.runs)
            options |= dict(seconds=args.seconds, seed=args.seed)
            compared = _in_a_process(compare, up, name, sizes, **options)
        else:
            compared = [_compiled(target, up, name, sizes, **options, form=form) for form in forms]
        print(table(compared), flush=True)
        rows += compared
        if args.json:
            args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot.draw(rows, args.plot)
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
