"""Draw what the encoder looks at: attention maps of every head, and the patch features as colours.

    maekit attend runs/c10 --image photo.jpg --out maps.png

A map is how the class token weighs the patches in one block (without a class token: how all patches do, on average).
The colours are the first three principal components of the patch features: patches of one colour are alike to the
model. Cost: one forward pass for each image.

Shapes: B batch, K heads, S tokens, N patches, T prefix tokens (class, then registers), D width, d width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from maekit.config import AttendConfig, UserError
from maekit.data.centres import read_centres
from maekit.data.levels import remarks_for
from maekit.data.parts import loose_files
from maekit.keeping import keeping
from maekit.models.mae import MaskedAutoencoder
from maekit.runtime import choose_device
from maekit.terminal import make_console, remark
from maekit.viz.attention import AttentionRow, draw_attention, pca_colors
from maekit.weights.store import load_as


def main(source: str, config: AttendConfig) -> int:
    """One sheet with a row for each image.

    Raises:
        UserError: flags, weights or images that cannot be used.
    """
    console = make_console()
    if Path(config.out).suffix.lower() != ".png":
        raise UserError(f"--out {config.out}: a picture is a PNG file; name one that ends in .png")
    device = choose_device(config.device).value
    model = load_as(source, config, device)
    remark(console, model.key_report.remarks())
    depth = len(model.encoder.blocks)
    block = depth if config.block is None else config.block
    if not 1 <= block <= depth:
        raise UserError(f"--block {block}: this encoder has blocks 1 to {depth}")

    passport = model.passport
    remark(console, remarks_for(loose_files(config.image, model.config.in_chans), passport.mean, passport.std))
    images_BCHW = read_centres(config.image, model.config, passport.interpolation, passport.crop_pct).to(device)
    weights_BKSS, tokens_BSD = attention(model, images_BCHW, block)
    prefix, has_class = model.num_prefix, bool(model.encoder.has_class_token)
    maps_BKN = weights_BKSS[:, :, 0, prefix:] if has_class else weights_BKSS[:, :, prefix:, prefix:].mean(dim=2)
    maps = maps_BKN.unflatten(2, model.grid_hw).cpu().numpy()
    colors = pca_colors(tokens_BSD[:, prefix:].cpu().numpy(), model.grid_hw)
    shown = images_BCHW.permute(0, 2, 3, 1).cpu().numpy()
    who = "the class token" if has_class else "all patches (their mean: this encoder has no class token)"
    note = (
        f"head: attention of {who} to the patches in block {block} of {depth}; dark is 0, bright its own maximum, "
        "and what is missing to 100 % goes to class and register tokens\nfeatures: the first three principal "
        "components (red, green, blue) of the patch features, over all images shown; like colours mean alike"
    )
    try:
        with keeping(Path(config.out), console):
            draw_attention(
                [AttentionRow(*row) for row in zip(shown, colors, maps, strict=True)],
                Path(config.out),
                title=f"{source}: {model.passport.epochs:.4g} epochs on {model.passport.data or 'no data'}",
                note=note,
                row_labels=[Path(name).name for name in config.image],
            )
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror or error})") from None
    console.print(f"maps: {escape(config.out)} (attention of {who}, block {block} of {depth})", soft_wrap=True)
    return 0


@torch.no_grad()
def attention(model: MaskedAutoencoder, images_BCHW: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention weights [B, K, S, S] (query, key) of a block counted from 1, and the encoder's output [B, S, D].

    Fused kernels never hold the weights, so they are computed again from the block's own input; pixels in 0..1 come in.
    """
    layer: Any = model.encoder.blocks[block - 1].attn
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        tokens_BSD = model.encode(model.normalize(images_BCHW), pool="tokens")
    finally:
        handle.remove()
    (normed_BSD,) = inputs
    heads = layer.num_heads
    query_BKSd, key_BKSd, _ = layer.qkv(normed_BSD).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query_BKSd, key_BKSd = layer.q_norm(query_BKSd), layer.k_norm(key_BKSd)
    logits_BKSS = (query_BKSd * layer.scale) @ key_BKSd.transpose(2, 3)
    return logits_BKSS.softmax(dim=3), tokens_BSD
