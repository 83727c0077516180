"""The bytes of ``model.loss``: a walk through the final norm, the head and the loss of the P predicted tokens."""

from __future__ import annotations

from llamatune.memory.ledger import Ledger, Tensor
from llamatune.memory.sizes import Sizes
from llamatune.shapes.limits import LOGITS_AT_ONCE


class FrozenHead:
    """The loss by chunks of logits; the gradient of the head's input is made in the forward pass."""

    def __init__(self, z: Sizes) -> None:
        self.z, self.x, self.wide = z, z.P * z.D * z.s, z.P * z.D * 4

    def forward(self, ledger: Ledger) -> tuple[Tensor, Tensor]:
        z = self.z
        with ledger.step("norm"):
            x = ledger.make("x", self.x if z.s < 4 else 0)
            wide = ledger.make("x in fp32", self.wide)
            h = ledger.make("normed x", self.x)
            ledger.use("x squared and x / rms in fp32", 2 * self.wide)
        with ledger.step("logits, loss"):
            gradient = ledger.make("gradient of the normed x", self.x)
            cast = ledger.make("cast of the head's weights", z.V * z.D * z.c if z.casts else 0)
            rows = min(z.P, max(1, LOGITS_AT_ONCE[z.device] // z.V))
            logits = rows * z.V * (4 + z.c if z.c < 4 else 4)
            ledger.use("a chunk of logits", logits + rows * z.D * z.c * (2 if z.s != z.c else 1))
            ledger.free(x, h, cast)
        return wide, gradient

    def backward(self, ledger: Ledger, saved: tuple[Tensor, Tensor]) -> None:
        wide, gradient = saved
        with ledger.step("loss"):
            scaled = ledger.make("gradient of the normed x, scaled", self.x)
            ledger.free(gradient)
        with ledger.step("norm"):
            ledger.use("gradients of the norm in fp32", 5 * self.wide)
        ledger.free(wide, scaled)


class TrainedHead:
    """The loss of all logits at once."""

    def __init__(self, z: Sizes) -> None:
        self.z, self.x, self.wide, self.narrow = z, z.P * z.D * z.s, z.P * z.D * 4, z.P * z.D * z.c
        self.logits = z.P * z.V * 4

    def forward(self, ledger: Ledger) -> list[Tensor]:
        z = self.z
        with ledger.step("norm"):
            saved = [ledger.make("x in fp32 and x / rms", 2 * self.wide), ledger.make("normed x", self.narrow)]
            h = ledger.make("normed x before its cast", self.x if z.autocast else 0)
        with ledger.step("logits, loss"):
            saved.append(ledger.make("cast of the head's weights", z.V * z.D * z.c if z.autocast and z.casts else 0))
            saved.append(ledger.make("log-softmax of the logits", self.logits))
            ledger.use("logits", self.logits)
            ledger.free(h)
        return saved

    def backward(self, ledger: Ledger, saved: list[Tensor]) -> None:
        z = self.z
        with ledger.step("loss"):
            dlogits = ledger.make("gradient of the logits", self.logits)
            ledger.use("gradient of the log-softmax", self.logits)
        with ledger.step("logits"):
            cast = ledger.make("cast of the gradient of the logits", z.P * z.V * z.c if z.autocast else 0)
            dh = ledger.make("gradient of the normed x and its cast", self.narrow + self.x)
            ledger.free(dlogits)
            weight_bytes = (z.c if z.autocast else 0) + (4 if z.autocast or z.accumulates else 0)
            ledger.use("gradient of the head's weights", z.V * z.D * weight_bytes)
        ledger.free(cast, dh, *saved)
