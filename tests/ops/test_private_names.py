"""PyTorch's private names: each of `aevb._torch` may be gone, and numbers stay the same."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import aevb
from aevb import _torch

SOURCE = Path(_torch.__file__)
# As `_torch.find` is asked for them.
FOUND = re.findall(r'find\("([\w.]+)"', SOURCE.read_text())


def test_they_stand_nowhere_else():
    """Of torch, its modules and its objects; names of aevb's own classes are not meant."""
    private = re.compile(r"torch(\.\w+)*\._(?!_)\w+|.*\._global_\w+")
    found = {}
    for path in SOURCE.parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
        if path != SOURCE and (wrong := [name for name in names if private.fullmatch(name)]):
            found[path.name] = wrong
    assert found == {}


def without(*paths: str):
    """A copy of `aevb._torch` that finds none of these names."""
    spec = importlib.util.spec_from_file_location("aevb._without", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    source = SOURCE.read_text()
    for path in paths:
        assert f'"{path}"' in source
        source = source.replace(f'"{path}"', '"no.such.name"')
    exec(compile(source, str(SOURCE), "exec"), module.__dict__)
    return module


def test_there_are_some():
    assert len(FOUND) >= 10


@pytest.mark.parametrize("path", FOUND)
def test_this_pytorch_has_it(path):
    """Where one of the versions that CI runs lacks it, the fallback is what people get: it should be known."""
    assert _torch.find(path, None) is not None


def test_fallbacks_are_careful():
    bare = without(*FOUND)
    t = torch.randn(3, 4)
    assert not bare.functorch_active()
    assert bare.num_dispatch_modes() > 0
    assert bare.keeps_graph()
    assert not bare.is_legacy_batched(t)
    assert not bare.is_legacy_batched(nn.Parameter(t))

    class Other(torch.Tensor):
        pass

    assert bare.is_legacy_batched(t.as_subclass(Other))
    assert torch.equal(bare.view_of_unshared(t, [4, 3]), t.view(4, 3))
    assert bare.linear_pointwise() is None
    assert bare.reorder_linear_weight(t) is t


def test_without_the_query_a_function_is_left_to_pytorch():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    for module in (_torch, without("_C._are_functorch_transforms_active")):
        assert torch.equal(module.apply_of(Double)(x), 2 * x)
    apply = without("_C._are_functorch_transforms_active").apply_of(Double)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: apply(x).sum())(torch.ones(3))


def test_lists_without_foreach():
    bare = without(*(path for path in FOUND if path.startswith("_foreach")))
    tensors, a, b = ([torch.rand(2, 3) + 1 for _ in range(3)] for _ in range(3))
    for name, arguments in (("add_", (1,)), ("addcmul_", (a, b)), ("addcdiv_", (a, b))):
        here, there = ([t.clone() for t in tensors] for _ in range(2))
        getattr(_torch, f"foreach_{name}")(here, *arguments)
        getattr(bare, f"foreach_{name}")(there, *arguments)
        torch.testing.assert_close(here, there)
    torch.testing.assert_close(_torch.foreach_sqrt(tensors), bare.foreach_sqrt(tensors))
    torch.testing.assert_close(_torch.foreach_mul(tensors, -0.5), bare.foreach_mul(tensors, -0.5))


class Bare:
    """An object without any private name."""


@pytest.mark.parametrize("query", [_torch.has_hooks, _torch.has_gradient_hooks, _torch.has_optimizer_hooks])
def test_hooks_that_nobody_can_tell_of_are_there(query):
    assert query(Bare())


@pytest.mark.parametrize("query", [_torch.has_hooks, _torch.has_optimizer_hooks])
def test_hooks_of_all_that_nobody_can_tell_of_are_there(query, monkeypatch):
    layer = nn.Linear(2, 2)
    of = layer if query is _torch.has_hooks else torch.optim.SGD(layer.parameters())
    assert not query(of)
    for module in (_torch._modules, _torch._optimizers):
        for name in vars(module).copy():
            if name.startswith("_global_"):
                monkeypatch.delattr(module, name)
    assert query(of)


SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
import torch
if {bare}:
    import importlib.util, pathlib
    import aevb_torch_stub
import aevb
torch.manual_seed(0)
model = aevb.VAE(20, (8,), 2, generator=torch.Generator().manual_seed(0))
x = torch.rand(6, 20)
losses = []
for estimator in ("sgvb-b", "iwae"):
    criterion = aevb.FusedELBO(estimator=estimator, num_samples=3)
    z, kl = criterion.sample(*model.encode(x), seed=5)
    loss = criterion(model.recon(z), x, kl=kl)
    losses += [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
data = aevb.data.Dataset("mine", (4, 5), 1, x, x)
config = aevb.TrainConfig(epochs=2, hidden_dims=(8,), latent_dim=2, batch_size=3, progress=False, out=sys.argv[1])
trainer = aevb.Trainer(config, dataset=data)
for _ in range(2):
    trainer.train_epoch()
torch.save([losses, [p.detach() for p in trainer.model.parameters()], trainer.evaluate().elbo], sys.argv[1] + ".pt")
"""


def test_without_all_of_them_numbers_are_the_same(tmp_path):
    """In a process whose `aevb._torch` finds none of its names: losses, gradients, and a run."""
    (tmp_path / "aevb_torch_stub.py").write_text(
        "import functools, sys, types\n"
        f"source = open({str(SOURCE)!r}).read()\n"
        "source = source.replace('find(\"', 'find(\"no.such.')\n"
        f"module = types.ModuleType('aevb._torch'); module.__file__ = {str(SOURCE)!r}\n"
        "exec(source, module.__dict__)\n"
        "sys.modules['aevb._torch'] = module\n"
    )
    saved = []
    for bare in (False, True):
        out = tmp_path / str(bare)
        code = SCRIPT.format(bare=bare)
        subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=tmp_path)
        saved.append(torch.load(f"{out}.pt"))
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-6, atol=1e-6)
    assert aevb.VAE
