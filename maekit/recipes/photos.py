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
    decoder_depth=2,
    decoder_heads=4,
    mask_ratio=0.75,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=10,
    warmup_epochs=1,
    batch_size=128,
    blr=2e-3,
    probe_every=0,
    panel_every=5,
)
