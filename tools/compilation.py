"""Compiles the CUDA files that changed, several at once, and says how far it is; the C++ files are ninja's.

Environment: MAX_JOBS.
"""

import concurrent.futures
import contextlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

# Seconds of one core of a machine of 2021, where they are more than a few; of a CUDA file for each architecture.
SECONDS = {
    "csrc/cpu/isa_avx512.cpp": 44,
    "csrc/cpu/isa_avx2.cpp": 46,
    "csrc/bindings.cpp": 14,
    "csrc/cpu/isa_plain.cpp": 16,
    "csrc/cpu/ops.cpp": 7,
    "csrc/cuda/ops.cpp": 7,
    "csrc/cpu/layers.cpp": 4,
}
USUAL_SECONDS = 2


def stop(sentence):
    sys.exit(f"\naevb: {sentence}\n")


def run(command):
    """The exit status, and what was printed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as e:
        return 1, str(e)
    return done.returncode, done.stdout


def max_jobs():
    """How many compilers at once."""
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdigit() and int(text) else len(os.sched_getaffinity(0))


under_pip = False  # which keeps to itself what a build prints, and says "still running"


def say(text):
    """Prints a line; under pip also to the terminal, where there is one."""
    print(f"aevb: {text}", flush=True)
    if under_pip and not os.environ.get("PIP_QUIET"):
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\r\033[Kaevb: {text}\n")  # over what pip has begun of a line


@dataclass(frozen=True)
class Job:
    """A source to be compiled by `command`, which writes `target` and, as make has it, `target`.d."""

    source: str
    target: str
    command: tuple
    seconds: float
    compiler: str = ""  # its version

    def record(self):
        """What `target` depends on beside files; nothing of where the sources are, which may be a copy."""
        return f"{self.compiler}: {shlex.join(self.command)}".replace(os.getcwd(), ".")

    def is_done(self):
        """Whether `target` was made by this command, from files that have not changed since."""
        try:
            built = os.path.getmtime(self.target)
            with open(self.target + ".command") as file:
                same = file.read() == self.record()
            with open(self.target + ".d") as file:
                files = shlex.split(file.read().replace("\\\n", " ").split(": ", 1)[1])
            return same and all(os.path.getmtime(name) <= built for name in files)
        except (OSError, IndexError):
            return False

    def run(self, *options):
        """The exit status, and what the compiler printed."""
        os.makedirs(os.path.dirname(self.target), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.target + ".command")  # a compiler that is interrupted leaves half an object
        status, output = run([*self.command, *options])
        if not status:
            with open(self.target + ".command", "w") as file:
                file.write(self.record())
        return status, output


def duration(seconds):
    return f"{round(seconds, -1) or 10:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def say_cost(sources):
    """That these C++ files are compiled now, by ninja, which takes those that changed; and how long all would take."""
    seconds = [SECONDS.get(source, USUAL_SECONDS) for source in sources]
    expected = max(sum(seconds) / max_jobs(), *seconds)
    say(f"compiling {len(sources)} C++ files, {max_jobs()} at once; about {duration(expected)} on a quiet machine")


def compile_all(jobs, processes):
    """Compiles what is not done, the longest first, and gives the objects."""
    todo = sorted((job for job in jobs if not job.is_done()), key=lambda job: -job.seconds)
    if todo:
        expected = max(sum(job.seconds for job in todo) / processes, todo[0].seconds)
        of = "" if len(todo) == len(jobs) else f" of {len(jobs)}"
        at_once = f", {processes} at once" if processes > 1 else ""
        say(f"compiling {len(todo)}{of} files{at_once}; about {duration(expected)} on a quiet machine")
    # The last to be run would leave cores without work: nvcc takes several for its architectures.
    threads = str(max(1, processes // max(1, len(todo))))
    start, done, failed = time.monotonic(), 0, []

    def compile_one(job):
        return job, job.run("--threads", threads)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for future in concurrent.futures.as_completed([pool.submit(compile_one, job) for job in todo]):
            job, (status, output) = future.result()
            done += 1
            outcome = " FAILED" if status else ""
            say(f"[{done}/{len(todo)}] {job.source}{outcome}, after {time.monotonic() - start:.0f} s")
            if status:
                print(shlex.join(job.command), flush=True)
                failed.append(job)
                pool.shutdown(wait=False, cancel_futures=True)
            print(output, end="", flush=True)
            if failed:
                break
    if failed:
        stop(
            f"the compiler fails on {failed[0].source}, as it says above. AEVB_CUDA=0 builds without the CUDA kernels."
        )
    return [job.target for job in jobs]
