"""What from_torch and load_pretrained take: arguments, types, files, prefixes; what they say."""

import collections
import inspect
import types

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import CARAFE, HERE, SMALL, STATE, backbone, carafe, entries, rounded, same, write

import resfu_jax.convert as convert
from resfu_jax.backbones import create_backbone
from resfu_jax.convert import from_torch, load_pretrained
from resfu_jax.heads import DEPTH_HEADS, HEADS
from resfu_jax.model import create_model
from resfu_jax.training import BackboneConfig, pretrained_backbone

# ------------------------------------------------------------------------------ official arguments
# The constructors' parameters in their order, as the repositories state them at the commits of the
# golden files; REQUIRED where there is no default.
REQUIRED = inspect.Parameter.empty
_SAPA = dict(dim_y=REQUIRED, dim_x=None)
_FADE = dict(in_channels_en=REQUIRED, in_channels_de=None, scale=2, up_kernel_size=5)
_CONV = dict(groups=1, bias=True, dilation=1, padding_mode="zeros")
_LOFTUP = dict(
    dim=REQUIRED,
    color_feats=True,
    n_freqs=20,
    num_heads=4,
    num_layers=2,
    num_conv_layers=1,
    lr_size=16,
    lr_pe_type="sine",
)
OFFICIAL = {
    "zmhhmz/ReSFU:ReSFU": dict(
        dim_y=REQUIRED,
        dim_x=None,
        groups=4,
        kernel_size=3,
        scale_factor=4,
        embedding_dim=32,
        y_conv=True,
        qkv_bias=True,
        normx=True,
        normy=True,
        gn_dim=8,
        radius=8,
        eps=0.001,
        lr_mult=1.0,
        gf_scale=2,
    ),
    "zmhhmz/ReSFU:PCDC_Block": dict(
        in_channels=REQUIRED,
        scale_factor=REQUIRED,
        mid_channels=128,
        kernel_size=3,
        groups=4,
        gn_dim=8,
    ),
    "poppinace/sapa:SAPA": _SAPA
    | dict(up_factor=2, up_kernel_size=5, embedding_dim=64, qkv_bias=True, norm="LayerNorm"),
    "poppinace/sapa:SAPAExp": _SAPA
    | dict(
        out_dim=None,
        q_mode="encoder_only",
        v_embed=False,
        up_factor=2,
        up_kernel_size=5,
        embedding_dim=64,
        qkv_bias=True,
        norm="LayerNorm",
    ),
    "tiny-smart/sapa:SAPA": _SAPA
    | dict(up_factor=2, up_kernel_size=5, embedding_dim=32, qkv_bias=True, norm=True),
    "tiny-smart/sapa:SAPADeform": _SAPA
    | dict(
        up_factor=2,
        num_point=9,
        groups=4,
        embedding_dim=32,
        qkv_bias=True,
        high_offset=True,
        norm=False,
    ),
    "poppinace/fade:FADE": _FADE,
    "poppinace/fade:FADELite": _FADE,
    "poppinace/fade:SemiShiftUp": _FADE,
    "tiny-smart/dysample:DySample": dict(
        in_channels=REQUIRED, scale=2, style="lp", groups=4, dyscope=False
    ),
    "duzw9311/LDA-AQU:LDA_AQU": dict(
        in_channels=REQUIRED,
        reduction_factor=4,
        nh=1,
        scale_factor=2.0,
        k_e=3,
        k_u=3,
        n_groups=2,
        range_factor=11,
        rpb=True,
    ),
    "open-mmlab/mmcv:CARAFEPack": dict(
        channels=REQUIRED,
        scale_factor=REQUIRED,
        up_kernel=5,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=64,
    ),
    "pytorch/pytorch:ConvTranspose2d": dict(
        in_channels=REQUIRED,
        out_channels=REQUIRED,
        kernel_size=REQUIRED,
        stride=1,
        padding=0,
        output_padding=0,
    )
    | _CONV,
    # The arguments of Conv2d, whose out_channels is out_channels_conv, and of PixelShuffle.
    "pytorch/pytorch:Sequential(Conv2d, PixelShuffle)": dict(
        in_channels=REQUIRED,
        out_channels_conv=REQUIRED,
        kernel_size=REQUIRED,
        upscale_factor=REQUIRED,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
    ),
    "valeoai/NAF:NAF": dict(
        dim=256,
        heads_attn=4,
        heads_rope=4,
        kernel_size=9,
        use_encoder=True,
        rope_base=100.0,
        rope_rescale=2.0,
        img_layers=2,
    ),
    "wimmerth/anyup:AnyUp": dict(
        input_dim=3,
        qk_dim=128,
        kernel_size=1,
        kernel_size_lfu=5,
        window_ratio=0.1,
        num_heads=4,
        init_gaussian_derivatives=False,
        use_natten=False,
        lfu_dim=None,
    ),
    "wimmerth/anyup:NATTENCrossAttentionBlock": dict(
        qk_dim=REQUIRED, num_heads=REQUIRED, window_ratio=0.1
    ),
    "PaulCouairon/JAFAR:JAFAR": dict(
        input_dim=3, qk_dim=128, v_dim=384, feature_dim=None, kernel_size=1, num_heads=4
    ),
    "andrehuang/loftup:LoftUp": _LOFTUP,
    "andrehuang/loftup:UpsamplerwithChannelNorm": _LOFTUP,  # around a LoftUp
    "mhamilton723/FeatUp:JBULearnedRange": dict(
        guidance_dim=REQUIRED, feat_dim=REQUIRED, key_dim=REQUIRED, scale=2, radius=3
    ),
    "mhamilton723/FeatUp:JBUStack": dict(feat_dim=REQUIRED),
    "mwalmer-umd/UPLiFT:UPLiFT": dict(
        in_channels=REQUIRED, patch_size=REQUIRED, cfg=REQUIRED, low_mem=False
    ),
    "MAP-RaysUp/RaysUp:RaysUp": dict(
        input_dim=3,
        qk_dim=256,
        v_dim=384,
        feature_dim=None,
        kernel_size=1,
        num_heads=4,
        use_spe=True,
        use_rope=True,
        rope_freq_base=3.0,
    ),
    "Linwei-Chen/FreqFusion:FreqFusion": dict(
        hr_channels=REQUIRED,
        lr_channels=REQUIRED,
        scale_factor=1,
        lowpass_kernel=5,
        highpass_kernel=3,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=64,
        align_corners=False,
        upsample_mode="nearest",
        feature_resample=False,
        feature_resample_group=4,
        comp_feat_upsample=True,
        use_high_pass=True,
        use_low_pass=True,
        hr_residual=True,
        semi_conv=True,
        hamming_window=True,
        feature_resample_norm=True,
    ),
}
OURS = {"implementation", "dtype", "param_dtype", "dilation", "tile", "scrambled_phases"}
OURS |= {"direction_feat", "scale_per_image", "iters", "q_chunk_size"}


def test_all_official_classes_are_listed():
    assert OFFICIAL.keys() == convert._CONVERTERS.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_official_ones(name):
    parameters = list(inspect.signature(convert._CONVERTERS[name]).parameters.values())[1:]
    ours = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    added = ours.keys() - OFFICIAL[name].keys()
    assert added <= OURS - (OFFICIAL[name].keys())
    official = {k: v for k, v in ours.items() if k not in added}
    assert list(official.items()) == list(OFFICIAL[name].items())
    assert list(ours)[: len(official)] == list(official)  # the official order


@pytest.mark.parametrize("name", OFFICIAL)
def test_unknown_and_missing_arguments_are_named(name):
    required = [k for k, v in OFFICIAL[name].items() if v is REQUIRED]
    with pytest.raises(ValueError) as error:
        from_torch(name, {}, **dict.fromkeys(required, 8), guide_features=3)
    assert f"unknown argument of {name} 'guide_features'" in str(error.value)
    assert all(argument in str(error.value) for argument in OFFICIAL[name])
    missing = f"needs {' and '.join(required)}, as its constructor"
    with pytest.raises(ValueError, match=missing if required else "it has no entries"):
        from_torch(name, {})


def test_resfu_without_its_scale_is_the_official_one():
    """The golden file of scale 4, read without saying so."""
    g = goldens.load("resfu_s4_k3_gf2_stages")
    arguments = {k: v for k, v in g.args.items() if k != "scale_factor"}
    up = from_torch("ReSFU", g.group("param"), **arguments)
    x, y = (jnp.asarray(goldens.nhwc(g.arrays[f"in/{n}"])) for n in "xy")
    goldens.assert_close(up(x, y), goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")


def test_pytorchs_own_arguments():
    g = goldens.load("classic_conv_transpose_k3s2p1op1")
    state = g.group("param")
    arguments = {k: (v, v) if "channels" not in k else v for k, v in g.args.items()}
    up = from_torch("ConvTranspose2d", state, **arguments)
    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))
    goldens.assert_close(up(x), goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    without = from_torch("ConvTranspose2d", {"weight": state["weight"]}, **g.args, bias=False)
    goldens.assert_close(without(x), np.asarray(up(x)) - state["bias"], 1e-6, "without bias")
    for wrong in (
        dict(groups=2),
        dict(dilation=2),
        dict(padding_mode="reflect"),
        dict(kernel_size=(3, 1)),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            from_torch("ConvTranspose2d", state, **g.args | wrong)


# ------------------------------------------------------------------------------- types of state


class Tensor:
    """What from_torch may rely on of torch.Tensor; PyTorch itself is not among the requirements."""

    def __init__(self, value, dtype=None, grad=False, device="cpu"):
        self.value, self.grad, self.device = value, grad, device
        self.bfloat16 = dtype == "bfloat16"
        self.shape = value.shape

    def detach(self):
        return Tensor(self.value, "bfloat16" if self.bfloat16 else None, device=self.device)

    def cpu(self):
        return Tensor(self.value, "bfloat16" if self.bfloat16 else None, grad=self.grad)

    def float(self):
        return Tensor(self.value.astype(np.float32), grad=self.grad)

    def numpy(self):
        if self.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        if self.grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.device != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        return self.value

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


class Module:
    """A torch.nn.Module, as far as its state_dict."""

    def __init__(self, state):
        self._state = state

    def state_dict(self):
        return self._state


@pytest.mark.parametrize(
    "state",
    [
        collections.OrderedDict(STATE),
        types.MappingProxyType(STATE),
        {k: jnp.asarray(v) for k, v in STATE.items()},
        {k: v.tolist() for k, v in STATE.items()},
        {k: Tensor(v, grad=True, device="cuda:0") for k, v in STATE.items()},
        Module(STATE),
        {"state_dict": STATE, "optimizer": {"state": {0: {"exp_avg": np.ones(3)}}}, "epoch": 3},
        {"model": Module(STATE), "epoch": 3},
        {f"module.{k}": v for k, v in STATE.items()},
        {f"_orig_mod.module.{k}": v for k, v in STATE.items()},
        {"state_dict": {f"module.{k}": v for k, v in STATE.items()}, "args": object()},
    ],
    ids=[
        "OrderedDict",
        "mapping",
        "jax",
        "lists",
        "parameters on a GPU",
        "module",
        "checkpoint",
        "checkpoint of a module",
        "module.",
        "_orig_mod.module.",
        "state_dict.module.",
    ],
)
def test_state_dicts(state):
    same(carafe(state), carafe(STATE))


def test_bfloat16_is_read_exactly():
    narrow = rounded(STATE)
    expected = carafe({k: v.astype(np.float32) for k, v in narrow.items()})
    same(carafe(narrow), expected)
    tensors = {k: Tensor(v, dtype="bfloat16", grad=True) for k, v in narrow.items()}
    same(carafe(tensors), expected)
    kept = carafe(narrow, param_dtype=jnp.bfloat16)
    assert kept.encode.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kept.encode.kernel[...].astype(np.float32), expected.encode.kernel[...]
    )


def test_weights_do_not_follow_the_array_that_they_are_from():
    state = {k: v.copy() for k, v in STATE.items()}
    up = carafe(state)
    for v in state.values():
        v[...] = 0
    same(up, carafe(STATE))


@pytest.mark.parametrize("wrong", [np.int8, np.int64, bool, np.complex64])
def test_weights_are_floating_point(wrong):
    state = STATE | {"content_encoder.bias": STATE["content_encoder.bias"].astype(wrong)}
    with pytest.raises(ValueError, match="'content_encoder.bias' holds .*not floating-point"):
        carafe(state)


def test_what_cannot_be_read_is_named():
    class Meta(Tensor):
        def cpu(self):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

        detach = Tensor.numpy = lambda self: self

    state = STATE | {"content_encoder.bias": Meta(STATE["content_encoder.bias"])}
    with pytest.raises(ValueError, match="'content_encoder.bias' is a Meta that cannot be read"):
        carafe(state)


def test_constants_are_checked():
    g = goldens.load("resfu_s2_k3_gf1")
    state = g.group("param")
    with pytest.raises(ValueError, match="'GF.kernel' is not a box of ones"):
        from_torch("ReSFU", state | {"GF.kernel": 2 * state["GF.kernel"]}, **g.args)
    parameters = {k: v for k, v in state.items() if k != "GF.kernel"}
    with pytest.raises(ValueError, match=r"give its state_dict\(\), not named_parameters\(\)"):
        from_torch("ReSFU", parameters, **g.args)


# ---------------------------------------------------------------------------------------- prefixes
def test_a_part_of_a_larger_model_is_asked_for():
    larger = {f"decode_head.up.{k}": v for k, v in STATE.items()} | {"backbone.w": np.ones(3)}
    with pytest.raises(
        ValueError, match=r"others beside .*mean these with prefix='decode_head.up.'"
    ):
        carafe(larger)
    for prefix in ("decode_head.up", "decode_head.up."):
        same(carafe(larger, prefix=prefix), carafe(STATE))
    two = larger | {f"decode_head.up2.{k}": v for k, v in STATE.items()}
    with pytest.raises(
        ValueError, match=r"2 places, 'decode_head.up.', 'decode_head.up2.': choose"
    ):
        carafe(two)
    with pytest.raises(ValueError, match=r"no name begins with prefix 'neck.'; its names begin"):
        carafe(larger, prefix="neck")
    # A copy beside the weights is another place, also of a checkpoint.
    for state in (STATE | {f"ema.{k}": v for k, v in STATE.items()}, {"a": STATE, "b": STATE}):
        with pytest.raises(ValueError, match="in 2 places, .*choose one with prefix="):
            carafe(state)
    same(carafe({"a": STATE, "b": STATE}, prefix="b"), carafe(STATE))
    # Wrappers in front of the prefix are found; not if there are two.
    for state in ({"state_dict": larger}, {f"module.{k}": v for k, v in two.items()}):
        same(carafe(state, prefix="decode_head.up"), carafe(STATE))
    with pytest.raises(ValueError, match="in 2 places: choose one of 'a.decode_head.up.', 'b.dec"):
        carafe({"a": larger, "b": larger}, prefix="decode_head.up")
    same(carafe({"a": larger, "b": larger}, prefix="b.decode_head.up"), carafe(STATE))
    with pytest.raises(ValueError, match="missing 'channel_compressor.weight'"):
        carafe({"model": STATE}, prefix="")


def test_what_is_below_a_prefix_is_still_checked():
    state = {f"module.{k}": v for k, v in STATE.items()}
    with pytest.raises(ValueError, match="of the entries below 'module.'.*unexpected 'extra'"):
        carafe(state | {"module.extra": np.ones(1)})
    del state["module.content_encoder.bias"]
    with pytest.raises(ValueError, match="below 'module.'.*missing 'content_encoder.bias'"):
        carafe(state)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "backbone.", "model.", "encoder.", "module.backbone.", "teacher.x."],
)
def test_prefixes_of_backbones(family, prefix, tmp_path):
    state, expected, model = entries(family), backbone(family), backbone(family)
    unused = load_pretrained(write(tmp_path / "a.safetensors", state), expected)
    path = write(tmp_path / "b.safetensors", {prefix + k: v for k, v in state.items()})
    assert load_pretrained(path, model) == [prefix + k for k in unused]
    same(model, expected)


@pytest.mark.parametrize("family", SMALL)
def test_backbones_of_larger_models(family, tmp_path):
    """A segmentor's backbone; DINO's student beside its teacher."""
    state, expected, model = entries(family), backbone(family), backbone(family)
    load_pretrained(write(tmp_path / "a.safetensors", state), expected)
    others = {f"neck.conv.{i}.weight": np.ones(3, np.float32) for i in range(3)}
    larger = {f"backbone.{k}": v for k, v in state.items()} | others
    unused = load_pretrained(write(tmp_path / "b.safetensors", larger), model)
    assert set(others) <= set(unused)
    same(model, expected)
    nested = write(tmp_path / "d.safetensors", {f"a.{k}": v for k, v in larger.items()})
    model = backbone(family)
    load_pretrained(nested, model, prefix="a")
    same(model, expected)

    student = {f"student.module.backbone.{k}": np.zeros_like(v) for k, v in state.items()}
    two = student | {f"teacher.backbone.{k}": v for k, v in state.items()}
    path, model = write(tmp_path / "c.safetensors", two), backbone(family)
    with pytest.raises(ValueError, match="2 places, .*teacher.*choose one with prefix="):
        load_pretrained(path, model)
    for prefix in ("teacher.backbone", "teacher."):
        model = backbone(family)
        assert set(student) <= set(load_pretrained(path, model, prefix=prefix))
        same(model, expected)


# -------------------------------------------------------------------------------- causes, messages
def test_the_cause_comes_first(tmp_path):
    resnet18 = nnx.eval_shape(lambda: create_backbone("resnet", variant="18", rngs=nnx.Rngs(0)))
    file = HERE / "goldens_resnet" / "transformers.safetensors"
    cases = [
        (file, resnet18, "it holds a ResNet of bottlenecks, .*and the model is ResNet-18"),
        (HERE / "goldens_mit", backbone("resnet"), "it holds a MiT of .*and the model is a ResNet"),
        (file, backbone("vit"), "it holds a ResNet of .*and the model is ViT-2 blocks of 16/4"),
    ]
    nothing = write(tmp_path / "n.safetensors", {f"a{i}.b": np.ones(1) for i in range(2000)})
    cases.append((nothing, backbone("mit"), "it has none of the names of MiT; its names begin"))
    authors = {
        "patch_embed1.proj.weight": np.ones((8, 3, 7, 7)),
        "block1.0.norm1.weight": np.ones(8),
    }
    authors = write(tmp_path / "m.safetensors", authors)
    cases.append(
        (authors, backbone("mit"), "it holds a MiT as its authors name it .*nvidia/mit-b0")
    )
    for path, model, message in cases:
        with pytest.raises(ValueError, match=f"does not fit [MRV][a-zA-Z]*: {message}") as error:
            load_pretrained(path, model)
        assert len(str(error.value)) < 2000


def test_long_lists_are_counted():
    with pytest.raises(ValueError) as error:
        carafe({f"layer{i}.{'x' * 500}": np.ones(2) for i in range(500)})
    text = str(error.value)
    assert len(text) < 2000
    assert "4 missing, 500 unexpected (of 4 needed)" in text
    assert "missing 'channel_compressor.weight' (12, 8, 1, 1)" in text and "more" in text
    wider = from_torch_error(STATE, compressed_channels=13)
    assert "all names are right, so the arguments or sizes are others" in wider
    assert "3 of another shape (of 4 needed)" in wider


def from_torch_error(state, **options):
    with pytest.raises(ValueError) as error:
        from_torch("CARAFEPack", state, **CARAFE.args | options)
    return str(error.value)


# ----------------------------------------------------------------------------- training's own path
@pytest.mark.parametrize("family", SMALL)
def test_training_starts_from_weights(family, tmp_path):
    """As train.py does it: read into shapes only, and stored into the model under jit."""
    path = write(tmp_path / "w.safetensors", entries(family))
    options = dict(SMALL[family])
    config = BackboneConfig(
        name=family, variant=options.pop("variant", default(family)), options=options,
        pretrained=str(path),
    )  # fmt: skip
    weights = pretrained_backbone(config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weights))

    def init(pretrained):
        model = create_backbone(family, **SMALL[family], rngs=nnx.Rngs(1))
        nnx.update(model, pretrained)
        return nnx.as_pure(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))

    expected = backbone(family)
    load_pretrained(path, expected)
    wanted = nnx.as_pure(nnx.state(expected, nnx.Any(nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(init)(weights), wanted)


kinds = nnx.Any(nnx.Param, nnx.BatchStat)


def default(family):
    return {"mit": "b0", "resnet": "50", "vit": "tiny"}[family]


VITS = {
    "vit": dict(norm_epsilon=1e-12),
    "dinov2": dict(variant="dinov2_small"),
    "dinov2_registers": dict(variant="dinov2_registers_small", registers=3),
    "dinov3": dict(variant="dinov3_small", registers=3),
}


@pytest.mark.parametrize("name", VITS)
def test_training_starts_from_every_vit(name, tmp_path):
    with np.load(HERE / "goldens_vit" / f"{name}.npz") as z:
        state = {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")}
    options = SMALL["vit"] | dict(image_size=24) | VITS[name]
    variant = options.pop("variant", "tiny")
    path = write(tmp_path / "w.safetensors", state)
    weights = pretrained_backbone(
        BackboneConfig(name="vit", variant=variant, options=options, pretrained=str(path))
    )
    expected = create_backbone("vit", variant=variant, **options, rngs=nnx.Rngs(0))
    load_pretrained(path, expected)
    jax.tree.map(
        np.testing.assert_array_equal, weights, nnx.as_pure(nnx.state(expected, nnx.Param))
    )


# A SegFormer head takes four maps, and the small ViT has two blocks.
@pytest.mark.parametrize(
    "family, head", [(f, h) for f in SMALL for h in HEADS if (f, h) != ("vit", "segformer")]
)
def test_training_starts_under_every_head(family, head, tmp_path):
    """train.py's first line of weights: into the backbone of the whole model, in shapes."""
    of_one_map = "linear" in head or head == "bins"
    options = SMALL[family] | (dict(layers=(1,)) if family == "vit" and of_one_map else {})
    path = write(tmp_path / "w.safetensors", entries(family))
    fields = {k: v for k, v in options.items() if k != "variant"}
    weights = pretrained_backbone(
        BackboneConfig(name=family, variant=default(family), options=fields, pretrained=str(path))
    )
    heads = {"linear": dict(scale=2, guide_stride=2), "linear_probe": {}}
    model = nnx.eval_shape(
        lambda: create_model(
            backbone=dict(name=family, **options),
            head=dict(name=head, upsampler="bilinear") | heads.get(head, {}),
            num_classes=1 if head in DEPTH_HEADS else 3,
            rngs=nnx.Rngs(0),
        )
    )
    shapes = jax.tree.map(jnp.shape, nnx.as_pure(nnx.state(model.backbone, kinds)))
    assert jax.tree.map(jnp.shape, weights) == shapes
    nnx.update(model.backbone, weights)
    found = jax.tree.leaves(nnx.state(model.backbone, kinds))
    assert all(isinstance(leaf, jax.Array) for leaf in found)


def test_training_chooses_between_places(tmp_path):
    state = entries("mit")
    path = write(
        tmp_path / "w.safetensors", {f"{t}.{k}": v for t in "ab" for k, v in state.items()}
    )
    config = BackboneConfig(options=SMALL["mit"], pretrained=str(path))
    with pytest.raises(ValueError, match="in 2 places"):
        pretrained_backbone(config)
    config.pretrained_prefix = "b"
    assert jax.tree.leaves(pretrained_backbone(config))
