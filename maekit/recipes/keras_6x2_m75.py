"""The Keras tutorial's experiment as its text has it: 6 encoder and 2 decoder blocks, 75 % masked, CIFAR-10 at 48 px.

Command: maekit pretrain keras-6x2-m75 --data cifar10 --out runs/keras-6x2-m75
Cost: 100 epochs, an estimated 10 hours on one CPU core without matrix units: 0.46 GFLOP an image and step, and
AdamW over 30 M parameters in every step; 9 minutes on an H100 beside four other runs.
Expected: linear probe of the tutorial 43.5 %, linear probe 51.1 %, k-NN 44.1 % (RESULTS.md, 1 seed, JPEG q75);
published: 48.16 % in its TensorFlow repository, 44.66 % in its Keras 3 version.
Source: keras.io, "Masked image modeling with Autoencoders", and the table in its repository at github.com/ariG23498,
facts alone, no code. Its probe: maekit probe RUN --data cifar10 --protocol keras.
Deviations: what the text leaves open, and where this differs from it.
- Images: the tutorial trains on the first 40,000 rows of CIFAR-10's training split. The order of rows differs between
copies of the data (in Parquet copies it is often a shuffle), so these are the 40,000 of the lowest hash among those
that are not held out.
- Length: an epoch here is 156 whole batches; the tutorial's has a 157th of 64 images, and its schedule ends after
15,625 steps instead of 15,600. Warm-up (15 %) and cosine are the same.
- Shuffling: a new order of all images in every epoch; the tutorial draws from a buffer of 1,024 of a fixed order.
- Crops: Keras's RandomCrop cuts all images of a batch at one place; here every image has its own, also in the probe.
- Between its two versions: weight decay is that of the text (Keras 3, which gave 44.66 %), the mask token is trained,
as the text says and as the repository did (48.16 %), while in Keras 3 the layer does not track it and it keeps its
first values. So neither number is repeated exactly.
- Weight decay: the learning rate multiplies it, as in Keras 3; here it leaves out biases, normalisations, positions and
mask token, which is beyond measuring, as it takes 0.4 % of a weight in the whole run. The repository used TensorFlow
Addons, where the rate does not multiply it and all weights decay, by four fifths in the whole run; --weight-decay 0.04
takes as much from matrices, but most of it early.
- AdamW's epsilon: 1e-7 as in Keras, which adds it before the correction of the second moment and not after it, as here:
larger there in the first thousand steps. It counts: the first gradients of queries and keys are below it.
- Precision: Keras's is float32; on hardware with bfloat16 give --precision fp32.
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
    adam_eps=1e-7,
    first_values="keras",
)
