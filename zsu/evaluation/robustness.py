"""Does forgetting hold when inputs or weights change a little, and what happens beside the class?

Arguments and results as in `utility`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inside import copied, logits_of, model_errors, place
from .observed import Given, Observed
from .privacy import NAN
from .representation import accuracy_on
from .utility import jensen_shannon

NOISE = 0.2  # standard deviations of the images
CROP = 7 / 8  # of each side
BRIGHTNESS = (0.7, 1.3)
EPSILON = 0.1  # greatest change of a pixel, in the range of the images
WALK = 10  # steps


def robustness(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Does the class come back on changed images, or when the weights are stored in fewer bits?

    Formula: At on test images of the class with Gaussian noise (.2 of their standard deviation), their middle 7/8
    resized, brightness x .7 and x 1.3 (the greater At); and with weights, but not biases, rounded to 8 bits (symmetric,
    per tensor), or all parameters to float16.
    Source: quantisation: Zhang et al. 2024 (arXiv:2410.16454); the rest is common.
    Ideal: as a retrained model.
    Blind spot: a few fixed changes, no search for the worst one. Only images (C, H, W) can be cropped.
    """
    x, y = given.x, given.y
    generator = torch.Generator().manual_seed(given.seed)
    noise = NOISE * x.std() * torch.randn(x.shape, generator=generator)
    return {
        "at_noise": accuracy_on(m.model, x + noise, y),
        "at_crop": accuracy_on(m.model, crop(x), y) if x.dim() == 4 else NAN,
        "at_brightness": max(accuracy_on(m.model, b * x, y) for b in BRIGHTNESS),
        "at_int8": accuracy_on(with_weights(m.model, to_int8), x, y),
        "at_float16": accuracy_on(with_weights(m.model, lambda w: w.half().to(w.dtype)), x, y),
    }


def crop(x: Tensor) -> Tensor:
    """The middle 7/8 of images (N, C, H, W), resized."""
    side = [round(CROP * s) for s in x.shape[2:]]
    top, left = ((s - c) // 2 for s, c in zip(x.shape[2:], side, strict=True))
    middle = x[..., top : top + side[0], left : left + side[1]]
    return F.interpolate(middle, x.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def with_weights(model: nn.Module, to: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model with every parameter put through a function."""
    model = copied(model)
    for p in model.parameters():
        p.copy_(to(p))
    return model


def to_int8(w: Tensor) -> Tensor:
    """A matrix or kernel rounded to 255 levels, symmetric about 0; biases as they are."""
    scale = w.abs().max() / 127
    return (w / scale).round() * scale if w.dim() > 1 and scale > 0 else w


def over_unlearning(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """OU@eps: how much changes just beside the class?

    Formula: test images of the class walk up the loss of the original (10 signed gradient steps, no pixel farther than
    eps = .1 of the images' range) until it predicts another class; mean JS there between the original's outputs
    without the class, renormalised, and the model's.
    Source: Ha et al. 2026 (arXiv:2506.01318), with a walk of our own.
    Ideal: 0 is no change at all; read it beside the retrained models' value.
    Blind spot: a mask is what the formula compares with, and scores 0.
    """
    if len(given.beside) == 0:
        return {"ou": NAN}
    with torch.no_grad():
        before, after = (logits_of(o.model, given.beside, "audit").double().cpu() for o in (given.original, m))
    before = before.index_fill(1, torch.tensor(given.target), -torch.inf)
    return {"ou": jensen_shannon(before.softmax(1), after.softmax(1))}


def images_beside(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images (M, C, H, W) within eps of x (N, C, H, W) that the model no longer calls y, just after they crossed."""
    x = place(x, model)
    y = y.to(x.device)
    low, high = x.min(), x.max()
    limit = EPSILON * (high - low)
    walked, crossed = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in range(WALK + 1):
        moving = walked.detach().requires_grad_()
        logits = logits_of(model, moving, "audit")
        crossed |= logits.argmax(1) != y
        if step == WALK or crossed.all():
            break
        with model_errors(model, x, "audit"):
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), moving)
        forward = walked + (2 * limit / WALK) * gradient.sign()
        forward = torch.minimum(torch.maximum(forward, x - limit), x + limit).clamp(low, high)
        walked = torch.where(crossed.view(-1, *[1] * (x.dim() - 1)), walked, forward)  # (N,) -> (N, 1, 1, 1)
    return walked[crossed].detach().cpu()
