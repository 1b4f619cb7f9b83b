"""`python -m benchmarks.many_samples`: what many samples cost, in time and memory.

Three tables. The last layer of a decoder and its Bernoulli log-likelihood, forward and backward, for 50 samples of a
batch of 1,000 (50,000 rows, 500 -> 784), and for a batch of 100; the peak memory of that; and log p(x) of 1,000 images
by 5,000 samples. Providers take turns; each was checked to compute the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import aevb
from aevb import LinearLogits
from aevb.ops.matmul import product

from . import cases
from .measure import RESULTS, describe, duration, quartiles

H, D, LATENT = 500, 784, 20
ROWS_TARGETS = {  # aevb's way, peer, how many times as fast
    ("known gradient", "unfused, fastest product"): 1.3,
    ("known gradient", "eager"): 2.5,
    ("any gradient", "eager"): 1.9,
}
SMALL_TARGET = 1.1  # of the unfused op's time, at 100 rows
MEMORY_TARGET = 96  # MB beyond inputs and gradients
EVALUATION_TARGETS = {"seconds": 25.0, "megabytes": 1000.0, "ratio": 2.5}

# ---- the last layer and its likelihood ------------------------------------------------------------------------------


class FastLinear(torch.autograd.Function):
    """F.linear by the fastest product there is: what the unfused op is given."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        return product(h.flatten(0, -2), weight, bias).view(*h.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        rows, grad_rows = h.flatten(0, -2), grad.flatten(0, -2)
        grad_weight = product(rows.t(), grad_rows.t()).t().contiguous()
        return product(grad_rows, weight.t()).view_as(h), grad_weight, grad_rows.sum(0)


def known(h, weight, bias, x, _):
    return aevb.linear_bernoulli_log_prob(h, weight, bias, x, reduction="mean")


def any_gradient(h, weight, bias, x, row_weights):
    return (aevb.linear_bernoulli_log_prob(h, weight, bias, x) * row_weights).sum()


def unfused(h, weight, bias, x, row_weights):
    return (aevb.bernoulli_log_prob(FastLinear.apply(h, weight, bias), x) * row_weights).sum()


def eager(h, weight, bias, x, row_weights):
    logits = F.linear(h, weight, bias)
    nll = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -(nll.sum(-1) * row_weights).sum()


def iwae(h, weight, bias, x, row_weights):
    criterion = aevb.FusedELBO(estimator="iwae", num_samples=len(h))
    return -criterion(LinearLogits(h, weight, bias), x, kl=row_weights)


def iwae_unfused(h, weight, bias, x, row_weights):
    log_prob = aevb.bernoulli_log_prob(FastLinear.apply(h, weight, bias), x)
    return aevb.importance_weighted_bound(log_prob, row_weights).mean()


def iwae_eager(h, weight, bias, x, row_weights):
    logits = F.linear(h, weight, bias)
    nll = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return (torch.logsumexp(-nll - row_weights, 0) - math.log(len(h))).mean()


Loss = Callable[..., Tensor]
MEANS: Mapping[str, Loss] = {
    "known gradient": known,
    "any gradient": any_gradient,
    "unfused, fastest product": unfused,
    "eager": eager,
}
BOUNDS: Mapping[str, Loss] = {"one pass": iwae, "unfused, fastest product": iwae_unfused, "eager": iwae_eager}


def inputs(samples: int, batch: int) -> tuple[Tensor, ...]:
    """h, weight, bias, x; and the rows' weights, which are their mean's."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(samples, batch, H, generator=generator).tanh_().requires_grad_()
    weight = (torch.randn(D, H, generator=generator) / H**0.5).requires_grad_()
    bias = torch.randn(D, generator=generator).requires_grad_()
    x = (torch.rand(batch, D, generator=generator) < 0.3).float()
    return h, weight, bias, x, torch.full((samples, batch), 1 / (samples * batch))


def check(providers: Mapping[str, Loss], tensors: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless all give the last one's value and gradients."""
    *_, last = providers.values()
    expected = last(*tensors)
    wanted = (expected, *torch.autograd.grad(expected, tensors[:3]))
    for name, loss in providers.items():
        value = loss(*tensors)
        for found, e in zip((value, *torch.autograd.grad(value, tensors[:3])), wanted, strict=True):
            error = (found - e).norm() / e.norm()
            assert error < 1e-3, f"{name} is off by {error:.2g}"


def in_turns(calls: Mapping[str, cases.Call], rounds: int) -> dict[str, dict]:
    """Median and quartiles of seconds, and each round's own."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: {**quartiles(t), "rounds": t} for name, t in times.items()}


def ratio(found: Mapping[str, dict], ours: str, peer: str) -> dict[str, float]:
    by_round = [b / a for a, b in zip(found[ours]["rounds"], found[peer]["rounds"], strict=True)]
    return {**quartiles(by_round), "median": found[peer]["median"] / found[ours]["median"]}


def rows_table(providers: Mapping[str, Loss], samples: int, batch: int, rounds: int) -> dict:
    tensors = inputs(samples, batch)
    check(providers, tensors)
    compiled = torch.compile(providers["eager"], dynamic=False)
    everyone = {**providers, "torch.compile": compiled}

    def call(loss: Loss) -> cases.Call:
        return lambda: torch.autograd.grad(loss(*tensors), tensors[:3])

    return in_turns({name: call(loss) for name, loss in everyone.items()}, rounds)


# ---- memory ---------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(name: str) -> float:
    """In this process: MB at the peak of a forward and backward pass, beyond inputs and gradients."""
    torch.set_num_threads(cases.THREADS)
    loss = {**MEANS, **{f"iwae, {k}": v for k, v in BOUNDS.items()}}[name]
    warm = inputs(1, 1000)
    torch.autograd.grad(loss(*warm), warm[:3])  # libraries, and a chunk's own memory
    del warm
    tensors = inputs(50, 1000)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    gradients = torch.autograd.grad(loss(*tensors), tensors[:3])
    return (_status("VmHWM") - before - sum(g.nbytes for g in gradients)) / 1e6


def memory() -> dict[str, float]:
    names = [*MEANS, *(f"iwae, {name}" for name in BOUNDS)]
    code = "import sys; from benchmarks.many_samples import extra_memory; print(extra_memory(sys.argv[1]))"
    return {
        name: float(subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True).stdout)
        for name in names
    }


# ---- log p(x) -------------------------------------------------------------------------------------------------------


def straightforward(model: aevb.VAE, x: Tensor, num_samples: int, chunk: int, batch: int) -> Tensor:
    """log p(x) by a loop over chunks of samples: plain PyTorch, as one would write it."""
    found = []
    for images in x.split(batch):
        mu, logvar = model.encoder(images).chunk(2, -1)
        sd = torch.exp(0.5 * logvar)
        parts = []
        for first in range(0, num_samples, chunk):
            eps = torch.randn(min(chunk, num_samples - first), *mu.shape)
            z = mu + sd * eps
            logits = model.decoder(z)
            nll = F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none").sum(-1)
            log_ratio = 0.5 * (z.square() - eps.square() - logvar).sum(-1)
            parts.append(torch.logsumexp(-nll - log_ratio, 0))
        found.append(torch.logsumexp(torch.stack(parts), 0) - math.log(num_samples))
    return torch.cat(found)


def model_and_images(run: str | None) -> tuple[aevb.VAE, Tensor]:
    if run:
        trainer = aevb.Trainer.load(run)
        assert isinstance(trainer.model, aevb.VAE)
        return trainer.model, trainer.test_x[:1000].float()
    model = aevb.VAE(D, H, LATENT, generator=torch.Generator().manual_seed(1))
    return model, (torch.rand(1000, D, generator=torch.Generator().manual_seed(2)) < 0.2).float()


def alone(run: str | None = None) -> None:
    """In this process: prints the seconds of log p(x) by 5,000 samples, and the process' peak memory in MB."""
    torch.set_num_threads(cases.THREADS)
    model, x = model_and_images(run)
    start = time.perf_counter()
    aevb.log_marginal_likelihood(model, x, 5000)
    print(time.perf_counter() - start, _status("VmHWM") / 1e6)


def evaluation(rounds: int, run: str | None) -> dict:
    """Of 1,000 images, with the peer's best chunk: turns at 250 samples; then aevb alone at 5,000."""
    model, x = model_and_images(run)
    few = 250
    with torch.no_grad():
        ours = aevb.log_marginal_likelihood(model, x[:50], 20000)
        theirs = straightforward(model, x[:50], 20000, 50, 50)
        assert abs(float((ours.log_prob - theirs).mean())) < 0.1 + 4 * ours.mean_standard_error, "the estimates differ"
        ways = [
            (chunk, batch) for batch in (10, 100, 1000) for chunk in (1, 5, 25, 100) if 500 <= chunk * batch <= 5000
        ]
        tried = {}
        for chunk, batch in ways:
            straightforward(model, x[:100], 50, chunk, batch)
            start = time.perf_counter()
            straightforward(model, x, 50, chunk, batch)
            tried[f"{chunk} samples of {batch} images"] = time.perf_counter() - start
        chunk, batch = ways[min(range(len(ways)), key=lambda i: list(tried.values())[i])]
        found = in_turns(
            {
                "aevb": lambda: (aevb.log_marginal_likelihood(model, x, few).log_prob,),
                "eager": lambda: (straightforward(model, x, few, chunk, batch),),
            },
            rounds,
        )
    code = "import sys; from benchmarks.many_samples import alone; alone(*sys.argv[1:])"
    args = [sys.executable, "-c", code, *([run] if run else [])]
    seconds, peak = map(float, subprocess.run(args, check=True, capture_output=True, text=True).stdout.split())
    return {
        "seconds": seconds,
        "peak_megabytes": peak,
        "providers": found,
        "peer": f"{chunk} samples of {batch} images at a time",
        "tried": tried,
        "ratio": ratio(found, "aevb", "eager"),
    }


# ---- the report -----------------------------------------------------------------------------------------------------


def table(results: Mapping) -> str:
    def verdict(reached: float, target: float, less: bool = False) -> str:
        met = reached <= target if less else reached >= target
        return f"{target:g}{'' if less else 'x'}: {'met' if met else 'missed'}"

    lines = ["| 50 samples of 1,000, 500 -> 784 | time | against eager | against unfused | memory beside gradients |"]
    lines.append("|---|--:|--:|--:|--:|")
    for title, key, prefix in (("mean", "means", ""), ("importance-weighted bound", "bounds", "iwae, ")):
        found = results[key]
        for name, times in found.items():
            cells = [duration(times["median"])]
            for peer in ("eager", "unfused, fastest product"):
                r = ratio(found, name, peer)
                target = ROWS_TARGETS.get((name, peer)) if key == "means" else None
                text = "" if peer == name else f"{r['median']:.2f}x ({r['q1']:.2f} - {r['q3']:.2f})"
                cells.append(text + (f" {verdict(r['median'], target)}" if target else ""))
            megabytes = results["memory"].get(prefix + name)
            ours = name in ("known gradient", "any gradient", "one pass")
            held = f" {verdict(megabytes, MEMORY_TARGET, less=True)}" if ours else ""
            cells.append("" if megabytes is None else f"{megabytes:.0f} MB{held}")
            lines.append(f"| {title}: {name} | {' | '.join(cells)} |")
    small = results["small"]
    cost = 1 / ratio(small, "known gradient", "unfused, fastest product")["median"]
    any_cost = 1 / ratio(small, "any gradient", "unfused, fastest product")["median"]
    e = results["evaluation"]
    lines += [
        "",
        f"100 rows: {duration(small['known gradient']['median'])}, {cost:.2f} times the unfused op's time "
        f"({verdict(cost, SMALL_TARGET, less=True)}); any gradient {any_cost:.2f} times.",
        f"log p(x), 1,000 images, 5,000 samples, 784-500-20: {e['seconds']:.1f} s "
        f"({verdict(e['seconds'], EVALUATION_TARGETS['seconds'], less=True)}), {e['peak_megabytes']:.0f} MB at "
        f"the peak ({verdict(e['peak_megabytes'], EVALUATION_TARGETS['megabytes'], less=True)}); "
        f"{e['ratio']['median']:.2f}x ({e['ratio']['q1']:.2f} - {e['ratio']['q3']:.2f}) the speed of the loop in plain "
        f"PyTorch ({e['peer']}; {verdict(e['ratio']['median'], EVALUATION_TARGETS['ratio'])}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_samples", description="Time and memory.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--run", help="a run of `aevb train` on MNIST: log p(x) of its model, else of one untrained")
    parser.add_argument(
        "--output", type=Path, help="the JSON (default: benchmarks/results/<machine>-many-samples.json)"
    )
    options = parser.parse_args()
    torch.set_num_threads(cases.THREADS)
    results: dict = {**describe(), "unit": "seconds"}
    if results["load"] > 0.5:
        print(f"The load is {results['load']:.1f}: other work is running, and the figures will not be worth keeping.")
    results["memory"] = memory()
    results["means"] = rows_table(MEANS, 50, 1000, options.rounds)
    results["bounds"] = rows_table(BOUNDS, 50, 1000, options.rounds)
    results["small"] = rows_table(MEANS, 1, 100, 300)
    results["evaluation"] = evaluation(options.rounds, options.run)
    file = options.output or RESULTS / f"{results['machine']}-many-samples.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}\n\nwritten to {file}")


if __name__ == "__main__":
    main()
