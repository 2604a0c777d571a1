"""Methods that others would pick, each in its smallest honest form, from the paper's formulas.

They are methods as in :mod:`zsu.forgetting.methods`. The model stays in eval mode, so dropout is off and the running
statistics of BatchNorm are frozen (its weight and bias are trained like all others). What `retained` they take, and all
images of the class in `x`, goes by their tier.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from .. import data
from ..errors import ZsuError, check_count, is_number
from ..inside import model_errors, watch_inputs
from ..relevance.sums import at_least_float32
from .methods import Edit, Method, no_rows

BATCH_SIZE = 80

# --- fine-tuning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peer(Method):
    """A method of another paper, whose options are numbers."""

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type is int:
                check_count(option.name, value, self.name)
            several = [value] if option.type in (int, float) else value
            sound = isinstance(several, (tuple, list)) and all(is_number(v) and v >= 0 for v in several)
            if not sound or not several:
                remedy = "use finite numbers of at least 0"
                raise ZsuError(f"{option.name} is {value!r}", where=self.name, remedy=remedy)
            if option.type is float:  # of whatever size and kind the number was
                object.__setattr__(self, option.name, float(value))


@dataclass(frozen=True, kw_only=True)
class FineTune(Peer):
    """Go on training without the class and hope that it fades.

    Minimises CE(retained), the mean cross-entropy, with Adam; `x` is not used. Nothing but a great learning rate
    makes it fade: the default is that of `zsu.training.train`. With a tenth of it some classes stay.

    Source: the "finetune" baseline of Golatkar, Achille and Soatto (CVPR 2020, arXiv 1911.04933). Tier: T4.
    Cost: `epochs` passes, forward and backward, over all retained images.
    """

    name = "fine-tune"
    tier = "T4"
    epochs: int = 2
    lr: float = 1e-2
    batch_size: int = BATCH_SIZE

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Descend on the retained images."""
        generator = torch.Generator().manual_seed(seed)
        steps = (pair for _ in range(self.epochs) for pair in shuffle(retained, self.batch_size, generator, x))
        return descend(model, steps, F.cross_entropy, self.lr)


@dataclass(frozen=True, kw_only=True)
class NegativeGradient(Peer):
    """Descend on the retained images and at the same time ascend on those of the class ("NegGrad+").

    Minimises CE(retained) - alpha mean_i min(CE(x_i, target), 2 log(classes)) with Adam; each step takes a batch of
    either kind. The paper has no bound, and weights beta and 1 - beta. Without a bound the ascent never ends; with
    it an image is left alone once its probability of the class is below 1 / classes^2.

    Source: Kurmanji et al. (NeurIPS 2023, arXiv 2302.09880). Tier: T4.
    Cost: `epochs` passes over the retained images, with as many images of the class beside them.
    """

    name = "negative-gradient"
    tier = "T4"
    epochs: int = 1
    lr: float = 1e-3
    alpha: float = 1.0
    batch_size: int = BATCH_SIZE

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Descend on batches of both kinds."""
        with torch.no_grad():
            bound = 2 * math.log(model(x[:1]).shape[1])
        generator = torch.Generator().manual_seed(seed)

        def steps() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(self.epochs):
                for kept, y in shuffle(retained, self.batch_size, generator, x):
                    forget = x[torch.randint(len(x), (len(y),), generator=generator).to(x.device)]
                    yield torch.cat([kept, forget]), torch.cat([y, torch.full_like(y, target)])  # both (2 B, ...)

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            kept, forget = F.cross_entropy(logits, y, reduction="none").chunk(2)  # (2 B,) -> (B,), (B,)
            return kept.mean() - self.alpha * forget.clamp(max=bound).mean()

        return descend(model, steps(), loss, self.lr)


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Peer):
    """Give each image of the class to the class beside it (see `nearest_classes`), and train on that.

    Minimises CE(x, nearest class) with Adam; `retained` is not used.

    Source: "Boundary Shrink" of Chen et al. (CVPR 2023, arXiv 2303.11570). Tier: T2.
    Cost: `epochs` + 1 passes, forward and backward, over the images of the class.
    """

    name = "boundary-shrink"
    tier = "T2"
    epochs: int = 10
    lr: float = 1e-4
    epsilon: float = 0.1
    batch_size: int = BATCH_SIZE

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Descend on the images of the class under their new labels."""
        nearest = nearest_classes(model, x, target, self.epsilon, self.batch_size)
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(len(x), generator=generator).to(x.device) for _ in range(self.epochs))
        steps = ((x[i], nearest[i]) for order in orders for i in order.split(self.batch_size))
        return descend(model, steps, F.cross_entropy, self.lr)


@torch.enable_grad()
def nearest_classes(
    model: nn.Module, x: Tensor, target: int, epsilon: float = 0.1, batch_size: int = BATCH_SIZE
) -> Tensor:
    """The wrong class (N,) that one adversarial step leads each image towards.

    argmax over c != target of f(x')_c with x' = x + epsilon sign(d CE(f(x), target) / dx). The step is not clipped
    to the range of the pixels, which depends on how the data was normalised.
    """
    nearest = []
    for part in x.split(batch_size):
        part = part.detach().requires_grad_()
        loss = F.cross_entropy(model(part), torch.full((len(part),), target, device=x.device))
        with model_errors(model, part):
            (gradient,) = torch.autograd.grad(loss, part)
        with torch.no_grad():
            logits = model(part + epsilon * gradient.sign())
        logits[:, target] = -torch.inf
        nearest.append(logits.argmax(1))  # (B, classes) -> (B,)
    return torch.cat(nearest)


# --- dampening ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ssd(Peer):
    """Selective synaptic dampening: shrink the parameters that matter more to the class than to the rest.

    With F_f and F_d the diagonals of the Fisher information on `x` and on `retained`, see `fisher_information`:
    theta <- min(lam F_d / F_f, 1) theta where F_f > alpha F_d. Nothing is random.

    In the paper F_d is of the whole training data, the class included. With ten classes of equal size F_f cannot
    then exceed 10 F_d, and alpha = 10 would select nothing; here F_d is of the retained samples alone.
    A few samples that the model gets wrong make up most of F_d: another draw of 20 a class can decide between
    forgetting and not.

    Source: Foster, Schoepf and Brintrup (AAAI 2024, arXiv 2308.07707). Tier: T3.
    Cost: one pass, forward and backward and image by image, over `x` and `retained`.
    """

    name = "ssd"
    tier = "T3"
    alpha: float = 10.0
    lam: float = 1.0

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Dampen."""
        f_f = fisher_information(model, ((image, target) for image in x))
        f_d = fisher_information(model, (pair for batch in data.batches(retained) for pair in zip(*batch, strict=True)))
        for p, forget, kept in zip(trainable(model), f_f, f_d, strict=True):
            chosen = forget > self.alpha * kept
            p[chosen] *= (self.lam * kept / forget).clamp(max=1)[chosen]
        return Edit(no_rows(), {})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are no integers."""
    return [p for p in model.parameters() if p.requires_grad]


@torch.enable_grad()
def fisher_information(model: nn.Module, pairs: Iterable[tuple[Tensor, int]]) -> list[Tensor]:
    """Diagonal of the empirical Fisher information, one tensor for each parameter that can be trained.

    mean_i (d log p(y_i | x_i) / d theta)^2: each image's own gradient is squared, not that of a batch.
    (`torch.func.vmap` would take many images at once, but no model that asks for channels_last, as `SmallCNN` does.)
    """
    parameters = trainable(model)
    total = [torch.zeros_like(p) for p in parameters]
    count = 0
    for image, label in pairs:
        count += 1
        image = image[None].to(parameters[0])  # (C, H, W) -> (1, C, H, W)
        loss = F.cross_entropy(model(image), torch.tensor([int(label)], device=image.device))
        with model_errors(model, image):
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for t, g in zip(total, gradients, strict=True):
            t.addcmul_(g.detach(), g.detach())
    return [t / count for t in total]


# --- projection -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Svd(Peer):
    """Project out of each Linear and Conv2d the directions of its input that only the class uses.

    For a layer's inputs (for a convolution its patches), with right singular vectors V and singular values s:
    r_i = s_i^2 / sum_j s_j^2, Lambda_i = alpha r_i / ((alpha - 1) r_i + 1), P = V diag(Lambda) V^T; once for
    `retained` (P_r, alpha_r) and once for `x` (P_f, alpha_f). Then W <- W (I - (P_f - P_f P_r)). All layers use the
    inputs they have in the unedited model. Of the grid of alphas, the pair with the greatest
    accuracy(retained) (1 - accuracy(x)) on these same samples is kept. Nothing is random.

    The grid of alphas and the score are ours.

    Source: Kodge, Saha and Roy (TMLR 2024, arXiv 2312.00761). Tier: T3.
    Cost: one pass forward over `x` and `retained`, one more for each pair of alphas, and two singular value
    decompositions for each layer, of at most (inputs of a neuron) squared numbers.
    """

    name = "svd"
    tier = "T3"
    alphas_r: tuple[float, ...] = (10, 100, 1000, 10000)
    alphas_f: tuple[float, ...] = (3, 30, 300)

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Project with the best pair of alphas."""
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        x_kept, y_kept = (torch.cat(t) for t in zip(*data.batches(retained), strict=True))
        x_kept, y_kept = x_kept.to(x), y_kept.to(x.device)
        spaces, spaces_kept = (input_spaces(model, layers, images) for images in (x, x_kept))
        weights = {layer: layer.weight.clone() for layer in spaces}

        def project(alpha_r: float, alpha_f: float) -> None:
            for layer, weight in weights.items():
                groups = getattr(layer, "groups", 1)
                w = at_least_float32(weight)
                w = w.reshape(groups, -1, w[0].numel())  # (out, ...) -> (groups, out / groups, inputs)
                w_f = part_within(w, spaces[layer], alpha_f)
                new = w - w_f + part_within(w_f, spaces_kept[layer], alpha_r)
                layer.weight.copy_(new.reshape(weight.shape))  # (groups, out / groups, inputs) -> (out, ...)

        def score(alphas: tuple[float, float]) -> float:
            project(*alphas)
            labels = torch.full((len(x),), target, device=x.device)
            return share_right(model, x_kept, y_kept) * (1 - share_right(model, x, labels))

        project(*max(((r, f) for r in self.alphas_r for f in self.alphas_f), key=score))
        return Edit(no_rows(), {})


def input_spaces(model: nn.Module, layers: Iterable[nn.Module], x: Tensor) -> dict[Any, tuple[Tensor, Tensor]]:
    """For each layer that is called the right singular vectors (groups, inputs, rank) of its inputs, and the shares r
    (groups, rank).

    A layer's inputs, one a row, can be too many to hold. Of each batch only the factor R of a QR decomposition is
    kept: R^T R is the sum over all rows so far, so that R has their singular values and right singular vectors.
    """
    factors: dict[Any, Tensor] = {}

    def keep(layer: nn.Module, entering: Tensor) -> None:
        rows = input_rows(layer, at_least_float32(entering))
        factors[layer] = torch.linalg.qr(torch.cat([factors[layer], rows], 1) if layer in factors else rows, "r").R

    with watch_inputs(layers, keep):
        for part in x.split(BATCH_SIZE):
            model(part)
    spaces = {}
    for layer, rows in factors.items():
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
        power = s.square()
        spaces[layer] = (vt.mT, power / power.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny))
    return spaces


def input_rows(layer: Any, x: Tensor) -> Tensor:
    """What each neuron of a layer sees, (groups, rows, inputs): the layer is a matrix product with its weights."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])  # (N, ..., inputs) -> (1, N ..., inputs)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)  # as Conv2d does, for padding "same" and numbers alike
    patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    patches = patches.unflatten(1, (layer.groups, -1))  # (N, C kh kw, L) -> (N, groups, inputs, L)
    return patches.permute(1, 0, 3, 2).flatten(1, 2)  # -> (groups, N, L, inputs) -> (groups, N L, inputs)


def part_within(w: Tensor, space: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """w P, the part of the weights (groups, out, inputs) within a space, P = V diag(Lambda) V^T."""
    v, r = space
    scale = alpha * r / ((alpha - 1) * r + 1)
    return (w @ v * scale[:, None]) @ v.mT  # (groups, rank) -> (groups, 1, rank), the same for each row of w


# --- shared ---------------------------------------------------------------------------------------------------


def shuffle(
    dataset: Dataset, batch_size: int, generator: torch.Generator, like: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (B, C, H, W) and (B,) of one epoch in random order, on the device and of the dtype of `like`."""
    order = torch.randperm(len(dataset), generator=generator).tolist()
    for x, y in data.batches(Subset(dataset, order), batch_size):
        yield x.to(like), y.to(like.device)


@torch.enable_grad()
def descend(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor], lr: float
) -> Edit:
    """Train with Adam, one step for each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for x, y in batches:
        value = loss(model(x), y)
        optimizer.zero_grad()
        with model_errors(model, x):
            value.backward()
        optimizer.step()
    optimizer.zero_grad()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ZsuError("the loss is not finite", where="forget", remedy=f"lower lr={lr}")
    return Edit(no_rows(), {})


def share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that the model gets right."""
    return float((torch.cat([model(part).argmax(1) for part in x.split(BATCH_SIZE)]) == y).double().mean())
