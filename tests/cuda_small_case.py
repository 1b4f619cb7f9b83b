"""Some of tests/kernel_cases.py on CUDA, every op among them: the bits are the CPU's.

Nothing runs on the GPU but the ops, so that compute-sanitizer, which is slow, looks at them alone:

    compute-sanitizer --tool memcheck python tests/cuda_small_case.py
"""

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


def some() -> list[Case]:
    """Every eleventh call of each op."""
    count: Counter[str] = Counter()
    chosen = []
    for case in cases():
        if count[case.op] % 11 == 0:
            chosen.append(case)
        count[case.op] += 1
    return chosen


def main(device: str) -> int:
    chosen = some()
    wrong = [str(case) for case in chosen if differs(case, device)]
    print("\n".join(wrong))
    print(f"{len(chosen)} calls on {device}, {len(wrong)} with other bits than the CPU's")
    return bool(wrong)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["cpu"]):
        sys.exit("usage: cuda_small_case.py [cpu]")
    if not sys.argv[1:] and not HAS_CUDA:
        sys.exit("cuda_small_case.py needs an NVIDIA GPU and CUDA kernels; `cuda_small_case.py cpu` tries it without")
    sys.exit(main(*(sys.argv[1:] or ["cuda"])))
