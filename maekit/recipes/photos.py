"""32-px crops of photographs that Python packages bundle: real images, no download. The demo.

Command: maekit pretrain photos --out runs/photos
Cost: about a minute on 2 CPU cores.
Expected: linear probe 87 +- 4 % on the test crops, random weights 82 %, raw pixels 42 % (RESULTS.md, 3 seeds).
Source: the paper's recipe (table 8); a small model with a light decoder, small batches and a high blr, so that a minute
holds 658 updates (searched at equal time on held-out crops, LOG.md).
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="photos",
    data="photos",
    model="vit_tiny_patch16_224",
    img_size=(32,),
    patch_size=4,
    embed_dim=96,
    depth=4,
    num_heads=3,
    decoder_dim=64,
    decoder_depth=1,
    decoder_heads=4,
    mask_ratio=0.75,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=7,
    warmup_epochs=0.7,
    batch_size=64,
    blr=4e-3,
    probe_every=0,
    panel_every=5,
)
