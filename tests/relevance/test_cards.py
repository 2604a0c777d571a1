"""The twin of the sums for graphics cards, on a CPU in Triton's interpreter, which has to be asked for before all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA")
INTERPRETED = """
import torch
from torch import nn
from zsu import explain
from zsu.relevance import cards, sums

def differ(found, expected):
    for a, b in zip(found, expected, strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.shape == b.shape, (a.shape, b.shape)
        yield float((a - b).abs().max() / (b.abs().max() + 1e-30))

def plain_and_twin(run):
    sums.fits = lambda *_: False
    sums.on_card = lambda *_: False
    plain = run()
    used = []
    sums.on_card = lambda axes, *tensors: cards.fit(axes, *tensors) and not used.append(1)
    return plain, run(), len(used)
"""
SUMS = """
torch.manual_seed(0)
last = torch.channels_last
for shape, channel, layout in [((2, 5, 7, 3), 1, None), ((2, 5, 7, 6), 1, last), ((3, 9, 70), 2, None),
                               ((4, 70), 1, None), ((1, 3, 40, 40), 1, None), ((2, 1, 1, 1), 1, None),
                               ((3, 130, 20), 2, None)]:
    z, g, b = torch.randn(3, *shape)
    z[0, 0] = 0
    z, g, b = (t.contiguous(memory_format=layout) if layout else t for t in (z, g, b))
    s, axes = torch.rand(shape[channel]) + 0.5, (0, channel)
    for run in (lambda: sums.arrive(z, g, axes), lambda: sums.over(g, z, 1e-3, axes), lambda: sums.split(z, b, g, axes),
                lambda: sums.epsilon_rule(z, g, 1e-3, s, axes), lambda: sums.epsilon_rule(z, g, 1e-3, None, axes)):
        plain, twin, used = plain_and_twin(run)
        assert used == 1 and max(differ(twin, plain)) <= 2e-6, (shape, layout, list(differ(twin, plain)))
w, gw = torch.randn(2, 6, 4, 3, 3)
plain, twin, used = plain_and_twin(lambda: [sums.over_window(w, gw)])
assert used == 1 and max(differ(twin, plain)) <= 2e-6
assert not cards.fit((0, 1), z.double()) and not cards.fit((1, 0), z) and not cards.fit((0, 1), z, z.transpose(1, 2))
print("same sums")
"""
MAPS = """
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(),
                      nn.Linear(80, 3)).eval()
x = torch.randn(3, 2, 8, 8)
for rule in ("epsilon", "gamma", "z+", "alpha-beta"):
    plain, twin, used = plain_and_twin(lambda: explain(model, x, 1, rule))
    assert used >= 3
    assert max(differ([twin.input, *twin.edges.values()], [plain.input, *plain.edges.values()])) <= 1e-4
    assert max(differ(twin.nodes.values(), plain.nodes.values())) <= 1e-4
print("same maps")
"""


@pytest.mark.parametrize(("script", "said"), [(SUMS, "same sums"), (MAPS, "same maps")])
@pytest.mark.filterwarnings("ignore")
def test_on_a_card_the_same_comes_out(script, said):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED + script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == said, found.stderr[-2000:]
