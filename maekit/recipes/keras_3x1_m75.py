"""The Keras tutorial's experiment, 3 encoder blocks and 1 decoder block, 75 % masked.

Command: maekit pretrain keras-3x1-m75 --data cifar10 --out runs/keras-3x1-m75
Cost: 100 epochs, about three quarters of keras-6x2-m75.
Expected: published: 46.84 % by its own linear probe in its TensorFlow repository; not run here yet.
Source: the table of github.com/ariG23498's repository of the tutorial; all else as in keras-6x2-m75.
Deviations: those of keras-6x2-m75.
"""

from dataclasses import replace

from maekit.recipes.keras_6x2_m75 import CONFIG as TUTORIAL

CONFIG = replace(TUTORIAL, recipe="keras-3x1-m75", depth=3, decoder_depth=1)
