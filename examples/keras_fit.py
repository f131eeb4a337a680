"""AGC in Keras' fit: an optimizer in an optimizer, and a callback that logs what was clipped."""

import keras
import numpy as np

import agc_tensorflow
from agc import AGC

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((8,)),
        keras.layers.Dense(64, activation="relu", name="body"),
        keras.layers.Dense(3, name="head"),
    ]
)
sgd = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)  # the norm comes after AGC
optimizer = agc_tensorflow.AdaptiveGradClip(
    sgd, AGC(clipping=0.08, exclude=["head.*"]), model=model
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss)

x = np.random.default_rng(0).standard_normal((256, 8), np.float32)
y = x[:, :3].argmax(1)
history = model.fit(
    x, y, batch_size=64, epochs=4, verbose=2, callbacks=[agc_tensorflow.AGCLogger()]
).history
assert history["loss"][-1] < history["loss"][0]
assert "agc/clipped_fraction" in history

model.save("model.keras")  # with the rule and the plan
print(keras.models.load_model("model.keras").optimizer)
