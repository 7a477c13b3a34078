"""CIFAR-10 with ViT-Tiny (192 wide, 12 blocks, 5.4 M parameters), 32 px, patches of 4 px.

Command: maekit pretrain cifar10-vit-tiny --data cifar10 --out runs/c10-tiny
Cost: 400 epochs, an estimated 6 minutes on an H100 (20 hours for 100 epochs on 2 CPU cores).
Expected: no test accuracy yet; an online probe of held-out images gave 67.7 % after 380 epochs, where the cifar10
recipe ends at 60.9 %. Public runs of this size reach 59 % (linear probe, mask 0.7, 200 epochs).
Source: the cifar10 recipe, whose search it did not repeat, on the paper's ViT-Tiny; batch and rate are larger.
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="cifar10-vit-tiny",
    data="cifar10",
    model="vit_tiny_patch16_224",
    img_size=(32,),
    patch_size=4,
    decoder="cross",
    decoder_dim=128,
    decoder_depth=3,
    decoder_heads=4,
    predict_share=0.4,
    mask_ratio=0.85,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=400,
    warmup_epochs=20,
    batch_size=256,
    blr=3.2e-3,  # lr 1.5e-3: x batch / 256 x predicted share / mask ratio
    eval_every=4,
    probe_every=20,
    panel_every=40,
    save_every=20,
)
