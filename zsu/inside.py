"""A look into a model that runs: is it in eval mode, what does it answer, what enters a layer, which is the head?"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import ZsuError


def check_eval(model: nn.Module, where: str) -> None:
    """`ZsuError` unless the model and all its parts are in eval mode."""
    if any(module.training for module in model.modules()):
        raise ZsuError("the model is in train mode", where=where, remedy="call model.eval()")


def place(x: Tensor, model: nn.Module) -> Tensor:
    """Images on the device and in the dtype of the model."""
    like = next(model.parameters(), x)
    return x.to(like.device, like.dtype)


def logits_of(model: nn.Module, x: Tensor, where: str) -> Tensor:
    """Outputs (N, classes) of images, put where the model is; `ZsuError` where the two do not fit together."""
    try:
        logits = model(place(x, model))
    except RuntimeError as error:
        remedy = "pass images in the shape that the model was built for"
        raise ZsuError(f"the model refuses images {tuple(x.shape)}: {error}", where=where, remedy=remedy) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"have shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"are a {type(logits).__name__}"
        raise ZsuError(f"the outputs {found}", where=where, remedy="pass a model whose output is (N, classes)")
    return logits


@contextmanager
def watch_inputs(layers: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Show what enters layers while their model runs inside the with block: ``see(layer, input)`` at each call."""

    def show(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        see(layer, [*args, *kwargs.values()][0])

    hooks = [layer.register_forward_pre_hook(show, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logit_layer(model: nn.Module, x: Tensor) -> str | None:
    """Name of the Linear whose outputs on x, as they are, are the logits (N, classes); None where there is none."""
    outputs = {}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [
        m.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out.clone()}))
        for name, m in linears
    ]
    try:
        logits = model(place(x, model))
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, out in outputs.items() if torch.equal(out.to(logits), logits)), None)
