"""Some of tests/kernel_cases.py on CUDA, every op among them: the bits are the CPU's.

Nothing runs on the GPU but the ops, so that compute-sanitizer, which is slow, looks at them alone:

    compute-sanitizer --tool memcheck python tests/cuda_small_case.py --every 40
"""

import argparse
import sys
from collections import Counter

import torch
from conftest import HAS_CUDA, same_bits
from kernel_cases import Case, cases

import aevb  # noqa: F401  registers the ops


def results(case: Case) -> list[torch.Tensor]:
    found = getattr(torch.ops.aevb, case.op).default(*case.args)
    return [t.cpu() for t in (found if isinstance(found, tuple) else (found,))]


def differs(case: Case, device: str) -> bool:
    """True unless the results on the device have the bits of the CPU's."""
    return not all(map(same_bits, results(case.on(device)), results(case)))


def some(every: int) -> list[Case]:
    """Every so manieth call of each op."""
    count: Counter[str] = Counter()
    chosen = []
    for case in cases():
        if count[case.op] % every == 0:
            chosen.append(case)
        count[case.op] += 1
    return chosen


def main(device: str, every: int) -> int:
    chosen = some(every)
    wrong = [str(case) for case in chosen if differs(case, device)]
    print("\n".join(wrong))
    print(f"{len(chosen)} calls on {device}, {len(wrong)} with other bits than the CPU's")
    return bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Some calls of every kernel: the CPU's bits.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this without a GPU")
    parser.add_argument("--every", type=int, default=11, help="every so manieth call of each op")
    options = parser.parse_args()
    if options.device == "cuda" and not HAS_CUDA:
        parser.error("this needs an NVIDIA GPU and CUDA kernels; --device cpu tries it without")
    sys.exit(main(options.device, options.every))
