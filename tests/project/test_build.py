"""What the build decides: whether there are CUDA kernels, by which nvcc, for which GPUs, and what pip is asked for;
and what is compiled again. No compiler runs: an nvcc here is a shell script, and torch an empty folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aevb import _C

TOOLS = str(Path(__file__).parents[2] / "tools")
ALL = "75 80 86 87 89 90 100 120"

NVCC = """#!/bin/sh
echo "$@" >> '{root}/calls'
case "$1" in
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88'; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' {architectures}; exit ;;
  --dryrun) echo '#$ TOP={root}/bin/..' >&2; exit ;;
esac
case "$*" in *{fails_on}*) echo 'error: no such thing'; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case "$1" in -c) source=$2 ;; -o) target=$2 ;; -MF) rule=$2 ;; esac
  shift
done
echo machine code > "$target"
if [ "$rule" ]; then printf '%s : %s \\\\\\n  header.cuh\\n' "$target" "$source" > "$rule"; fi
"""


def put_toolkit(root, version="13.0", architectures=ALL, fails_on="nothing.cu"):
    """A CUDA toolkit in `root`; gives its nvcc."""
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "lib" / "libcudart_static.a").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(root=root, version=version, architectures=architectures, fails_on=fails_on))
    nvcc.chmod(0o755)
    return nvcc


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def put_torch(site, version="2.13.0", cuda="13.0"):
    """A torch of that version and CUDA version, or None, in the folder `site`; gives its own folder."""
    (site / "torch" / "include").mkdir(parents=True)
    (site / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip = None\n"
    )
    (site / f"torch-{version}.dist-info").mkdir()
    (site / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return str(site / "torch")


def put_gpus(folder, monkeypatch, *capabilities):
    """An nvidia-smi that names these GPUs, on PATH."""
    folder.mkdir(exist_ok=True)
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '" + "".join(f"{c}\\n" for c in capabilities) + "'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def torch(tmp_path):
    """The folder of a torch for CUDA 13."""
    return put_torch(tmp_path / "torch_for_cuda")


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """tools/cuda_toolkit.py on a machine without CUDA, whose site-packages are tmp_path / "site"."""
    monkeypatch.syspath_prepend(TOOLS)
    import cuda_toolkit

    for name in ("AEVB_CUDA", "AEVB_CUDA_ARCHS", "AEVB_SANITIZE", "CUDA_HOME", "CUDA_PATH", "CXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "LAST_GUESS", str(tmp_path / "usual" / "bin" / "nvcc"))
    monkeypatch.setattr(cuda_toolkit, "site_folders", lambda: [str(tmp_path / "site")])
    monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: None)
    monkeypatch.setattr(cuda_toolkit.ctypes, "CDLL", no_library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(shutil, "which", lambda name, which=shutil.which: None if name == "nvcc" else which(name))
    return cuda_toolkit


@pytest.fixture
def on_path(monkeypatch):
    """Puts an nvcc on PATH."""
    return lambda nvcc: monkeypatch.setattr(shutil, "which", lambda name: str(nvcc))


def test_search_order(toolkit, monkeypatch, tmp_path, on_path):
    assert toolkit.find() == (None, "no nvcc found")
    expected = [put_toolkit(tmp_path / "usual")]
    expected.insert(0, put_toolkit(tmp_path / "site" / "nvidia" / "cu13"))
    expected.insert(0, put_toolkit(tmp_path / "path"))
    on_path(expected[0])
    assert toolkit.candidates() == [str(nvcc) for nvcc in expected]
    assert toolkit.find()[0].nvcc == str(expected[0])

    for name in ("CUDA_PATH", "CUDA_HOME"):
        home = put_toolkit(tmp_path / name)
        monkeypatch.setenv(name, str(tmp_path / name))
        assert toolkit.candidates() == [str(home), str(expected[1])]


def test_a_cuda_home_without_nvcc_hides_the_toolkits_of_the_machine(toolkit, torch, monkeypatch, tmp_path, on_path):
    on_path(put_toolkit(tmp_path / "path"))
    put_toolkit(tmp_path / "usual")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert toolkit.decide(False, torch) == (None, "not built (no nvcc found in CUDA_HOME)")
    nvcc = put_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    assert toolkit.find()[0].nvcc == str(nvcc)


def test_nvcc_says_where_its_toolkit_is(toolkit, tmp_path, on_path):
    """A script in another folder that calls nvcc."""
    nvcc = put_toolkit(tmp_path / "cuda")
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    on_path(script)
    found, _ = toolkit.find()
    assert (found.nvcc, found.runtime) == (str(script), str(tmp_path / "cuda" / "lib"))
    (tmp_path / "cuda" / "lib" / "libcudart_static.a").unlink()
    assert toolkit.find() == (None, "nvcc 13.0 has no libcudart_static.a")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"version": "11.8"}, "nvcc 11.8 is older than 12.0"),
        ({"fails_on": "empty.cu"}, "nvcc 13.0 cannot compile an empty kernel"),
        ({"architectures": ""}, "nvcc 13.0 --list-gpu-arch fails"),
        ({"version": "?"}, "nvcc --version fails"),
    ],
)
def test_an_nvcc_that_does_not_work_is_passed_over(toolkit, torch, monkeypatch, tmp_path, on_path, what, reason):
    bad = put_toolkit(tmp_path / "path", **what)
    on_path(bad)
    assert toolkit.decide(False, torch) == (None, f"not built ({reason})")
    monkeypatch.setenv("AEVB_CUDA", "1")
    with pytest.raises(SystemExit, match=f"cannot be built: {reason.replace('?', '.')}"):
        toolkit.decide(False, torch)
    good = put_toolkit(tmp_path / "usual")
    assert toolkit.find()[0].nvcc == str(good)


def test_what_nvcc_printed_is_shown(toolkit, tmp_path, on_path, capsys):
    on_path(put_toolkit(tmp_path / "path", fails_on="empty.cu"))
    toolkit.find()
    assert "error: no such thing" in capsys.readouterr().out


def test_kernels_that_the_driver_could_not_run_are_not_built(toolkit, torch, monkeypatch, tmp_path):
    """Unless they are asked for: torch then goes on with the reference, and nothing fails."""
    put_toolkit(tmp_path / "usual")
    monkeypatch.setattr(toolkit, "driver_version", lambda: (12, 4))
    assert toolkit.decide(False, torch) == (None, "not built (nvcc is 13.0, and the GPU's driver is for CUDA 12.4)")
    monkeypatch.setenv("AEVB_CUDA", "1")
    assert toolkit.decide(False, torch)[1].startswith("built for sm_75")
    monkeypatch.delenv("AEVB_CUDA")
    monkeypatch.setattr(toolkit, "driver_version", lambda: (13, 0))
    assert toolkit.decide(False, torch)[1].startswith("built for sm_75")


def test_switch(toolkit, torch, monkeypatch, tmp_path):
    put_toolkit(tmp_path / "usual")
    decision = "built for sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 by nvcc 13.0"
    for value, expected in [("", decision), ("1", decision), ("0", "not built (AEVB_CUDA=0)")]:
        monkeypatch.setenv("AEVB_CUDA", value)
        assert toolkit.decide(False, torch)[1] == expected
    monkeypatch.setenv("AEVB_CUDA", "yes")
    with pytest.raises(SystemExit, match="AEVB_CUDA is 'yes'; it takes 0"):
        toolkit.decide(False, torch)


def test_no_path_of_the_machine_in_the_decision(toolkit, torch, monkeypatch, tmp_path, on_path):
    """It is compiled into the binary."""
    on_path(put_toolkit(tmp_path / "path", fails_on="empty.cu"))
    assert "/" not in toolkit.decide(False, torch)[1]
    put_toolkit(tmp_path / "usual")
    assert "/" not in toolkit.decide(False, torch)[1]


def architectures(toolkit, monkeypatch, text, known=ALL, this_machine=False):
    monkeypatch.setenv("AEVB_CUDA_ARCHS", text)
    return toolkit.choose_architectures(toolkit.Toolkit("nvcc", "13.0", tuple(known.split()), "lib"), this_machine)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "75 80 86 89 90 100 120"),
        (" ; ", "75 80 86 89 90 100 120"),
        ("90", "90"),
        ("100;90", "90 100"),
        ("80, 90 87;80", "80 87 90"),
        ("all", "75 80 86 89 90 100 120"),
    ],
)
def test_architectures(toolkit, monkeypatch, tmp_path, text, expected):
    assert architectures(toolkit, monkeypatch, text) == (expected.split(), False)
    put_gpus(tmp_path / "smi", monkeypatch, "8.9")
    assert architectures(toolkit, monkeypatch, text) == (expected.split(), False)
    native = (["89"], True) if text in ("", " ; ") else (expected.split(), False)
    assert architectures(toolkit, monkeypatch, text, this_machine=True) == native


@pytest.mark.parametrize("text", ["91", "sm_90", "9.0", "90;all"])
def test_wrong_architectures(toolkit, monkeypatch, text):
    with pytest.raises(
        SystemExit, match=r"AEVB_CUDA_ARCHS is '.*does not compile for '.*': it takes .* of 75 80 86 87"
    ):
        architectures(toolkit, monkeypatch, text)


def test_native_architectures(toolkit, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no GPU is to be seen here"):
        architectures(toolkit, monkeypatch, "native")
    put_gpus(tmp_path / "smi", monkeypatch, "9.0", "8.0", "9.0")
    assert architectures(toolkit, monkeypatch, "native") == (["80", "90"], True)
    with pytest.raises(SystemExit, match="does not compile for '80'"):
        architectures(toolkit, monkeypatch, "native", known="90")


@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        (["8.9"], ALL, ["89"]),
        (["8.7", "12.0"], ALL, ["87", "120"]),
        ([], ALL, ALL.replace("87 ", "").split()),
        (["7.0"], "70 " + ALL, ALL.replace("87 ", "").split()),  # older than the kernels are for
        (["12.1"], ALL, ALL.replace("87 ", "").split()),  # one that nvcc does not know takes the PTX
        (["8.9", "12.1"], ALL, ALL.replace("87 ", "").split()),
    ],
)
def test_the_gpus_that_are_here(toolkit, monkeypatch, tmp_path, gpus, known, expected):
    if gpus:
        put_gpus(tmp_path / "smi", monkeypatch, *gpus)
    found = architectures(toolkit, monkeypatch, "", known, this_machine=True)
    assert found == (expected, expected != ALL.replace("87 ", "").split())


class Driver:
    """libcuda.so.1 of a machine with these GPUs; of status, what cuInit gives."""

    def __init__(self, *capabilities, status=0):
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device][(75, 76).index(attribute)]
        return 0


def test_the_driver_says_which_gpus_are_visible(toolkit, monkeypatch, tmp_path):
    """It heeds CUDA_VISIBLE_DEVICES; nvidia-smi does not, and is asked only where the driver cannot be."""
    put_gpus(tmp_path / "smi", monkeypatch, "7.5")
    assert toolkit.visible_gpus() == ["75"]
    monkeypatch.setattr(toolkit.ctypes, "CDLL", lambda name: Driver((12, 0), (9, 0), (9, 0)))
    assert toolkit.visible_gpus() == ["90", "120"]
    monkeypatch.setattr(toolkit.ctypes, "CDLL", lambda name: Driver())
    assert toolkit.visible_gpus() == []
    monkeypatch.setattr(toolkit.ctypes, "CDLL", lambda name: Driver(status=3))
    assert toolkit.visible_gpus() == ["75"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert toolkit.visible_gpus() == []


SEVEN = "built for sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 by nvcc 13.0"


@pytest.mark.parametrize(
    ("cuda", "gpus", "switch", "this_machine", "expected"),
    [
        (None, [], "", True, "not built (torch was a build without CUDA; AEVB_CUDA=1 builds them all the same)"),
        (None, ["8.9"], "", True, "not built (torch was a build without CUDA; AEVB_CUDA=1 builds them all the same)"),
        (None, [], "", False, "not built (torch was a build without CUDA; AEVB_CUDA=1 builds them all the same)"),
        (None, [], "1", True, SEVEN),
        (None, ["8.9"], "1", False, SEVEN),
        (None, ["8.9"], "1", True, "built for sm_89, found here, by nvcc 13.0"),
        ("13.0", ["8.9"], "", True, "built for sm_89, found here, by nvcc 13.0"),
        ("12.8", ["8.9", "7.5"], "", True, "built for sm_75 sm_89, found here, by nvcc 13.0"),
        ("13.0", ["8.9"], "", False, SEVEN),
        ("13.0", [], "", True, SEVEN),
        ("13.0", ["8.9"], "0", True, "not built (AEVB_CUDA=0)"),
    ],
)
def test_what_is_built(toolkit, monkeypatch, tmp_path, cuda, gpus, switch, this_machine, expected):
    put_toolkit(tmp_path / "usual")
    torch = put_torch(tmp_path / "site", cuda=cuda)
    put_gpus(tmp_path / "smi", monkeypatch, *gpus)
    monkeypatch.setenv("AEVB_CUDA", switch)
    kernels, decision = toolkit.decide(False, torch, this_machine)
    assert decision == expected
    assert bool(kernels) == expected.startswith("built")
    if kernels and gpus and "found here" in expected:  # with PTX of the newest, for a GPU that comes later
        newest = kernels.architectures[-1]
        assert f"-gencode=arch=compute_{newest},code=compute_{newest}" in kernels.command("a.cu", "a.o")


def test_a_torch_of_debian_has_no_cuda(toolkit, tmp_path):
    """One whose version.py names none."""
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\n")
    assert toolkit.torch_cuda(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("arguments", "parent", "expected"),
    [
        (["bdist_wheel"], ["pip", "install", "."], True),
        (["bdist_wheel"], ["uv", "sync"], True),
        (["bdist_wheel"], ["pip", "wheel", "."], False),
        (["bdist_wheel"], ["python", "-m", "build"], False),
        (["bdist_wheel"], ["bash"], False),
        (["build_ext", "--inplace"], ["bash"], True),
        (["editable_wheel"], ["pip", "wheel", "."], True),
    ],
)
def test_a_wheel_by_itself_is_for_other_machines(toolkit, tmp_path, arguments, parent, expected):
    """As the process above says; here a shell under that name."""
    program = f"import sys; sys.path.insert(0, {TOOLS!r}); import cuda_toolkit"
    program += f"; print(cuda_toolkit.is_for_this_machine({arguments}))"
    script = '"$PYTHON" -c "$PROGRAM"; exit $?'  # two commands, or the shell would make way for the first
    done = subprocess.run(
        ["/bin/sh", "-c", script, *parent],
        env={"PYTHON": sys.executable, "PROGRAM": program, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(expected)], done.stderr


def test_an_older_nvcc_leaves_out_what_it_does_not_know(toolkit, torch, tmp_path, on_path):
    on_path(put_toolkit(tmp_path / "path", version="12.4", architectures="70 75 80 86 87 89 90"))
    kernels, decision = toolkit.decide(False, torch)
    assert kernels.architectures == ["75", "80", "86", "89", "90"]
    assert decision == "built for sm_75 sm_80 sm_86 sm_89 sm_90 by nvcc 12.4, which is too old for sm_100 sm_120"


@pytest.mark.parametrize(
    ("machine_code", "ptx"),
    [("75 80 86 89 90 100 120", "90 120"), ("75 80 86 89 90", "90"), ("80", "80"), ("90 100", "90 100")],
)
def test_ptx(toolkit, machine_code, ptx):
    expected = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in machine_code.split()]
    expected += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx.split()]
    assert toolkit.architecture_flags(machine_code.split()) == expected


@pytest.mark.parametrize(
    ("cxx", "ccbin", "expected"),
    [
        (None, None, ["-ccbin", "c++"]),
        ("g++-12 -m64", None, ["-ccbin", "g++-12"]),
        ("/usr/bin/ccache g++", None, ["-ccbin", "g++"]),
        ("g++", "g++-11", []),
    ],
)
def test_the_kernels_have_the_compiler_of_the_rest(toolkit, monkeypatch, cxx, ccbin, expected):
    for name, value in [("CXX", cxx), ("NVCC_CCBIN", ccbin)]:
        if value:
            monkeypatch.setenv(name, value)
    command = toolkit.Toolkit("nvcc", "13.0", ("90",), "lib").compile_command("-O3")
    assert command == ["nvcc", "-std=c++17", *expected, "-O3"]


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """The sources of two kernels, in the current folder."""
    (tmp_path / "tree").mkdir()
    monkeypatch.chdir(tmp_path / "tree")
    for name in ("a.cu", "b.cu", "header.cuh"):
        Path(name).touch()
    return ["a.cu", "b.cu"]


def test_only_what_changed_is_compiled(toolkit, torch, monkeypatch, tmp_path, on_path, tree):
    on_path(put_toolkit(tmp_path / "path"))
    calls = tmp_path / "path" / "calls"
    from compilation import compile_all

    def compiled(touched=None, jobs=2, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        kernels, _ = toolkit.decide(False, torch)
        if touched:
            Path(touched).touch()
        calls.unlink()
        objects = compile_all(kernels.jobs(tree, "objects"), jobs)
        assert objects == ["objects/a.cu.o", "objects/b.cu.o"]
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [source for source in tree if any(f"-c {source} " in line for line in lines)]

    assert compiled() == tree
    assert compiled() == []
    assert compiled(jobs=7) == []
    assert compiled(touched="b.cu") == ["b.cu"]
    assert compiled(touched="header.cuh") == tree
    assert compiled(AEVB_CUDA_ARCHS="90") == tree
    Path("objects/a.cu.o").unlink()
    assert compiled() == ["a.cu"]
    Path("objects/b.cu.o.command").unlink()  # as an interrupted nvcc leaves it
    assert compiled() == ["b.cu"]


def test_likelihoods_are_compiled_one_by_one(toolkit, torch, tmp_path, on_path, monkeypatch):
    on_path(put_toolkit(tmp_path / "path"))
    monkeypatch.chdir(Path(TOOLS).parent)
    kernels, _ = toolkit.decide(False, torch)
    jobs = kernels.jobs(["csrc/cuda/gaussian.cu", "csrc/cuda/likelihood.cu"], "objects")
    defines = [[word for word in job.command if word.startswith("-DAEVB_LIKELIHOOD")] for job in jobs]
    assert defines == [[], *([f"-DAEVB_LIKELIHOOD={name}"] for name in _C.likelihoods())]
    assert len({job.target for job in jobs}) == len(jobs)


def test_a_failing_kernel_stops_the_build(toolkit, torch, tmp_path, on_path, tree, capsys):
    on_path(put_toolkit(tmp_path / "path", fails_on="b.cu"))
    kernels, _ = toolkit.decide(False, torch)
    from compilation import compile_all

    with pytest.raises(SystemExit, match=r"fails on b.cu.*AEVB_CUDA=0 builds without the CUDA kernels"):
        compile_all(kernels.jobs(tree, "objects"), 1)
    assert "error: no such thing" in capsys.readouterr().out
    assert not Path("objects/b.cu.o.command").exists()


def test_what_is_said(toolkit, torch, tmp_path, on_path, tree, capsys):
    from compilation import compile_all

    on_path(put_toolkit(tmp_path / "path", fails_on="none"))
    kernels, _ = toolkit.decide(False, torch)
    compile_all(kernels.jobs(tree, "objects"), 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "aevb: compiling 2 files, 2 at once; about 10 s on a quiet machine"
    assert [line.split(" ")[1] for line in lines[1:]] == ["[1/2]", "[2/2]"]
    assert {line.split(" ")[2] for line in lines[1:]} == {"a.cu,", "b.cu,"}
    compile_all(kernels.jobs(tree, "objects"), 2)
    assert capsys.readouterr().out == ""
    Path("a.cu").touch()
    compile_all(kernels.jobs(tree, "objects"), 1)
    assert capsys.readouterr().out.startswith(
        "aevb: compiling 1 of 2 files; about 10 s on a quiet machine\naevb: [1/1] a.cu,"
    )


def test_a_copy_of_the_tree_takes_its_objects_along(toolkit, torch, monkeypatch, tmp_path, on_path, tree):
    from compilation import compile_all

    on_path(put_toolkit(tmp_path / "path"))
    kernels, _ = toolkit.decide(False, torch)
    compile_all(kernels.jobs(tree, "objects"), 1)
    shutil.copytree(tmp_path / "tree", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert all(job.is_done() for job in kernels.jobs(tree, "objects"))
    Path("header.cuh").touch()
    assert not any(job.is_done() for job in kernels.jobs(tree, "objects"))


def test_the_files_whose_time_is_known_are_there(toolkit):
    import compilation

    root = Path(TOOLS).parent
    assert [name for name in compilation.SECONDS if not (root / name).is_file()] == []
    assert [name for name in toolkit.SECONDS if not (root / "csrc" / "cuda" / f"{name}.cu").is_file()] == []


@pytest.fixture
def backend(toolkit, monkeypatch):
    pytest.importorskip("setuptools", minversion="64")
    import backend

    yield backend
    sys.modules.pop("backend", None)


TOOLKIT = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"
TORCH = ["torch>=2.11", "numpy"]


@pytest.mark.parametrize(
    ("torch", "cuda", "driver", "switch", "expected"),
    [
        ("2.13.0+cpu", None, None, "", []),
        ("2.13.0+cpu", None, (13, 0), "", []),
        ("2.13.0+cpu", None, (13, 0), "1", [TOOLKIT + "==13.0.*"]),
        ("2.13.0+cpu", None, None, "1", [TOOLKIT + "==13.0.*"]),
        ("2.13.0", "13.0", None, "", [TOOLKIT + "==13.0.*"]),
        ("2.15.0", "13.2", (13, 1), "1", [TOOLKIT + "==13.0.*"]),
        ("2.13.0", "13.0", (13, 0), "0", []),
        ("2.11.0", "12.8", None, "", []),
        ("2.11.0", "12.8", (12, 8), "", []),
        ("2.11.0", "12.8", (13, 0), "", [TOOLKIT + "==13.0.*"]),
        ("2.11.0", "12.8", (12, 8), "1", [TOOLKIT + "==13.0.*"]),
        ("2.10.0", "13.0", None, "", TORCH),
        (None, None, None, "", TORCH),
        (None, None, (12, 8), "", TORCH),
        (None, None, (13, 0), "", [*TORCH, TOOLKIT + ">=13,<14"]),
        (None, None, (13, 0), "0", TORCH),
        (None, None, None, "1", [*TORCH, TOOLKIT + ">=13,<14"]),
    ],
)
def test_requirements(backend, toolkit, monkeypatch, tmp_path, torch, cuda, driver, switch, expected):
    if torch:
        put_torch(tmp_path / "site", torch, cuda)
    monkeypatch.setattr(toolkit, "driver_version", lambda: driver)
    monkeypatch.setenv("AEVB_CUDA", switch)
    assert backend._requirements(["pybind11"]) == ["pybind11", *expected]


def test_no_nvcc_is_asked_for_where_one_works(backend, monkeypatch, tmp_path, on_path):
    put_torch(tmp_path / "site", "2.13.0", "13.0")
    on_path(put_toolkit(tmp_path / "path"))
    assert backend._requirements([]) == []
    on_path(put_toolkit(tmp_path / "old", version="11.8"))
    assert backend._requirements([]) == [TOOLKIT + "==13.0.*"]
    monkeypatch.setenv("AEVB_SANITIZE", "1")
    assert backend._requirements([]) == []


def test_torch_for_an_older_cuda_is_told_what_to_do(backend, tmp_path, capsys):
    put_torch(tmp_path / "site", "2.11.0", "12.8")
    assert backend._requirements([]) == []
    assert "torch is built for CUDA 12.8, for which PyPI has no nvcc" in capsys.readouterr().out


def test_every_package_is_installed():
    """Which an editable install does not tell."""
    root = Path(TOOLS).parent
    listed = re.search(r"^packages = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {path.parent for path in (root / "aevb").rglob("*") if path.suffix != ".pyc" and path.is_file()}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == {".".join(path.relative_to(root).parts) for path in folders}
