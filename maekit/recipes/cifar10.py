"""CIFAR-10 with an encoder of 1.8 M parameters (192 wide, 4 blocks), 32 px, patches of 4 px.

Command: maekit pretrain cifar10 --data cifar10 --out runs/c10
Cost: 100 epochs, about 5 hours on 2 CPU cores without matrix units.
Expected: linear probe after 4 epochs 50.7 % (RESULTS.md, one seed, a JPEG copy); 100 epochs are not measured yet.
Source: the paper's recipe (table 8) with a smaller model, batch 256 and blr 5e-4, which public CIFAR runs of this size
use (reference: github.com/wsjdsg/Bootstrapped-MAE).
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="cifar10",
    data="cifar10",
    model="vit_tiny_patch16_224",
    img_size=(32,),
    patch_size=4,
    depth=4,
    decoder_dim=128,
    decoder_depth=2,
    decoder_heads=4,
    mask_ratio=0.75,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=100,
    warmup_epochs=5,
    batch_size=256,
    blr=5e-4,
)
