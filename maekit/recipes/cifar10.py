"""CIFAR-10 with an encoder of 1.8 M parameters (192 wide, 4 blocks), 32 px, patches of 4 px.

Command: maekit pretrain cifar10 --data cifar10 --out runs/c10
Cost: 100 epochs, about 4 hours on 2 CPU cores without matrix units (330 to 430 images/s), 2 minutes on an H100.
Expected: linear probe 67.9 %, fine-tuned 87.3 %, k-NN 56.8 %, random weights 51.9 %, raw pixels 41.4 % (RESULTS.md, 1
seed, JPEG q75).
Source: chosen on held-out training images (docs/ablation.md) around public CIFAR runs of this size, which hide 0.3 to
0.9 (reference: github.com/wsjdsg/Bootstrapped-MAE); the decoder is CrossMAE's (arXiv 2401.14391), with 0.4 predicted.
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="cifar10",
    data="cifar10",
    model="vit_tiny_patch16_224",
    img_size=(32,),
    patch_size=4,
    depth=4,
    decoder="cross",
    decoder_dim=128,
    decoder_depth=3,
    decoder_heads=4,
    predict_share=0.4,
    mask_ratio=0.85,
    target="norm-pixels",
    crop_scale=(0.2, 1.0),
    epochs=100,
    warmup_epochs=5,
    batch_size=128,
    blr=4.25e-3,  # lr 1e-3: x batch / 256 x predicted share / mask ratio
    probe_every=10,
    panel_every=10,
    save_every=10,  # an epoch takes a second on a GPU; on a CPU, --save-minutes saves more often
)
