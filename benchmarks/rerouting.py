"""Where should the evidence go? Rules that were tried for it, all ten classes and three originals, in one table:
`python benchmarks/rerouting.py FOLDER`, where FOLDER is that of a finished `zsu bench` (its retrained models are used).

Each rule gives outputs for unseen test images of the forgotten class; measured is their divergence from three retrained
models. All but the last two rules are compared as outputs, before any weight is moved: what a rule loses here, an edit
of the weights that follows it cannot win back. Writes benchmarks/results/rerouting.csv.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

import zsu
from zsu import data, files, rerouting, sweep, training
from zsu.evaluation import jensen_shannon
from zsu.forgetting import METHODS
from zsu.forgetting.rerouting import entering_inputs, without, without_evidence

folder = Path(sys.argv[1])
splits = data.load("fashion-mini")
labels = data.targets(splits.test)
warnings.simplefilter("ignore")  # stabilisers


def mixed(a, b, target, share=0.5):
    """Geometric mean of two log-probabilities, without the class."""
    return without((1 - share) * a + share * b, target)


def blurred(x, reach):
    return F.avg_pool2d(F.pad(x, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)


def gradients(model, x, layer):
    """Gradients (N, classes, D) of the logits with respect to what enters a layer."""
    leaf = []

    def cut(_, inputs):
        leaf.append(inputs[0].detach().requires_grad_())
        return (leaf[0],)

    handle = model.get_submodule(layer).register_forward_pre_hook(cut)
    z = model(x)
    handle.remove()
    return torch.stack(
        [torch.autograd.grad(z[:, c].sum(), leaf[0], retain_graph=True)[0].flatten(1) for c in range(10)], 1
    )


@torch.no_grad()
def rules(model, x, f, retained):
    """Log-probabilities (N, 10) by (name, tier) of the rule."""
    generator = torch.Generator().manual_seed(0)
    z = model(x)
    mask = without(z, f)
    yield "mask", "T0", mask
    for t in (0.6, 1.5):
        yield f"mask at temperature {t}", "T0", without(z / t, f)
    weight, h = model.head.weight, entering_inputs(model, x, "head")
    share = weight[f].clamp(min=0) / weight.clamp(min=0).sum(0).clamp(min=1e-9)
    cosine = F.cosine_similarity(weight, weight[f : f + 1])
    yield "similarity of the head's rows", "T0", without(z + cosine, f)
    yield "inhibition by the class's neurons cut", "T1", without(z - h @ (share * weight.clamp(max=0)).T, f)
    yield "the class's neurons halved", "T1", without(z - 0.5 * h @ (share * weight).T, f)
    for layer in ("conv2", "fc"):
        with torch.enable_grad():
            g = gradients(model, x, layer)
        kernel = (g * g[:, f : f + 1]).sum(2)
        margin = z[:, f] - z.scatter(1, torch.full((len(z), 1), f), -1e9).max(1).values
        tilt = 0.3 * kernel / kernel[:, f : f + 1] * margin[:, None]
        yield f"tilted by the gradients' similarity before {layer}", "T1", without(z + tilt, f)
        distance = (z - z[:, f : f + 1]) / (g - g[:, f : f + 1]).norm(dim=2).clamp(min=1e-6)
        scale = (g - g[:, f : f + 1]).norm(dim=2).mean()
        yield f"distance to each class before {layer}", "T1", mixed(mask, without(distance * scale, f), f)
    noisy = [without(model((x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)), f) for _ in range(8)]
    yield "mean over input noise", "T1", without(torch.stack(noisy).mean(0), f)
    moved = [without(model(torch.roll(x, (i, j), (2, 3))), f) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    yield "mean over shifts by a pixel", "T1", without(torch.stack(moved).mean(0), f)
    yield "mask and whole picture blurred", "T1", mixed(mask, without(model(blurred(x, 1)), f), f)
    with torch.enable_grad():
        relevance = zsu.explain(model, x, f, edges=False)
    by_pixel = relevance.input.sum(1, keepdim=True)
    rank = by_pixel.flatten(1).argsort(1, descending=True).argsort(1).view_as(by_pixel)
    for part in (0.05, 0.2, 0.4):
        chosen = rank < part * rank[0].numel()
        answer = without(model(torch.where(chosen, blurred(x, 1), x)), f)
        yield f"mask and {part:.0%} most relevant pixels blurred", "T1", mixed(mask, answer, f)
    answer = without(model(torch.where(by_pixel > 0, 0.5 * x, x)), f)
    yield "mask and pixels for the class at half", "T1", mixed(mask, answer, f)
    answer = without(model(without_evidence(x, relevance.input)), f)
    yield "counterfactual alone", "T1", answer
    yield "mask and counterfactual (kept)", "T1", mixed(mask, answer, f)
    pictures, theirs = (torch.cat(t) for t in zip(*data.batches(retained), strict=True))
    for layer in ("conv2", "conv3", "fc", "head"):
        near, known = (rerouting.features(model, t, layer) for t in (x, pictures))
        logits = torch.full((len(x), 10), -1e4)
        for c in theirs.unique().tolist():
            logits[:, c] = (near @ known[theirs == c].T / rerouting.TEMPERATURE).logsumexp(1)
        yield f"mask and neighbours before {layer}", "T3", mixed(mask, without(logits, f), f)
    near, known = (entering_inputs(model, t, "conv2").flatten(1) for t in (x, pictures))
    fitted = LogisticRegression(C=0.01).fit((known / known.std()).numpy(), theirs.numpy())
    logits = torch.full((len(x), 10), -1e4, dtype=torch.float64)
    logits[:, fitted.classes_] = torch.tensor(fitted.predict_log_proba((near / known.std()).numpy())).double()
    yield "mask and logistic regression before conv2", "T3", mixed(mask, without(logits, f), f)
    wanted = rerouting.wanted_outputs(model, x, f, relevance, retained)
    yield "mask, counterfactual and neighbours (kept)", "T3", wanted


options = {"classes": None, "seeds": range(3), "methods": METHODS, "measures": sweep.ALL, "epochs": training.EPOCHS}
settings = sweep.check_sweep(sweep.Settings(folder, "fashion-mini", "data", **options, samples=36, references=3))


def trained(exclude, seed):
    """A model from the folder; trained where it is missing."""
    sweep.train_model(sweep.Task("train", exclude, seed), settings)
    return sweep.load_trained(exclude, seed, settings)


rows = []
for seed in tqdm(range(3), desc="originals"):
    model = trained(None, seed)
    for f in tqdm(range(10), desc="classes", leave=False):
        held_out = data.without_samples(splits.test, f, seed=seed)
        x = torch.cat([x for x, _ in data.batches(held_out)])[data.targets(held_out) == f]
        retrained = [trained(f, s) for s in range(3)]
        with torch.no_grad():
            references = [m(x).double().softmax(1) for m in retrained]
        retained = sweep.some_retained(splits.train, f, seed)

        def measure(rule, tier, p, references=references, f=f, seed=seed):
            js = np.mean([jensen_shannon(p, r) for r in references])
            rows.append({"rule": rule, "tier": tier, "class": f, "seed": seed, "js": js})

        for rule, tier, log_p in rules(model, x, f, retained):
            measure(rule, tier, log_p.exp())
        samples = data.samples(splits.test, f, seed=seed)
        for rule, tier, kept in (("as weights: paths", "T1", None), ("as weights: paths+retained", "T3", retained)):
            with torch.no_grad():
                edited = zsu.forget(model, samples, f, retained=kept, seed=seed).model
                measure(rule, tier, edited(x).double().softmax(1))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            measure("null: retrain against retrain", "T4", references[i], [references[j]])

frame = pd.DataFrame(rows)
null = frame.loc[frame["tier"] == "T4", "js"].mean()
by_class = frame.pivot_table("js", "class", "rule")
summary = pd.DataFrame({"js": by_class.mean(), "js_by_null": by_class.mean() / null})
summary["worst_class_by_mask"] = by_class.div(by_class["mask"], axis=0).max()
summary.insert(0, "tier", frame.groupby("rule")["tier"].first())
summary = summary.sort_values("js")
print(summary.round(4).to_string())
out = Path(__file__).parent / "results" / "rerouting.csv"
files.write_atomically(out, lambda temporary: summary.to_csv(temporary))
