"""32-px crops of photographs that Python packages bundle: real images, no download. The demo.

Command: maekit pretrain photos --out runs/photos
Cost: about a minute on 2 CPU cores.
Expected: see RESULTS.md (make demo prints its own table).
Source: the paper's recipe (table 8) with a small model; length chosen to fit the demo's two minutes.
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="photos",
    data="photos",
    model="vit_tiny_patch16_224",
    img_size=(32,),
    patch_size=4,
    embed_dim=128,
    depth=4,
    num_heads=4,
    decoder_dim=64,
    decoder_depth=1,
    decoder_heads=4,
    mask_ratio=0.75,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=5,
    warmup_epochs=0.5,
    batch_size=64,
    blr=4e-3,
    probe_every=0,
    panel_every=5,
)
