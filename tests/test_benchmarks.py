import importlib.util
import json
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import measure, plot, targets
from benchmarks.overhead import overhead
from benchmarks.workloads import GROUPS, WORKLOADS, Skip, Workload, fit
from resfu_jax import list_upsamplers

TINY = Workload(channels=8, size=(3, 4), scale=2, guide=4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)


def test_the_named_workloads():
    for name, workload in WORKLOADS.items():
        assert workload.channels > 0 and workload.guide > 0 and min(workload.size) > 0, name
        assert workload.scale > 1, name
    for members in GROUPS.values():
        assert {WORKLOADS[m].output_size for m in members} == {(128, 128)}
    assert not set(GROUPS) & set(WORKLOADS)
    assert WORKLOADS["dino_hd"].output_size == (1024, 1024)


def test_every_upsampler_is_measured_somewhere():
    for name in list_upsamplers():
        workload, note = fit(name, WORKLOADS["shapes"])
        assert workload == WORKLOADS["shapes"] and not note


def test_a_guide_is_widened_where_it_must_be():
    workload, note = fit("fade", TINY)
    assert workload.guide == TINY.channels and "wide" in note
    assert fit("semishift", TINY) == (TINY, "")


def test_what_does_not_fit_has_its_reason():
    odd = Workload(channels=6, size=(3, 4), scale=2, guide=4)
    with pytest.raises(Skip, match="groups"):
        fit("dysample", odd)
    (row,) = measure.compare("dysample", "odd", odd)
    assert "groups" in row["skipped"] and "ms" not in row


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
def test_comparison(direction):
    rows = measure.compare("carafe", "tiny", TINY, direction=direction, runs=2)
    ours, literal = rows
    assert (ours["form"], literal["form"]) == ("ours", "literal")
    for row in rows:
        assert row["upsampler"] == "carafe" and row["workload"] == "tiny"
        assert row["runs"] == 14 and 0 < row["ms_min"] <= row["ms"] and row["ms_first"] > 0
        assert row["compile_s"] > 0 and row["gflop"] > 0 and row["temporary_mb"] >= 0
    assert literal["error"] < 1e-5
    assert literal["time_ratio"] == literal["ms"] / ours["ms"]
    assert "error" not in ours and "time_ratio" not in ours


def test_the_seed_draws_all_inputs():
    first, other, same = (
        jax.tree.leaves(measure._arrays("resfu", TINY, "float32", "forward+backward", seed))
        for seed in (0, 1, 1)
    )
    assert len(first) == 3  # features, guide, cotangent
    for a, b, c in zip(first, other, same, strict=True):
        assert (a != b).all() and (b == c).all()


def test_a_wrong_form_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "difference", lambda a, b: 0.5)
    ours, literal = measure.compare("carafe", "tiny", TINY, runs=1)
    assert "ms" in ours and "ms" not in literal
    assert literal["wrong"] and "differs" in literal["skipped"]


def test_what_needs_too_much_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(measure, "_free_memory", lambda: 10.0)
    rows = measure.compare("bilinear", "tiny", TINY)
    assert "of memory" in rows[0]["skipped"] and "one form" in rows[1]["skipped"]


def test_running_out_of_memory_is_a_reason():
    with pytest.raises(Skip, match="full"), measure.foreign_code():
        raise RuntimeError("full\nof what")


def test_calls_take_turns(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    turns = measure.time_in_turn(calls, runs=2, seconds=60.0)
    assert order == list((8 * "a" + 8 * "b") * 2)
    assert [[len(times) for times in form] for form in turns.values()] == [[8, 8], [8, 8]]
    assert len(measure.time_in_turn(calls, runs=3, seconds=0.0)["a"]) == 1
    monkeypatch.setattr(measure, "_TURN", 0.0)  # slow calls
    assert [len(times) for times in measure.time_in_turn(calls, runs=1, seconds=1.0)["a"]] == [2]


def test_difference():
    a = np.array(jax.random.normal(jax.random.key(0), (2, 3, 4, 5)))
    assert measure.difference(a, a) == 0
    np.testing.assert_allclose(measure.difference(1.25 * a, a), 0.25, rtol=1e-5)
    assert measure.difference(a, 0 * a) == 1
    with pytest.raises(ValueError, match="shapes"):
        measure.difference(a, a[:1])


def test_command(tiny, tmp_path, capsys):
    file = tmp_path / "results.json"
    command = "--workloads tiny --upsamplers carafe bilinear --directions forward --runs 1"
    assert cli.main([*command.split(), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "carafe tiny float32 forward: 8 channels, 3x4 to 6x8\n" in out
    assert "skipped: it has only one form" in out
    results = json.loads(file.read_text())
    assert results["machine"]["cores"] >= 1 and results["machine"]["versions"]["jax"]
    forms = [(row["upsampler"], row["form"]) for row in results["rows"]]
    assert forms == [(up, form) for up in ("carafe", "bilinear") for form in ("ours", "literal")]


def test_markdown(tmp_path, capsys):
    head = dict(upsampler="carafe", workload="tiny", dtype="float32", direction="forward+backward")
    cost = dict(ms=2.0, temporary_mb=1.0, compile_s=0.5)
    rows = [
        head | dict(form="ours") | cost,
        head | dict(form="torch", ms=5.0, temporary_mb=3.0),
        head | dict(upsampler="resfu", form="ours") | cost,
        head | dict(upsampler="resfu", form="torch", skipped="no checkout; see --peer-root"),
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(dict(rows=rows)))
    assert cli.main(["--markdown", str(file)]) == 0
    *_, carafe, resfu = capsys.readouterr().out.strip().splitlines()
    assert carafe == "| `carafe` | `tiny` | with backward | 2.0 | 5.0 | 2.5 | 1.0 | 3.0 | 0.5 |"
    assert (
        resfu == "| `resfu` | `tiny` | with backward | 2.0 | - (no checkout) | - | 1.0 | - | 0.5 |"
    )


FIGURES = dict(temporary_mb=4.0, hbm_mb=5.0, gflop=1.5, kernels=7, loops=[2, 8], compile_s=3.0)
TARGET_ROWS = [
    targets.head("v5e", "carafe", "tiny", dtype, "forward", form)
    | dict(FIGURES, output_mb=2.0, xla_mb=xla_mb, estimate_ms=0.25)
    for dtype, form, xla_mb in (
        ("bfloat16", "ours", 40.0),
        ("bfloat16", "literal", 60.0),
        ("float32", "ours", None),
    )
]


def test_table_of_a_target():
    head, titles, ours, literal, _ = cli.table(TARGET_ROWS).splitlines()
    assert head == "v5e carafe tiny bfloat16 forward"
    assert titles.split()[:4] == ["temp.", "hbm", "xla", "GFLOP"]
    assert ours.split() == "ours 2.00 2.5 20 1.50 0.25 7 2 (2, 8) 3.0".split()
    assert literal.split()[:4] == ["literal", "2.00", "2.5", "30"]


def test_markdown_of_a_target():
    skipped = targets.head("v5e", "fade", "tiny", "float32", "forward+backward", "ours")
    lines = cli.markdown([*TARGET_ROWS, skipped | dict(skipped="too much")]).splitlines()
    assert len(lines) == 5
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:4] == ["`carafe`", "v5e", "`tiny`", "forward, bfloat16"]
    assert cells[2][4:] == "2.00|2.5|20|1.50|0.25|7|2 (2, 8)|3.0|2.00|2.5|30".split("|")
    assert cells[3][3:7] == ["forward", "2.00", "2.5", "-"] and cells[3][-3:] == ["-"] * 3
    assert cells[4] == ["`fade`", "v5e", "`tiny`", "with backward", "too much"]


def test_defaults_of_a_target():
    args = cli.arguments(["--target", "v5e", "h100"])
    assert args.target == ["v5e", "h100"] and set(args.upsamplers) == set(list_upsamplers())
    assert "dino" in args.workloads and "bfloat16" in args.dtypes
    here = cli.arguments([])
    assert here.target is None and here.upsamplers == cli.UPSAMPLERS
    assert here.dtypes == ("float32",) and here.directions == measure.DIRECTIONS
    assert cli.arguments(["--target", "v6e", "--upsampler", "fade"]).upsamplers == ["fade"]


def test_command_with_a_target(tiny, tmp_path, capsys, monkeypatch):
    def process(f, target, up, name, sizes, *, dtype, direction, form):
        assert f is targets.measure and sizes == TINY
        if up == "fade":
            raise BrokenProcessPool
        row = targets.head(target, up, name, dtype, direction, form)
        return row | dict(FIGURES, output_mb=2.0, xla_mb=None, estimate_ms=None)

    monkeypatch.setattr(cli, "_in_a_process", process)
    monkeypatch.setattr(targets, "device", lambda target: None)
    file = tmp_path / "results.json"
    command = "--target v6e --workloads tiny --upsamplers fade carafe --dtypes float32"
    command += f" --directions forward --no-literal --json {file}"
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert "compiled for v6e, nothing ran" in out and "skipped: the compiler broke down" in out
    results = json.loads(file.read_text())
    assert "nothing ran" in results["machine"]["device"]
    assert [row["upsampler"] for row in results["rows"]] == ["fade", "carafe"]


def test_a_target_whose_compiler_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    targets.device.cache_clear()
    assert cli.main(["--target", "v5e"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: compiling for v5e needs libtpu: pip install -e '.[tpu]'\n"
    assert not shown.out


def test_overhead():
    ways = overhead("carafe", calls=20)
    assert len(ways) == 5 and all(us > 0 for us in ways.values())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("--torch-compile", "needs --peer-root"),
        ("--torch-plain", "needs --peer-root"),
        ("--runs 0", "at least 1"),
        ("--workloads nowhere", "nowhere"),
        ("--peer-root peers", "needs PyTorch"),
        ("--target v5e --overhead", "compiles only"),
        ("--target v5e --plot file.png", "compiles only"),
        ("--target v7", "v5e"),
    ],
)
def test_wrong_commands(command, why, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.arguments(command.split())
    assert why in capsys.readouterr().err


def test_plot(tmp_path):
    sizes = plot.sweep()
    assert {w.scale for w in sizes.values()} == {2, 4, 8, 16}
    assert {w.channels for w in sizes.values()} == {64, 128, 256, 512, 1024}
    rows = [
        dict(upsampler="resfu", direction=d, size=w.size, scale=w.scale, channels=w.channels)
        | dict(ms=float(w.channels), temporary_mb=1.0)
        for w in sizes.values()
        for d in measure.DIRECTIONS
    ]
    plot.draw(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
