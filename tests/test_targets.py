"""The upsamplers compiled for a TPU on a machine that has none, and the counting that judges them.

What small trailing axes (groups, taps, pairs) cost there is not seen on a CPU: they are padded to
tiles of 8 x 128. Whoever changes an upsampler or an op sees here what a TPU's compiler says.
"""

import dataclasses
import json
import pathlib
import platform
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from benchmarks import __main__ as cli
from benchmarks import hlo, targets
from benchmarks.workloads import WORKLOADS
from resfu_jax import list_upsamplers, ops
from resfu_jax.upsamplers import upsampler_entry

# Where libtpu exists, it must be installed and work: nothing is skipped for its absence.
with_libtpu = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="libtpu is made for Linux on x86-64 only",
)


class Limit(NamedTuple):
    """Of a program; bytes in multiples of the output's."""

    temporaries: float  # that it allocates beside arguments and results
    xla: float  # that it touches, as the compiler counts: with padding, VMEM included
    loops: int


# The workload `segmenter` with a quarter of its rows: it uses as much an output, compiled sooner.
ROWS = dataclasses.replace(WORKLOADS["segmenter"], size=(8, 32))

# For one v5e in bfloat16, forward and with backward: a little above what the code needs. Of the
# unguided and feature-guided, only samples at points take a loop, over strips of rows, and again
# backward.
LIMITS = {
    "resfu": (Limit(0.1, 36, 0), Limit(0.1, 101, 0)),
    "carafe": (Limit(0.1, 7, 0), Limit(0.1, 23, 0)),
    "sapa": (Limit(0.1, 6, 0), Limit(0.1, 21, 0)),
    "fade": (Limit(0.1, 20, 0), Limit(0.2, 44, 0)),
    "dysample": (Limit(0.1, 13, 1), Limit(0.1, 42, 2)),
    "dysample_s": (Limit(0.1, 13, 1), Limit(0.1, 43, 2)),
    "lda_aqu": (Limit(0.1, 40, 1), Limit(0.1, 93, 2)),
    "sapa_deform": (Limit(0.1, 17, 1), Limit(0.1, 38, 2)),
    "bilinear": (Limit(0.1, 5, 0), Limit(0.1, 12, 0)),
    "deconv": (Limit(0.1, 56, 0), Limit(0.1, 150, 0)),
    "pixel_shuffle": (Limit(0.1, 50, 0), Limit(0.1, 230, 0)),
    # The image-guided family and FreqFusion, forward: mostly of the encoders' maps.
    "naf": (Limit(0.8, 75, 1),),
    "anyup": (Limit(0.1, 166, 1),),
    "jafar": (Limit(0.9, 88, 1),),
    "raysup": (Limit(1.1, 106, 1),),
    "jbu": (Limit(0.1, 16, 1),),
    "upsample_anything": (Limit(0.8, 48, 4),),
    "freqfusion": (Limit(0.1, 14, 0),),
    "featup": (Limit(0.1, 160, 0),),
    "featup_jbu": (Limit(0.1, 118, 0),),
    "loftup": (Limit(2.4, 145, 2),),
    "uplift": (Limit(0.1, 65, 0),),
}
MEASURED = [
    (name, direction)
    for name, limits in LIMITS.items()
    for direction, _ in zip(("forward", "forward+backward"), limits, strict=False)
]


@with_libtpu
@pytest.mark.parametrize(("name", "direction"), MEASURED)
def test_what_a_tpu_would_do(name, direction):
    with jax.default_matmul_precision("default"):  # as users compile
        row = targets.measure("v5e", name, "rows", ROWS, direction=direction)
    assert "skipped" not in row, row
    used = Limit(
        temporaries=row["temporary_mb"] / row["output_mb"],
        xla=row["xla_mb"] / row["output_mb"],
        loops=len(row["loops"]),
    )
    limit = LIMITS[name][direction != "forward"]
    assert all(a <= b for a, b in zip(used, limit, strict=True)), f"{used}, at most {limit}"


def test_every_class_has_limits():
    classes = {upsampler_entry(name).cls for name in list_upsamplers()}
    limited = {upsampler_entry(name).cls for name in LIMITS}
    assert {c for c in classes if c.__module__.startswith("resfu_jax.")} == limited


def bf16(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)


def attention_across_scales(q, k, v):
    """Of arrays whose heads are not an axis, as a module has them."""
    q, k, v = (x.reshape(*x.shape[:3], 2, -1) for x in (q, k, v))
    y = ops.cross_scale_attention(q, k, v, kernel_size=5)
    return y.reshape(*y.shape[:3], -1)


KERNELS = {
    "local_attention": (ops.local_attention, bf16(36, 272, 25), bf16(18, 136, 128)),
    "fns_attention": (ops.fns_attention, bf16(36, 272, 9), bf16(18, 136, 128)),
    "cross_scale_attention": (
        attention_across_scales,
        bf16(72, 272, 64),
        bf16(18, 68, 64),
        bf16(18, 68, 128),
    ),
}


@with_libtpu
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, target):
    """On one device a kernel that moves operands and results about once; on several, none."""
    f, *arrays = KERNELS[name]
    with jax.default_matmul_precision("default"):
        figures = targets.compile_for(target, f, *arrays)
        precise = jax.default_matmul_precision("highest")(f)  # float32's products are in parts
        wide = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in arrays]
        assert targets.compile_for(target, precise, *wide).kernels["tpu_custom_call"] == 1
    assert figures.kernels["tpu_custom_call"] == 1 and figures.loops == ()
    assert figures.temporaries <= 0.1 * figures.results
    assert figures.hbm <= 2 * (figures.arguments + figures.results)


@with_libtpu
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_several_devices(name):
    f, *arrays = KERNELS[name]
    targets.device("v5e")  # sets the compiler up
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices), "x", axis_types=(AxisType.Auto,))
    batch = jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
    arrays = [jax.ShapeDtypeStruct((4, *a.shape[1:]), a.dtype) for a in arrays]
    split = jax.jit(f, in_shardings=batch, out_shardings=batch).lower(*arrays).compile().as_text()
    assert "tpu_custom_call" not in split and "all-gather" not in split
    parts = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    assert "tpu_custom_call" in jax.jit(parts).lower(*arrays).compile().as_text()


@with_libtpu
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_figures_of_a_known_program(target):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    with jax.default_matmul_precision("default"):
        figures = targets.compile_for(target, lambda x, y: x + y, x, x)
        product = targets.compile_for(target, lambda x, y: x @ y, x, x)
    size = 4 * 1024**2
    assert figures.hbm == figures.xla == 3 * size
    assert figures.arguments == 2 * size and figures.results == size
    assert figures.temporaries == 0 and figures.loops == () and sum(figures.kernels.values()) == 1
    assert figures.estimate_ms > 0 and figures.compile_s > 0
    assert product.flops == pytest.approx(2 * 1024**3, rel=0.01)
    assert targets.compile_for(target, lambda x: x[0], x).flops == 0


@with_libtpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((100, 100), "float32"), ((3, 5, 7), "float32"), ((64, 64, 16, 1, 25), "bfloat16")],
)
def test_padding_is_counted_as_the_compiler_plans_it(shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    figures = targets.compile_for("v5e", lambda x: -x, x)
    assert figures.arguments > 1.2 * x.size * x.dtype.itemsize
    assert figures.hbm == figures.arguments + figures.results


@with_libtpu
def test_gradient_for_ad_hoc_use():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    figures = targets.compile_for("v5e", targets.gradient(lambda x, y: x * y), x, x)
    assert figures.results == pytest.approx(2 * 4 * 256**2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"v5e needs libtpu: pip install -e '\.\[tpu\]'"),
        ("h100", r"h100 needs jax-cuda13-plugin or .*: pip install -e '\.\[cuda\]'"),
    ],
)
def test_a_missing_compiler(name, message, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(targets.Missing, match=message):
        targets.check_installed(name)


def test_a_compiler_that_does_not_start(monkeypatch):
    def broken(**options):
        raise RuntimeError("no such file\nand more")

    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", broken)
    with pytest.raises(
        targets.Missing, match=r"v6e \(jax .*does not start: no such file; .*JAX_PLATFORMS=cpu"
    ):
        targets.device.__wrapped__("v6e")


def test_the_docs_show_the_figures_that_are_committed():
    docs = pathlib.Path(__file__).parents[1] / "docs"
    files = sorted(docs.glob("targets_*.json"))
    assert files
    for file in files:
        assert (
            cli.markdown(json.loads(file.read_text())["rows"]) in (docs / "targets.md").read_text()
        )


# ------------------------------------------------------------------- counting over program text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[3,5]{1,0}", 3 * 5 * 4),
        ("bf16[2,3]", 2 * 3 * 2),
        ("pred[10]{0}", 10),
        ("s4[16]{0}", 8),
        ("c64[2]{0}", 16),
        ("f32[]", 4),
        ("token[]", 0),
        ("(f32[2]{0}, (s8[3]{0}, token[]))", 8 + 3),
        ("bf16[8,25]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[32,16,1,25]{3,2,1,0:T(8,128)(2,1)}", 32 * 16 * 8 * 128 * 2),
        ("f32[3,130]{0,1:T(8,128)}", 128 * 136 * 4),  # the first axis is the minor one
        ("f32[100]{0:T(256)}", 256 * 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # in VMEM
    ],
)
def test_bytes_of_a_type(text, expected):
    assert hlo.array_bytes(text) == expected


def test_bytes_anywhere():
    assert hlo.array_bytes("f32[8,128]{1,0:T(8,128)S(1)}", anywhere=True) == 8 * 128 * 4


def count(body: str, computations: str = "") -> hlo.Counts:
    """Of a program with these lines."""
    return hlo.count(
        f"HloModule m\n\n{computations}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def test_operations_read_and_write():
    counts = count(
        """
  %a = f32[1000]{0} parameter(0)
  %b = f32[10,100]{1,0} bitcast(%a)
  %c = f32[10,100]{1,0} negate(f32[10,100]{1,0} %b), metadata={op_name="neg(x)"}
  ROOT %d = (f32[10,100]{1,0}, /*index=1*/f32[]) tuple(%c, %c)"""
    )
    assert counts.bytes == 2 * 4000
    assert counts.kernels == {"negate": 1} and counts.loops == () and counts.cycles == 0


def test_kernels_by_kind_and_cycles():
    counts = count(
        """
  %a = bf16[1000]{0} parameter(0)
  %b = bf16[1000]{0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"x":"("}
  %c = bf16[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %d = bf16[1000]{0} add(%b, %c), backend_config={"window":{"estimated_cycles":"123"}}"""
    )
    assert counts.kernels == {"tpu_custom_call": 1, "add": 1}
    assert counts.cycles == 123 and counts.bytes == 2000 * 5


def test_slices_read_what_they_take():
    a = "  %a = f32[1000]{0} parameter(0)\n  %i = s32[]{:S(6)} parameter(1)\n"
    slice_ = "  ROOT %s = f32[10]{{0{place}}} dynamic-slice(%a, %i), dynamic_slice_sizes={{10}}"
    assert count(a + slice_.format(place="")).bytes == 80
    assert count(a + slice_.format(place=":S(1)")).bytes == 40
    assert count(a.replace("{0}", "{0:S(1)}") + slice_.format(place="")).bytes == 40


def test_an_update_is_in_place():
    counts = count(
        """
  %a = f32[1000]{0} parameter(0)
  %u = f32[10]{0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %s = f32[1000]{0} dynamic-update-slice(%a, %u, %i)"""
    )
    assert counts.bytes == 2 * 40


FUSIONS = """
%sliced (p.0: f32[1000], p.1: s32[]) -> f32[10] {
  %p.0 = f32[1000]{0} parameter(0)
  %p.1 = s32[] parameter(1)
  %view = f32[1000]{0} bitcast(%p.0)
  %part = f32[10]{0} dynamic-slice(%view, %p.1), dynamic_slice_sizes={10}
  ROOT %n = f32[10]{0} negate(%part)
}

%nested (q.0: f32[1000], q.1: s32[]) -> f32[10] {
  %q.0 = f32[1000]{0} parameter(0)
  %q.1 = s32[] parameter(1)
  ROOT %f = f32[10]{0} fusion(%q.0, %q.1), kind=kLoop, calls=%sliced
}

%whole (r.0: f32[1000], r.1: s32[]) -> f32[10] {
  %r.0 = f32[1000]{0} parameter(0)
  %r.1 = s32[] parameter(1)
  %part.1 = f32[10]{0} dynamic-slice(%r.0, %r.1), dynamic_slice_sizes={10}
  %all = f32[10]{0} reduce(%r.0, %part.1), dimensions={0}, to_apply=%add
  ROOT %n.1 = f32[10]{0} add(%part.1, %all)
}

%updated (t.0: f32[1000], t.1: f32[10], t.2: s32[]) -> f32[1000] {
  %t.0 = f32[1000]{0} parameter(0)
  %t.1 = f32[10]{0} parameter(1)
  %t.2 = s32[] parameter(2)
  %n.2 = f32[10]{0} negate(%t.1)
  ROOT %u = f32[1000]{0} dynamic-update-slice(%t.0, %n.2, %t.2)
}
"""
ARGUMENTS = """
  %a = f32[1000]{0} parameter(0)
  %u = f32[10]{0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
"""


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("f32[10]{0} fusion(%a, %i), kind=kLoop, calls=%sliced", 40 + 40),
        ("f32[10]{0} fusion(%a, %i), kind=kLoop, calls=%nested", 40 + 40),
        ("f32[10]{0} fusion(%a, %i), kind=kLoop, calls=%whole", 4000 + 40),
        ("f32[1000]{0} fusion(%a, %u, %i), kind=kLoop, calls=%updated", 40 + 40),
    ],
)
def test_fusions_read_and_write_what_they_need(fusion, expected):
    counts = count(f"{ARGUMENTS}  ROOT %f = {fusion}", FUSIONS)
    assert counts.bytes == expected and counts.kernels == {"fusion": 1}


LOOPS = """
%body (b: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %b = (s32[]{:S(6)}, f32[1000]{0}) parameter(0)
  %x = f32[1000]{0} get-tuple-element(%b), index=1
  %j = s32[]{:S(6)} get-tuple-element(%b), index=0
  %y = f32[1000]{0} negate(%x)
  ROOT %t = (s32[]{:S(6)}, f32[1000]{0}) tuple(%j, %y)
}

%condition (c: (s32[], f32[1000])) -> pred[] {
  %c = (s32[]{:S(6)}, f32[1000]{0}) parameter(0)
  %k = s32[]{:S(6)} get-tuple-element(%c), index=0
  %bound = s32[]{:S(6)} constant(7)
  ROOT %lt = pred[]{:S(6)} compare(%k, %bound), direction=LT
}

%outer (o: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %o = (s32[]{:S(6)}, f32[1000]{0}) parameter(0)
  ROOT %w = (s32[]{:S(6)}, f32[1000]{0}) while(%o), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("body", "known", "loops", "turns"),
    [
        ("body", "", (7,), 7),  # what the counter is compared with
        ("body", ', backend_config={"known_trip_count":{"n":"5"},"other":[]}', (5,), 5),
        ("outer", ', backend_config={"known_trip_count":{"n":"3"}}', (3, 7), 21),
    ],
)
def test_loops_count_as_often_as_they_turn(body, known, loops, turns):
    loop = f"(s32[]{{:S(6)}}, f32[1000]{{0}}) while(%t), condition=%condition, body=%{body}{known}"
    counts = count(
        f"  %t = (s32[]{{:S(6)}}, f32[1000]{{0}}) parameter(0)\n  ROOT %w = {loop}", LOOPS
    )
    assert counts.loops == loops and counts.bytes == turns * 8000
    assert counts.kernels == {"negate": 1}


BRANCHES = """
%little (l: f32[10]) -> f32[10] {
  %l = f32[10]{0} parameter(0)
  ROOT %m = f32[10]{0} negate(%l)
}

%much (v: f32[10]) -> f32[10] {
  %v = f32[10]{0} parameter(0)
  %w = f32[10]{0} sine(%v)
  ROOT %x = f32[10]{0} cosine(%w)
}
"""


@pytest.mark.parametrize(
    "names",
    ["branch_computations={%little, %much}", "true_computation=%much, false_computation=%little"],
)
def test_of_branches_the_one_that_moves_most(names):
    body = f"""
  %p = pred[]{{:S(6)}} parameter(0)
  %a = f32[10]{{0}} parameter(1)
  ROOT %c = f32[10]{{0}} conditional(%p, %a, %a), {names}"""
    counts = count(body, BRANCHES)
    assert counts.bytes == 160 and counts.kernels == {"sine": 1, "cosine": 1}


def test_what_runs_beside_other_operations_counts_once():
    counts = count(
        """
  %a = f32[1000]{0} parameter(0)
  %c = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[1000]{0:S(1)} copy-done(%c)
  %s = ((f32[1000]{0}), f32[10]{0}, s32[]{:S(2)}) slice-start(%a), slice={[0:10]}
  %e = f32[10]{0} slice-done(%s)
  %t = ((f32[10]{0}), f32[10]{0}, u32[]{:S(2)}) async-start(%e), calls=%little
  ROOT %f = f32[10]{0} async-done(%t)""",
        BRANCHES,
    )
    assert counts.bytes == 4000 + 2 * 40 + 2 * 40
    assert counts.kernels == {"copy": 1, "slice": 1, "negate": 1}


def test_text_of_the_installed_xla():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    text = jax.jit(lambda x: jnp.exp(x) + 1).lower(x).compile().as_text()
    assert hlo.count(text).bytes == 8000
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.count("")
