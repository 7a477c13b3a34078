"""The Keras tutorial's experiment, 3 encoder blocks and 1 decoder block, 60 % masked.

Command: maekit pretrain keras-3x1-m60 --data cifar10 --out runs/keras-3x1-m60
Cost: 100 epochs, about five sixths of keras-6x2-m75.
Expected: published: 44.25 % by its own linear probe in its TensorFlow repository; not run here yet.
Source: the table of github.com/ariG23498's repository of the tutorial; all else as in keras-6x2-m75.
Deviations: those of keras-6x2-m75. The tutorial hides int(0.6 x 64) = 38 patches and maekit keeps int(0.4 x 64) = 25,
so the ratio is given as 38 / 64.
"""

from dataclasses import replace

from maekit.recipes.keras_6x2_m75 import CONFIG as TUTORIAL

CONFIG = replace(TUTORIAL, recipe="keras-3x1-m60", depth=3, decoder_depth=1, mask_ratio=38 / 64)
