"""How far the log-probabilities of two stages may lie apart, by what lies between them.

Each number is a few times what was measured, so that another model or processor does not raise a false alarm, and far below what training
changes (mean 3.9 at the 135M model of the smart home, 5.6 at a trained toy); `mean` and `kl` are what a fault moves, `max` only catches
what happens at single tokens. Measured, as mean, max and KL:

- merged, 135M: 0.0007, 0.08, 0.00001; trained toy: 0.005, 0.09, 0.00009
- INT8 by OpenVINO, 135M: 0.006, 0.31, 0.0008; trained toy: 0.026, 0.36, 0.0023; a toy of large random weights: 0.061, 0.43, 0.0018
- INT4 by OpenVINO, 135M: 0.045, 4.6, 0.03; by AWQ: 0.028, 1.5, 0.014
- INT8 by bitsandbytes, 135M: 0.010, 0.50, 0.0027; NF4: 0.050, 4.8, 0.031
- bf16 by OpenVINO, 135M: 0.0007, 0.08, 0.00001
- live, 135M, mean and max: INT8 0.003, 0.25; INT4 0.003, 0.17; AWQ 0.002, 0.20; bf16 0.0007, 0.03

What a fault of the merged weights moves in the 135M model: 0.9 of the adapter's update 0.008, 0.45, 0.0015; 0.8 of it 0.017, 0.78, 0.006;
half of it 0.087, 4.5, 0.066; twice as much 0.31, 15.6, 0.30; one of three layers skipped 0.006 to 0.010, 0.25 to 0.65, 0.0013 to 0.0023.
So the merge is held to within a fifth of the update here, and exactly by the weights themselves (`training/audit.py`); INT8 to about half
of it, and INT4 only to what the base says: there the digests of its parents and the merged model's own checks decide.
"""

from __future__ import annotations

from infra.config import Config


class Bounds(Config):
    """Most that may differ, in nats, over the tokens of the answers that both stages are forced through."""

    mean: float
    """Mean absolute difference of the log-probabilities of the answers' own tokens."""
    max: float
    """Largest of them."""
    kl: float
    """Mean KL divergence of the reference's distribution from the stage's."""
    reason: str
    """What makes up the difference."""

    def times(self, factor: float) -> Bounds:
        """The same, wider or narrower."""
        return self.model_copy(update={name: getattr(self, name) * factor for name in ("mean", "max", "kl")})


BOUNDS = {
    "f32": Bounds(mean=1e-3, max=2e-2, kl=1e-4, reason="the same weights, computed in another order"),
    "merge": Bounds(mean=3e-2, max=0.5, kl=2e-3, reason="merged weights are rounded to the 16 bits of the base"),
    "bf16": Bounds(mean=5e-2, max=1.5, kl=2e-2, reason="weights and products of 16 bits"),
    "int8": Bounds(mean=1e-1, max=2.5, kl=5e-2, reason="weights of 8 bits"),
    "int4": Bounds(mean=1.5, max=20.0, kl=1.5, reason="weights of 4 bits; what they cost is the scores' to say"),
    "live": Bounds(
        mean=1e-1, max=2.5, kl=1e-2, reason="the server's cache holds keys and values of 8 bits, and its kernels add in another order"
    ),
}
EFFECT = 5.0
"""So many times the difference that computing in another order makes must training have changed the model."""


def precision_of(weight_format: str) -> str:
    """The row of `BOUNDS` for a served weight format."""
    for mark, precision in (("int4", "int4"), ("nf4", "int4"), ("int8", "int8"), ("bf16", "bf16")):
        if mark in weight_format:
            return precision
    return "f32"
