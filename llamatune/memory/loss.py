"""The bytes of ``model.loss``: a walk through the final norm, the head and the loss of the P predicted tokens."""

from __future__ import annotations

from llamatune.memory.ledger import Ledger, Passes
from llamatune.memory.sizes import Sizes
from llamatune.shapes.recurring_sizes import logit_rows
from llamatune.shapes.tile_sizes import wide_logit_rows


def frozen_head(ledger: Ledger, z: Sizes) -> Passes:
    """The loss by chunks of logits; the gradient of the head's input is made in the forward pass."""
    x_bytes, wide_bytes = z.P * z.D * z.s, z.P * z.D * 4
    with ledger.step("norm"):
        x = ledger.make("x", x_bytes if z.s < 4 else 0)
        wide = ledger.make("x in fp32", wide_bytes)
        h = ledger.make("normed x", x_bytes)
        ledger.use("x squared and x / rms in fp32", 2 * wide_bytes)
        over_rms = ledger.make("x / rms in fp32", wide_bytes if z.trains_norm else 0)
    with ledger.step("logits, loss"):
        gradient = ledger.make("gradient of the normed x", x_bytes)
        cast = ledger.make("cast of the head's weights", z.V * z.D * z.c if z.casts else 0)
        rows = min(z.P, logit_rows(z.V, z.device, z.c))
        wide_rows = min(rows, wide_logit_rows(z.V, z.device)) if z.c < 4 and not z.kernels else 0
        hidden_bytes = rows * z.D * z.c * (2 if z.s != z.c else 1)
        ledger.use("a chunk of logits", rows * z.V * z.c + max(wide_rows * z.V * 4, hidden_bytes))
        ledger.free(x, h, cast)

    yield

    with ledger.step("loss"):
        scaled = ledger.make("gradient of the normed x, scaled", x_bytes)
        ledger.free(gradient)
    with ledger.step("norm"):
        ledger.use("gradients of the norm in fp32", 5 * wide_bytes)
    ledger.free(wide, over_rms, scaled)


def trained_head(ledger: Ledger, z: Sizes) -> Passes:
    """The loss of all logits at once."""
    x_bytes, narrow_bytes, logits_bytes = z.P * z.D * z.s, z.P * z.D * z.c, z.P * z.V * 4
    with ledger.step("norm"):
        wide = ledger.make("x in fp32 and x / rms", (2 if z.trains_norm else 1) * z.P * z.D * 4)
        h = ledger.make("normed x", narrow_bytes)
        uncast = ledger.make("normed x before its cast", x_bytes if z.s != z.c else 0)
    with ledger.step("logits, loss"):
        weights = ledger.make("cast of the head's weights", z.V * z.D * z.c if z.autocast else 0)
        log_softmax = ledger.make("log-softmax of the logits", logits_bytes)
        ledger.use("logits", logits_bytes)
        ledger.free(uncast)

    yield

    with ledger.step("loss"):
        dlogits = ledger.make("gradient of the logits", logits_bytes)
        ledger.use("gradient of the log-softmax", logits_bytes)
    with ledger.step("logits"):
        cast = ledger.make("cast of the gradient of the logits", z.P * z.V * z.c if z.autocast else 0)
        dh = ledger.make("gradient of the normed x and its cast", narrow_bytes + x_bytes)
        ledger.free(dlogits)
        weight_bytes = (z.c if z.autocast else 0) + (4 if z.autocast or z.accumulates else 0)
        ledger.use("gradient of the head's weights", z.V * z.D * weight_bytes)
    ledger.free(cast, dh, wide, h, weights, log_softmax)
