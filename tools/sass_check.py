# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels, reads their machine code, and fails on what must not be in it. No GPU is needed.

    python tools/sass_check.py [FILE.cu ...] [--archs 80 90 100]

Fails on: a warning of nvcc, a spill, local memory; float64, but for the kernels of FLOAT64; a call, which is the slow
path of a division or root, or a function that was not inlined; and a kernel of WIDE without accesses so wide. How fast
kernels are, only a GPU says: tools/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
READ, COMPILED = ("80", "90", "100"), ("75", "86", "89", "120")  # architectures: the others are only compiled
# As in tools/cuda_toolkit.py, and strict.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage"]

FORBIDDEN = {
    "local memory": re.compile(r"(LDL|STL)\b"),
    "float64": re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\.(\w+\.)*F64\b|F2F\.F64"),
    # ptxas leaves some loops by CALL to a label, and calls for a shuffle of threads that may have diverged.
    "a call": re.compile(r"CALL\b(?!.*(`\(\.L_|__cuda_sm70_\w*sync))"),
}
FLOAT64 = re.compile(r"activation_gradients<|join_row_blocks")  # they join some sums of float32
# The bytes of the widest reads or writes that a kernel must have, by its name as c++filt has it.
WIDE = {
    r"gaussian_(tile|gradient)<.*, true(, false)?>": 16,
    r"log_ratio_(tile|gradient)<.*, true(, false)?>": 16,
    r"log_prob_(rows|gradient\w*)<.*\b(4|8), ": 16,
    r"log_prob_(rows|gradient\w*)<.*\b2, float": 8,
    r"normal_runs|binarize_pixels<true>|sum_of_pieces<.*, 4>|split_rows<float|adam_step": 16,
}
ACCESS = re.compile(r"(?:LDG|STG)\.E(?:\.\w+)*?\.(64|128|256)\b")


def find_tools() -> tuple[str, str]:
    """nvcc and nvdisasm. Raises FileNotFoundError, with a sentence, where one is missing."""
    nvcc = next(iter(cuda_toolkit.candidates()), None)
    if not nvcc:
        raise FileNotFoundError("nvcc is missing: put it on PATH, or set CUDA_HOME.")
    places = [Path(folder) / "nvidia/cu13/bin/nvdisasm" for folder in cuda_toolkit.site_folders()]
    found = next((str(place) for place in places if place.is_file()), None) or shutil.which("nvdisasm")
    if not found:
        raise FileNotFoundError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm.")
    if not shutil.which("c++filt"):
        raise FileNotFoundError("c++filt is missing: it comes with binutils.")
    return nvcc, found


def kernels(cubin: Path, nvdisasm: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the instructions of each kernel."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", text, flags=re.MULTILINE)[1:]
    names = subprocess.run(["c++filt"], input="\n".join(sections[::2]), capture_output=True, text=True, check=True)
    for name, code in zip(names.stdout.splitlines(), sections[1::2], strict=True):
        short = re.sub(r"aevb::|cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)
        yield short.split("(")[0].removeprefix("void "), re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)


def faults(name: str, code: Sequence[str]) -> Iterator[str]:
    """What is wrong with a kernel."""
    plain = [re.sub(r"^@!?U?P\w+ ", "", instruction).strip() for instruction in code]
    for what, pattern in FORBIDDEN.items():
        found = next((i for i in plain if pattern.match(i)), None)
        if found and not (what == "float64" and FLOAT64.match(name)):
            yield f"{name} has {what}: {found}"
    widest = max((int(match[1]) // 8 for match in map(ACCESS.match, plain) if match), default=4)
    for pattern, wanted in WIDE.items():
        if re.match(pattern, name) and widest < wanted:
            yield f"{name} has no accesses of {wanted} bytes, only of {widest}"


def check(source: Path, arch: str, folder: Path) -> tuple[int, list[str]]:
    """The number of kernels that were read, and what is wrong."""
    nvcc, nvdisasm = find_tools()
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    text, where = done.stdout + done.stderr, f"{source.name} sm_{arch}: "
    if done.returncode or re.search(r"\bwarning\b", text):
        lines = [line for line in text.splitlines() if re.search(r"\b(warning|error|fatal)\b", line)]
        return 0, [where + line for line in lines or [f"nvcc failed: {text[-300:]}"]]
    if arch not in READ:
        return 0, []
    read = list(kernels(cubin, nvdisasm))
    return len(read), [where + fault for name, code in read for fault in faults(name, code)]


def check_all(sources: Sequence[Path], archs: Sequence[str] = READ + COMPILED, jobs: int = 2) -> tuple[int, list[str]]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(check, source, arch, Path(folder)) for arch in archs for source in sources]
        found = [task.result() for task in tasks]
    return sum(count for count, _ in found), [fault for _, some in found for fault in some]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources; all of csrc/cuda by default")
    parser.add_argument("--archs", nargs="+", default=READ + COMPILED, help="by default seven, three of them read")
    options = parser.parse_args()
    sources = options.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        count, found = check_all(sources, options.archs)
    except FileNotFoundError as error:
        sys.exit(f"sass_check: {error}")
    print(*(f"FAILED {fault}" for fault in found), sep="\n")
    print(f"{len(sources)} sources, {count} kernels read, {len(found)} failures.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
