"""A model that runs: the one place that runs it on a batch, checks what it answers, and copies it; what enters a layer,
and which one is the head."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from .errors import MOST, ZsuError, words

HOOKS = "zsu.explain cannot follow checkpoints and other hooks on saved tensors"
COMPILED = "_orig_mod."  # what torch.compile puts into names

# --- which models can be run ----------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """`ZsuError` for what is no plain module that takes one batch, and for parts in train mode."""
    if not isinstance(model, nn.Module):
        raise ZsuError(f"the model is a {type(model).__name__}", where="explain", remedy="pass an nn.Module")
    check_plain(model)
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError as error:
        what, remedy = f"forward does not take one input ({error})", "wrap it in a module that takes the batch alone"
        raise ZsuError(what, where=type(model).__name__, remedy=remedy) from error
    training = next((name for name, module in model.named_modules() if module.training), "")
    check_eval(model, where=training or type(model).__name__)


def check_plain(model: nn.Module) -> None:
    """`ZsuError` for models that do not run as Python modules do, and for those without weights yet."""
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        script = isinstance(model, torch.jit.ScriptModule)
        remedy = f"pass the plain module {'that it was made of' if script else 'inside it'}"
        raise ZsuError(f"a {type(model).__name__}", where="the model", remedy=remedy)
    if isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):  # it has no modes
        raise ZsuError("an exported program", where="the model", remedy="pass the plain module that it was made of")
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ZsuError("a lazy parameter has no values yet", where=lazy, remedy="run the model once, then pass it")
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        remedy = "load the weights first: model.to_empty(device='cpu'), then load_state_dict"
        raise ZsuError("a parameter on meta has no values", where=meta, remedy=remedy)


def check_eval(model: nn.Module, where: str) -> None:
    """`ZsuError` unless the model and all its parts are in eval mode."""
    if any(module.training for module in model.modules()):
        raise ZsuError("the model is in train mode", where=where, remedy="call model.eval()")


def check_weights(model: nn.Module) -> None:
    """`ZsuError` for weights that are computed from others before each pass: an edit of them would not last."""
    for name, module in model.named_modules():
        computed = next(iter(computed_tensors(module).items()), None)
        if computed is not None:
            tensor, remedy = computed
            what = "is no nn.Parameter, but parametrized, computed before each pass, or a plain tensor"
            where = f"{name}.{tensor}" if name else tensor
            layer = f"model.get_submodule({name!r})"
            raise ZsuError(what, where=where, remedy=f"bake in the weights first: {remedy.format(layer, tensor)}")


def computed_tensors(module: nn.Module) -> dict[str, str]:
    """The weights of a module that are no parameters but computed, and the call that makes them parameters again."""
    found = {}
    if parametrize.is_parametrized(module):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations({}, {!r})"
        found = dict.fromkeys(module.parametrizations, remedy)  # type: ignore[arg-type]
    for hook in module._forward_pre_hooks.values():  # as torch made them before there were parametrizations
        old = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}.get(type(hook).__name__)
        if isinstance(hook, prune.BasePruningMethod):
            found[hook._tensor_name] = "torch.nn.utils.prune.remove({}, {!r})"
        elif old is not None:
            found[hook.name] = f"torch.nn.utils.{old}({{}}, {{!r}})"  # type: ignore[attr-defined]
    for name in ("weight", "bias"):
        if isinstance(vars(module).get(name), Tensor) and name not in found:
            found[name] = "let {0}.{1} be an nn.Parameter"
    return found


# --- running it -----------------------------------------------------------------------------------------------


def first_weight(model: nn.Module) -> Tensor | None:
    """The first parameter that is no integer: its device and dtype are the model's."""
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def place(x: Tensor, model: nn.Module) -> Tensor:
    """Images on the device and in the dtype of the model."""
    like = first_weight(model)
    if like is None:
        return x
    return x.to(like.device, like.dtype, non_blocking=like.is_cuda)  # back to the CPU somebody has to wait


def run(model: nn.Module, x: Tensor, where: str | None = None) -> Any:
    """What a model answers to a batch. What torch.compile made runs as it was written, where hooks and tapes see it."""
    check_plain(model)
    with eagerly(), model_errors(model, x, where):
        return model(x)


def eagerly() -> AbstractContextManager:
    """Inside the with block nothing runs compiled."""
    compiler = "torch._dynamo" in sys.modules  # whoever has compiled anything has loaded it
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()


@contextmanager
def model_errors(model: nn.Module, x: Tensor, where: str | None = None) -> Iterator[None]:
    """Whatever a model raises on a batch inside the with block is one `ZsuError` of one line."""
    try:
        yield
    except ZsuError:
        raise
    except Exception as error:
        line = first_line(error)
        what, remedy = f"{line} (x is {tuple(x.shape)})", "pass a batch that the model can take, or mend its forward"
        if HOOKS in line:
            what, remedy = HOOKS, "explain the model without checkpoints"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in line:
            remedy = "pass fewer samples, or free memory"
        elif "requires grad" in line or "does not require grad" in line:
            remedy = "let the model compute with torch alone and without no_grad, so that gradients can pass"
        raise ZsuError(what, where=where or type(model).__name__, remedy=remedy) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line, with its class where it is no RuntimeError, which speaks for itself."""
    line = next(iter(words(error).strip().splitlines()), "").rstrip(".")[:MOST]
    return line if line and type(error) is RuntimeError else f"{type(error).__name__}: {line}".rstrip(": ")


def check_logits(model: nn.Module, logits: Any, x: Tensor, where: str | None = None) -> None:
    """Refuse outputs that are no floating-point logits (N, classes), a row for each sample."""
    where, remedy = where or type(model).__name__, "return logits of shape (N, classes), and nothing else"
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] == 0:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ZsuError(f"the model's output is {shape}", where=where, remedy=remedy)
    if len(logits) != len(x):
        what = f"the model's output has {len(logits)} rows for {len(x)} samples (x is {tuple(x.shape)})"
        raise ZsuError(what, where=where, remedy="pass samples of the shape that the model was built for")
    if not logits.is_floating_point():
        raise ZsuError(f"the model's output is {logits.dtype}", where=where, remedy="return floating-point logits")
    if logits.layout != torch.strided or logits.is_meta:
        what = f"the model's output is {'on meta' if logits.is_meta else logits.layout}"
        raise ZsuError(what, where=where, remedy="return dense logits with values")


def check_finite(model: nn.Module, logits: Tensor, where: str | None = None) -> None:
    """Refuse logits that are not finite."""
    if not logits.isfinite().all():
        tensors = (*model.named_parameters(), *model.named_buffers())
        broken = next((name for name, t in tensors if not t.isfinite().all()), None)
        remedy = f"{broken} holds NaN or infinity" if broken else "check the size of the model's activations"
        raise ZsuError("the logits are not finite", where=where or type(model).__name__, remedy=remedy)


def logits_of(model: nn.Module, x: Tensor, where: str | None = None) -> Tensor:
    """Outputs (N, classes) of images, put where the model is; `ZsuError` where the two do not fit together."""
    x = place(x, model)
    logits = run(model, x, where)
    check_logits(model, logits, x, where)
    return logits


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Whoever calls the model inside the with block keeps the input as it was, and meets its errors as one `ZsuError`.

    A model may change its input in place.
    """
    own, forward = vars(model).get("forward"), model.forward

    def careful(x: Tensor) -> Any:
        with model_errors(model, x):
            return forward(x.clone())

    model.forward = careful
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


# --- copying it -----------------------------------------------------------------------------------------------


class CopyWithoutGraph(TorchFunctionMode):
    """Tensors with a graph, such as activations that a model has kept, are copied without it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def copied(model: nn.Module) -> nn.Module:
    """A copy with the same weights, hooks and modes, in which nothing is compiled; `ZsuError` where there is none."""
    model = uncompiled(model)
    memo: dict[int, Any] = {}
    try:
        with CopyWithoutGraph():
            for part in reversed(list(model.modules())):
                if uncompiled(part) is not part:  # the copy has what is inside in its place
                    memo[id(part)] = copy.deepcopy(uncompiled(part), memo)
            twin = copy.deepcopy(model, memo)
        restore(model, twin)
    except Exception as error:
        what, remedy = f"the model cannot be copied: {first_line(error)}", "keep outside of it what deepcopy refuses"
        raise ZsuError(what, where=uncopiable(model) or type(model).__name__, remedy=remedy) from error
    return twin


@torch.no_grad()
def restore(model: nn.Module, twin: nn.Module) -> None:
    """Modes, hooks and values as in the model: a module may have been built anew, as einops' layers are."""
    originals = {name.replace(COMPILED, ""): m for name, m in model.named_modules(remove_duplicate=False)}
    for name, module in twin.named_modules(remove_duplicate=False):
        original = originals[name]
        module.training = original.training
        for kind in [key for key in vars(module) if "_hooks" in key and key in vars(original)]:
            for number, hook in (vars(original)[kind] or {}).items():
                vars(module)[kind].setdefault(number, hook)
        compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if getattr(compiled, "__self__", None) is original:  # model.forward = torch.compile(model.forward)
            del module.forward
    held = {name.replace(COMPILED, ""): t for name, t in tensors(model).items()}
    twins = tensors(twin)
    if held.keys() != twins.keys():
        raise ValueError(f"it has other tensors: {', '.join(sorted(held.keys() ^ twins.keys()))}")
    for name, t in held.items():
        if not torch.equal(t, twins[name]):
            twins[name].copy_(t)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones by each of their names."""
    buffers = model.named_buffers(remove_duplicate=False)
    return dict(model.named_parameters(remove_duplicate=False)) | dict(buffers)


def uncopiable(model: nn.Module) -> str | None:
    """The name of the attribute that deepcopy refuses, where it is a single one."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters", "_buffers"):
                try:
                    with CopyWithoutGraph():
                        copy.deepcopy(value, {id(module): module})
                except Exception:  # of whatever class: deepcopy asks the object itself
                    return f"{name}.{key}".lstrip(".")
    return None


# --- looking into it ------------------------------------------------------------------------------------------


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
        logits = logits_of(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, out in outputs.items() if torch.equal(out.to(logits), logits)), None)
