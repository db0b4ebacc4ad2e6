import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from resfu_jax.backbones import create_backbone
from resfu_jax.training import (
    OptimizerConfig,
    accumulate_gradients,
    create_optimizer,
    create_schedule,
    cross_entropy,
    pixel_weights,
    update_ema,
)
from resfu_jax.training.optimizer import decay_mask, learning_rate_multiples


class Net(nnx.Module):
    """The kinds of parameters there are, under the names that models have."""

    def __init__(self, rngs, dropout=0.0):
        self.backbone = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Conv(8, 5, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.backbone(x)))))


def pure_params():
    return nnx.as_pure(nnx.state(Net(nnx.Rngs(0)), nnx.Param))


@pytest.mark.parametrize("final", [0.0, 0.3])
@pytest.mark.parametrize("power", [0.9, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_schedule_is_the_written_formula(warmup, power, final):
    """The peak is reached at the step after the warm-up, the final rate on the last step, 109."""
    config = OptimizerConfig(
        learning_rate=2.0,
        final_learning_rate=final,
        warmup_steps=warmup,
        warmup_start=0.1,
        power=power,
    )
    schedule = create_schedule(config, 110)

    def rate(step):
        if step < warmup:
            return 2.0 * (0.1 + 0.9 * step / warmup)
        return (2.0 - final) * (1 - (step - warmup) / (109 - warmup)) ** power + final

    for step in {0, 1, max(warmup - 1, 0), warmup, warmup + 1, 60, 107, 108, 109}:
        np.testing.assert_allclose(schedule(step), rate(step), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(schedule(warmup), 2.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(109), final, rtol=1e-6, atol=1e-7)
    assert schedule(108) > schedule(109)


def test_cosine_decay_is_half_a_period():
    config = OptimizerConfig(
        learning_rate=2.0, final_learning_rate=0.5, warmup_steps=10, warmup_start=0, decay="cosine"
    )
    schedule = create_schedule(config, 110)
    assert (schedule(0), schedule(5), schedule(10), schedule(109)) == (0, 1, 2, 0.5)
    for step in (20, 60, 100):
        wave = (1 + np.cos(np.pi * (step - 10) / 99)) / 2
        np.testing.assert_allclose(schedule(step), 1.5 * wave + 0.5, rtol=1e-6)


def test_the_last_of_fifty_steps_has_the_final_rate():
    """As MMEngine's PolyLR; its values for T = 50 and no warm-up."""
    config = OptimizerConfig(
        learning_rate=1e-3, final_learning_rate=1e-5, power=0.9, warmup_steps=0
    )
    schedule = create_schedule(config, 50)
    wanted = [1e-3, 9.9e-4 * (48 / 49) ** 0.9 + 1e-5, 9.9e-4 * (1 / 49) ** 0.9 + 1e-5, 1e-5]
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 48, 49)], wanted, rtol=1e-5)


def test_the_optimizer_steps_at_the_rates_of_the_schedule():
    """The first update has the rate of step 0, the last that of step T - 1."""
    config = OptimizerConfig(
        name="sgd",
        learning_rate=1.0,
        final_learning_rate=0.25,
        warmup_steps=0,
        beta1=0.0,
        weight_decay=0.0,
    )
    optimizer, params = create_optimizer(config, 4), {"backbone": {"kernel": jnp.zeros((1, 1))}}
    state, rates = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        for _ in range(4):
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            rates.append(-float(updates["backbone"]["kernel"][0, 0]))
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize(("steps", "last"), [(1, 0.0), (4, 0.03), (100, 0.99), (101, 1.0)])
def test_a_run_that_ends_before_the_decay_begins(steps, last):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=100, warmup_start=0.0)
    schedule = create_schedule(config, steps)
    np.testing.assert_allclose(schedule(steps - 1), last, rtol=1e-3, atol=1e-7)


def test_masks():
    params = pure_params()
    assert nnx.to_pure_dict(decay_mask(params)) == {
        "backbone": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }
    config = OptimizerConfig(head_learning_rate_multiple=10.0)
    assert nnx.to_pure_dict(learning_rate_multiples(config, params)) == {
        "backbone": {"kernel": 1.0, "bias": 1.0},
        "norm": {"scale": 1.0, "bias": 1.0},
        "head": {"kernel": 10.0, "bias": 10.0},
    }


def test_upsamplers_have_a_rate_of_their_own():
    config = OptimizerConfig(head_learning_rate_multiple=2.0, upsampler_learning_rate_multiple=5.0)
    tree = {"head": {"upsample": {0: {"q": 0.0}}, "classify": 0.0}, "backbone": {"w": 0.0}}
    assert learning_rate_multiples(config, tree) == {
        "head": {"upsample": {0: {"q": 10.0}}, "classify": 2.0},
        "backbone": {"w": 1.0},
    }


def test_an_upsampler_stays_as_it_is():
    """At a rate of 0; it does not decay, either."""
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.1, upsampler_learning_rate_multiple=0.0
    )
    params = {"head": {"upsample": {"kernel": jnp.ones((2, 2))}, "classify": jnp.ones((2, 2))}}
    optimizer = create_optimizer(config, 10)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["head"]["upsample"]["kernel"], 0)
    assert (updates["head"]["classify"] < -0.01).all()


@pytest.mark.parametrize(
    "tree",
    [
        {  # ViT of three blocks
            "embed": 4,
            "positions": 4,
            "class_token": 4,
            "registers": 4,
            "blocks": {0: {"norm": 3}, 1: {"norm": 2}, 2: {"norm": 1}},
            "norm": 0,
            "head": 0,
        },
        {  # MiT of two stages, of two blocks and one
            "stages": {
                0: {"embed": 4, "embed_norm": 4, "blocks": {0: 3, 1: 2}, "norm": 2},
                1: {"embed": 1, "embed_norm": 1, "blocks": {0: 1}, "norm": 0},
            },
        },
        {  # ResNet of two stages, of two blocks and one
            "stem": {0: 4},
            "stages": {0: {0: {"layers": 3}, 1: {"layers": 2}}, 1: {0: {"shortcut": 1}}},
        },
    ],
)
def test_layers_decay_from_the_end(tree):
    """The tree holds the exponents: 1 for the last block, L + 1 for the embedding, as in BEiT."""
    config = OptimizerConfig(layer_decay=0.5)
    multiples = learning_rate_multiples(config, {"backbone": tree, "head": {"w": 0}})
    assert multiples["backbone"] == jax.tree.map(lambda n: 0.5**n, tree)
    assert multiples["head"] == {"w": 10.0}


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        (dict(name="vit", variant="tiny", width=12, depth=3, registers=2), 3),
        (dict(name="mit", widths=(4, 4, 4, 4), heads=(1, 1, 1, 1), depths=(1, 2, 1, 1)), 5),
        (dict(name="resnet", variant="18", widths=(4, 4, 4, 4), depths=(1, 2, 1, 1)), 5),
    ],
)
def test_layers_of_the_backbones_decay(options, depth):
    """Every exponent from L + 1 (embedding, stem) to 1 (last block) occurs in the real trees."""
    backbone = nnx.eval_shape(lambda: create_backbone(**options, rngs=nnx.Rngs(0)))
    params = {"backbone": nnx.as_pure(nnx.state(backbone, nnx.Param))}
    multiples = learning_rate_multiples(OptimizerConfig(layer_decay=0.5), params)["backbone"]
    found = {-np.log2(m) for m in jax.tree.leaves(multiples)}
    norm = {0} if options["name"] != "resnet" else set()  # behind the last block
    assert found == set(range(1, depth + 2)) | norm


def test_tokens_and_positions_of_a_vit_do_not_decay():
    """timm's no_weight_decay(): pos_embed, cls_token, reg_token; and all vectors."""
    options = dict(variant="tiny", width=12, depth=1, registers=4, layer_scale=True)
    backbone = create_backbone("vit", **options, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(backbone, nnx.Param))
    mask = decay_mask(params)
    for name in ("registers", "class_token", "positions", "class_position"):
        assert mask[name] is False
    flat = jax.tree_util.tree_flatten_with_path(mask)[0]
    assert {path[-1].key for path, decays in flat if decays} == {"kernel"}
    assert sum(decays for _, decays in flat) == 1 + 6  # the embedding, and the block's layers


def test_sgd_with_momentum_and_decay():
    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        final_learning_rate=0.1,
        warmup_steps=0,
        beta1=0.9,
        weight_decay=0.5,
        head_learning_rate_multiple=2.0,
    )
    optimizer = create_optimizer(config, 10)
    params = {"backbone": jnp.full((1, 1), 2.0), "head": jnp.full((1, 1), 2.0)}
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        first, state = optimizer.update(grads, state, params)
        second, state = optimizer.update(grads, state, params)
    # g = 1 + 0.5 p = 2; then the momentum holds 0.9 g + g.
    np.testing.assert_allclose(first["backbone"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(second["backbone"], -0.38, rtol=1e-6)
    np.testing.assert_allclose(first["head"], -0.4, rtol=1e-6)


def test_norms_and_biases_do_not_decay_whatever_their_shape():
    tree = {
        "pcdc": {"bias": jnp.ones((4, 8)), "kernel": jnp.ones((4, 8))},
        "norm1": jnp.ones((2, 2)),
    }
    assert decay_mask(tree) == {"pcdc": {"bias": False, "kernel": True}, "norm1": False}


def test_each_parameter_gets_its_own_rate_and_decay():
    """One step from zero moments moves a parameter by lr · multiple · (sign(g) + wd · p)."""
    config = OptimizerConfig(
        learning_rate=1e-2, head_learning_rate_multiple=10.0, weight_decay=0.1, warmup_steps=0
    )
    optimizer = create_optimizer(config, 1000)
    params = pure_params()
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, _ = optimizer.update(grads, optimizer.init(params), params)

    def expected(path, p):
        head = path[0].key == "head"
        decay = 0.1 if path[-1].key == "kernel" else 0.0
        return -1e-2 * (10 if head else 1) * (1 + decay * p)

    wanted = jax.tree_util.tree_map_with_path(expected, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, wanted)


def test_clipping_bounds_the_gradient_that_adam_sees():
    params = {"head": {"kernel": jnp.zeros((2, 2))}}
    optimizer = create_optimizer(OptimizerConfig(clip_norm=1.0, warmup_steps=0), 10)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 50.0), params)  # norm 100
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        _, state = optimizer.update(grads, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")["head"]["kernel"]
    np.testing.assert_allclose(first_moment, 0.1 * 0.5, rtol=1e-5)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    """Also when the parts have different numbers of labelled pixels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (8, 6, 6)).astype(np.uint8)
    labels[:3] = 255
    labels[4, :5] = 255
    batch = {"image": jnp.asarray(rng.normal(size=(8, 6, 6, 3)), jnp.float32)}
    batch["label"] = jnp.asarray(labels)
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    normalizer = pixel_weights(batch["label"]).sum()

    def loss_fn(params, rest, part):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss = cross_entropy(model(part["image"]), part["label"], normalizer=normalizer)
        return loss, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = jax.jit(grad_fn)(params, rest, batch)
    for parts in (2, 4, 8):
        part_loss, _, part_grads = jax.jit(
            lambda p, r, b, parts=parts: accumulate_gradients(grad_fn, p, r, b, parts=parts)
        )(params, rest, batch)
        np.testing.assert_allclose(part_loss, loss, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), part_grads, grads
        )


def test_accumulation_advances_the_dropout_stream_with_every_part():
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0), dropout=0.5), nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)

    def loss_fn(params, rest, part):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(part).mean(), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    _, rest, _ = accumulate_gradients(grad_fn, params, rest, jnp.ones((4, 4, 4, 3)), parts=2)
    assert nnx.to_pure_dict(rest)["dropout"]["rngs"]["count"] == 2


@pytest.mark.parametrize(("step", "rate"), [(0, 0.1), (90, 0.91), (10**6, 0.99)])
def test_ema(step, rate):
    ema = update_ema({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, jnp.int32(step), 0.99)
    np.testing.assert_allclose(ema["w"], rate, rtol=1e-6)
