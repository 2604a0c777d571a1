"""compare(): relevance beside what captum attributes to the same inputs."""

import warnings

from torch import Tensor, nn

from ..errors import warn
from ..inside import copied
from .composites import Rules
from .explanation import explain


def compare(model: nn.Module, x: Tensor, target: int | Tensor, rules: Rules = "epsilon") -> dict[str, Tensor]:
    """Attributions of the same logit by zsu's LRP and by captum, by name of the method.

    Integrated Gradients (Sundararajan et al. 2017, arXiv:1703.01365, 50 steps) and DeepLIFT (Shrikumar et al. 2017,
    arXiv:1704.02685) compare with an image of zeros; captum's LRP uses its own default rules.

    Parameters
    ----------
    model, x, target, rules
        As for `explain`. captum works on a copy of the model.

    Returns
    -------
    dict of str to Tensor (N, C, H, W)
        "LRP", "Integrated Gradients", "DeepLIFT", "LRP (captum)", without those that captum cannot compute.

    Raises
    ------
    ZsuError
        What `explain` refuses.

    Warns
    -----
    UserWarning
        captum cannot compute a method for this model, such as DeepLIFT and LRP where modules are used twice.
    """
    from captum.attr import LRP, DeepLift, IntegratedGradients  # takes a second to import

    maps = {"LRP": explain(model, x, target, rules, edges=False).input}
    methods = {"Integrated Gradients": IntegratedGradients, "DeepLIFT": DeepLift, "LRP (captum)": LRP}
    for name, method in methods.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on hooks that captum sets and removes
                maps[name] = method(copied(model)).attribute(x.clone().requires_grad_(), target=target).detach()
        except Exception as error:  # captum raises many types
            reason = str(error).splitlines()[0] if str(error) else ""
            warn(f"captum's {name} does not run: {type(error).__name__} {reason}")
    return maps
