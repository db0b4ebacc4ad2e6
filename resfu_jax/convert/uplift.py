"""mwalmer-umd/UPLiFT:UPLiFT."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._state import StateDict, unfilled
from resfu_jax.upsamplers.uplift import Block, Decoder, Group, LocalAttender, UPLiFT

_CONVS = {"SingleConv": 1, "DoubleConv": 2}


def uplift(
    state: Mapping[str, Any],
    *,
    in_channels: int,
    patch_size: int,
    cfg: Any,
    low_mem: bool = False,
    iters: int = 1,
    **ours: Any,
) -> UPLiFT:
    """The official UPLiFT.

    `cfg` is the section `uplift` of its configuration file, of mappings or of OmegaConf; with
    `iters` passes, which there are set after construction. `low_mem` changes nothing but memory.
    """
    cfg = _plain(cfg)
    _only(cfg, "cfg", up_factor=2, enc_share=True)
    encoder, decoder = cfg["encoder"], cfg["decoder"]
    for i in range(1, encoder["down_steps"] + 1):
        _only(encoder[f"down_{i}"], f"cfg.encoder.down_{i}", down_op="none")
    _only(decoder, "cfg.decoder", up_steps=1, ncat_s=1, enc_resample="nearest")
    up_1 = dict(up_op="tconv", factor=2, residual="bilinear")
    _only(decoder["up_1"], "cfg.decoder.up_1", **up_1)
    refiner = cfg.get("refiner")
    if refiner is not None:
        joined = dict(ncat_c=decoder["ncat_c"], ref_con=-1)
        _only(refiner, "cfg.refiner", ncat_s=1, enc_resample="nearest", **joined)
    groups = {
        "encoder": [encoder[f"block_{i}"] for i in range(encoder["down_steps"] + 1)],
        "decoder": [decoder["block_0"], decoder["block_1"]],
        "refiner": [refiner["block_0"]] if refiner else [],
    }
    every = [group for part in groups.values() for group in part]
    for group in every:
        norm = every[0].get("norm", "batch")
        _only({"norm": "batch"} | group, "each block of cfg", norm=norm)
        _only(
            {"residual": True, "stride": 1, "one_by": True} | group,
            "each block of cfg",
            residual=True,
            stride=1,
            one_by=True,
        )
    convs = {
        part: _alike([_one_of(group["block"]) for group in own], f"blocks of cfg.{part}")
        for part, own in groups.items()
    }
    if convs["refiner"] not in (None, 1):
        raise ValueError("cfg.refiner is read with SingleConv blocks only")
    widths = {
        part: tuple(tuple(group["hc"][: group["count"]]) for group in own)
        for part, own in groups.items()
    }
    up = unfilled(
        UPLiFT,
        in_channels,
        scale=2**iters,
        patch=patch_size,
        encoder=widths["encoder"],
        encoder_convs=convs["encoder"],
        decoder=widths["decoder"],
        decoder_convs=convs["decoder"],
        norm=every[0].get("norm", "batch"),
        attender=cfg.get("attender", -1),
        noise=decoder["ncat_c"],
        refiner=widths["refiner"][0] if refiner else (),
        **ours,
    )
    s = StateDict(without_counters(state), "UPLiFT")
    for i, group in enumerate(up.encoder):
        set_group(s, group, f"encoder.block_{i}")
    set_decoder(s, up.decoder, "decoder.")
    set_attender(s, up.attender, "attender.")
    if up.refiner is not None:
        set_group(s, up.refiner, "refiner")
        s.set_layer(up.refined, "ref_outc", layout="OI11")
    s.done()
    return up


def without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without how many batches each BatchNorm has seen, which changes nothing."""
    return {k: v for k, v in state.items() if not k.endswith(".num_batches_tracked")}


def set_decoder(s: StateDict, decoder: Decoder, prefix: str) -> None:
    """Its layers, from the official one's."""
    set_group(s, decoder.group_0, f"{prefix}block_0")
    s.set_layer(decoder.double, f"{prefix}up_1.up", layout="IOHW")
    set_group(s, decoder.group_1, f"{prefix}block_1")


def set_attender(s: StateDict, attender: LocalAttender, prefix: str) -> None:
    """Its layer, from the official one's."""
    s.set_layer(attender, f"{prefix}conv1", layout="OI11")


def set_group(s: StateDict, group: Group, prefix: str) -> None:
    """The layers of its blocks, from the official ones'."""
    for i, block in enumerate(group.blocks):
        _set_block(s, block, f"{prefix}.blocks.{i}.conv")


def _set_block(s: StateDict, block: Block, prefix: str) -> None:
    """Of the official numbers, each third one is a ReLU."""
    for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
        s.set_layer(conv, f"{prefix}.{3 * i}", layout="OIHW")
        s.set_layer(norm, f"{prefix}.{3 * i + 1}")
        if hasattr(norm, "mean"):
            s.set(norm.mean, f"{prefix}.{3 * i + 1}.running_mean")
            s.set(norm.var, f"{prefix}.{3 * i + 1}.running_var")
    s.set_layer(block.last, f"{prefix}.{3 * len(block.convs)}", layout="OI11")


def _plain(cfg: Any) -> Any:
    """Mappings, OmegaConf's included, and lists as dictionaries and lists."""
    if isinstance(cfg, Mapping) or hasattr(cfg, "items"):
        return {str(key): _plain(value) for key, value in cfg.items()}
    return cfg


def _only(cfg: Mapping[str, Any], where: str, **values: Any) -> None:
    """Refuses what our module does not have."""
    for name, only in values.items():
        if cfg.get(name) != only:
            raise ValueError(f"{where} is read with {name}={only!r} only, got {cfg.get(name)!r}")


def _one_of(block: str) -> int:
    if block not in _CONVS:
        raise ValueError(f"blocks of cfg must be one of {', '.join(_CONVS)}, got {block!r}")
    return _CONVS[block]


def _alike(values: list[int], where: str) -> int | None:
    """The one value of all, None of none."""
    if len(set(values)) > 1:
        raise ValueError(f"{where} must be of one kind")
    return values[0] if values else None
