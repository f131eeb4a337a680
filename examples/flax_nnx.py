"""AGC and SAM with Flax NNX and optax, in one compiled step."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import agc_jax
from agc import AGC, SAM


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 64, rngs=rngs)
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


model = Classifier(nnx.Rngs(0))
tx = optax.chain(
    agc_jax.adaptive_grad_clip(AGC(clipping=0.08, exclude=["head.*"]), units=agc_jax.units(model)),
    optax.sgd(0.1, momentum=0.9),
)
graph, params = nnx.split(model)
state = tx.init(params)


def loss_of(params, x, y):
    logits = nnx.merge(graph, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def step(params, state, x, y):
    loss, gradients = agc_jax.sam_value_and_grad(loss_of, SAM(rho=0.05))(params, x, y)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.argmax(x[:, :3], 1)
losses = []
for _ in range(20):
    params, state, loss = step(params, state, x, y)
    losses.append(float(loss))
clipped = agc_jax.stats(state).to_dict()["agc/clipped_fraction"]
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, clipped {clipped:.1%}")
assert losses[-1] < losses[0]
