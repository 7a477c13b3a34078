"""The Keras tutorial's experiment as its text has it: 6 encoder and 2 decoder blocks, 75 % masked, CIFAR-10 at 48 px.

Command: maekit pretrain keras-6x2-m75 --data cifar10 --out runs/keras-6x2-m75
Cost: 100 epochs, an estimated 10 hours on one CPU core without matrix units: 0.46 GFLOP an image and step, and
AdamW over 30 M parameters in every step.
Expected: published: 48.16 % by its own linear probe in its TensorFlow repository, 44.66 % in its Keras 3 version; not
run here yet.
Source: keras.io, "Masked image modeling with Autoencoders", and the table in its repository at github.com/ariG23498,
facts alone, no code. Its probe: maekit probe RUN --data cifar10 --protocol keras.
Deviations: what the text leaves open, and where this differs from it.
- Images: the tutorial trains on the first 40,000 rows of CIFAR-10's training split. The order of rows differs between
copies of the data (in Parquet copies it is often a shuffle), so these are the 40,000 of the lowest hash among those
that are not held out.
- Length: an epoch here is 156 whole batches; the tutorial's has a 157th of 64 images, and its schedule ends after
15,625 steps instead of 15,600. Warm-up (15 %) and cosine are the same.
- Crops: Keras's RandomCrop cuts all images of a batch at one place; here every image has its own.
- Mask token: trained, as the text says and the repository did; in Keras 3 the layer does not track it, so it keeps its
first values. The repository's numbers are the ones to compare with.
- Weight decay: AdamW's of Keras 3, which the learning rate multiplies, as here; here it leaves out biases,
normalisations, positions and mask token, which is beyond measuring, as it takes 0.4 % of a weight in the whole run. The
repository used TensorFlow Addons, where the rate does not multiply it: about --weight-decay 0.04.
- AdamW's epsilon: 1e-8 here, 1e-7 in Keras.
- First values: Keras draws projections of attention by the fans of a three-dimensional kernel, within 0.019 for
queries, keys and values and 0.077 for the output; here Xavier's for the whole matrices, 0.060 and 0.097. Positions:
normal of deviation 0.02 here, uniform within 0.05 there. The other layers are alike.
- Dropout of 0.1 is built in there but off in pretraining, since its training step does not call the layers in training
mode; so it is not here.
"""

from maekit.config import PretrainConfig

CONFIG = PretrainConfig(
    recipe="keras-6x2-m75",
    data="cifar10",
    train_images=40_000,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    model="vit_tiny_patch16_224",
    img_size=(48,),
    patch_size=6,
    embed_dim=128,
    depth=6,
    num_heads=4,
    head_dim=128,
    mlp_ratio=2.0,
    mlp_act="both",
    class_token=False,
    pos_embed="learned",
    decoder="flat",
    decoder_dim=64,
    decoder_depth=2,
    decoder_heads=4,
    mask_ratio=0.75,
    target="pixels",
    crop="resize-crop",
    resize_to=52,
    interpolation="bilinear",
    epochs=100,
    warmup_epochs=15,
    batch_size=256,
    lr=5e-3,
    weight_decay=1e-4,
    betas=(0.9, 0.999),
)
