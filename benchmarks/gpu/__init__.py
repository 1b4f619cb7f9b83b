"""`python -m benchmarks.gpu`: the kernels on a GPU, as a fraction of its copy bandwidth and beside their peers.

How it measures:

* The ceiling is the bandwidth of device-to-device copies of a large tensor, bytes read plus bytes written, in this run.
* An op's time (`ops.py`) is that of a CUDA graph that holds one call for each of several sets of tensors, by CUDA
  events, divided by the number of calls. So nobody's time contains what Python and launching cost, and small tensors do
  not come from the L2 cache: the sets together are CACHE_MULTIPLE times as large as it. Results are kept until the
  capture ends, so that each call writes memory of its own.
* A small op (`small.py`) and a training step (`steps.py`) are timed as a person runs them, from Python: many calls
  between two looks at the clock, the GPU idle at both.
* Providers take turns; ratios are those of the medians. Before anything is timed, it is compared with `aevb.reference`
  in float64, over all elements; a step's loss after some steps with plain PyTorch's. A provider that is off is marked,
  and not timed.
* What would not fit into the time (`--seconds`) or the memory is skipped, and listed.

`--device cpu` is a dry run: the same code on CPU tensors, timed by the clock, without graphs. Its figures mean nothing.
"""
