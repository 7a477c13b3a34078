"""The Keras tutorial's experiment, 9 encoder and 3 decoder blocks, 75 % masked, weight decay 1e-5.

Command: maekit pretrain keras-9x3-m75 --data cifar10 --out runs/keras-9x3-m75
Cost: 100 epochs, about a third more than keras-6x2-m75.
Expected: published: 49.33 % by its own linear probe in its TensorFlow repository; not run here yet.
Source: the table of github.com/ariG23498's repository of the tutorial; all else as in keras-6x2-m75.
Deviations: those of keras-6x2-m75. With the repository's optimiser the decay would be about --weight-decay 0.004.
"""

from dataclasses import replace

from maekit.recipes.keras_6x2_m75 import CONFIG as TUTORIAL

CONFIG = replace(TUTORIAL, recipe="keras-9x3-m75", depth=9, decoder_depth=3, weight_decay=1e-5)
