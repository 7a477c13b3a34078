"""Any folder of images, labels or not: ViT-Small at 224 px with a light decoder.

Command: maekit pretrain folder --data ~/images --out runs/mine
Cost: 100 epochs; one image costs about 11 GFLOP, so 10,000 images take about half an hour on a GPU that sustains
5 TFLOP/s. Lower --img-size or --model for a CPU.
Expected: depends on the images: watch the held-out skill rise and level off.
Source: the paper's recipe (table 8); ViT-S and a decoder of 256 x 4 for one GPU; batch 64, and from 2,047 images down
32, 16 or 8 with a rate of 5e-4 (measured on 232 photographs, LOG.md), unless --batch-size says another.
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="folder",
    model="vit_small_patch16_224",
    img_size=(224,),
    decoder_dim=256,
    decoder_depth=4,
    decoder_heads=8,
    mask_ratio=0.75,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=100,
    warmup_epochs=10,
    batch_size=64,
    follow_images=("batch_size", "lr"),
    blr=5e-4,
    panel_every=5,
)
