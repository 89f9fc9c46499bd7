"""nvcc's output, read without a GPU: registers, SASS and PTX of every kernel, and a module that imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyzero.ops import build_spec

ARCHS = ("80", "90", "100")
SOURCES = ("adam", "lion", "loss_scale", "pack", "reduce_scatter", "report", "unscale")
# 16-byte loads and stores of all kernels of one file and target together, at least, counted by hand: per vector two
# for each fp32 stream and one for each 16-bit one, times the vectors that a kernel names (a chunk's unrolled, and one
# of the loop for what is left). adam: 24 kernels of one vector, lion: 12; lists: 3 types x 5; reduce_scatter: 9 per
# type.
WIDE = {"adam": (176, 168), "lion": (64, 60), "unscale": (40, 20), "pack": (60, 60), "reduce_scatter": (146, 54)}


def find_nvcc() -> tuple[str, ...]:
    try:
        return build_spec.find_nvcc()
    except build_spec.ToolchainError as error:
        pytest.skip(f"no cuda compiler: {error}")


def find_cuobjdump() -> str:
    folders = [None, "/usr/local/cuda/bin"]
    try:
        import triton
    except ImportError:
        pass
    else:  # brings its own
        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    for folder in folders:
        if found := shutil.which("cuobjdump", path=folder):
            return found
    pytest.skip("no cuobjdump, on PATH, in the cuda toolkit or in triton")


@dataclass(frozen=True)
class Built:
    """The product's own build for all of ARCHS."""

    spec: build_spec.Spec
    hashes: tuple[str, str]
    folder: Path
    module: Path

    def dump(self, what: str, source: str) -> str:
        command = [find_cuobjdump(), what, str(self.folder / f"cuda-{source}.cu.o")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("cuda")
    spec = build_spec.cuda_spec(find_nvcc(), ARCHS, Path(shutil.copytree(build_spec.CSRC, root / "csrc")))
    built = Built(
        spec, (spec.build_hash(), spec.source_hash()), root / "build", root / f"_native_cuda{build_spec.EXT_SUFFIX}"
    )
    spec.build(built.folder, built.module)
    return built


def memory_faults(usage: str) -> list[str]:
    """Kernels that keep something in local memory, by cuobjdump's resource usage: a spill needs a stack frame."""
    return re.findall(r"(?:STACK|LOCAL):[1-9]\d*", usage)


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(built: Built, source: str) -> None:
    usage = built.dump("--dump-resource-usage", source)
    assert {f"sm_{arch}" for arch in ARCHS} <= set(re.findall(r"sm_\d+", usage))
    assert "REG:" in usage and memory_faults(usage) == []


def compile_changed(tmp_path: Path, source: str, header: str, good: str, bad: str) -> str:
    """An sm_90 cubin of one .cu, in a copy of csrc where `good` became `bad`."""
    csrc = Path(shutil.copytree(build_spec.CSRC, tmp_path / "csrc"))
    text = (csrc / "cuda" / header).read_text()
    assert text.count(good) == 1, f"{good!r} is no longer in {header} exactly once"
    (csrc / "cuda" / header).write_text(text.replace(good, bad))
    cubin = str(tmp_path / "changed.cubin")
    command = [*find_nvcc(), "-O3", "-std=c++17", "--fmad=false", f"-I{csrc}", "-arch=sm_90", "-cubin", "-o", cubin]
    subprocess.run([*command, str(csrc / "cuda" / source)], check=True, capture_output=True)
    return cubin


def test_a_spill_is_noticed(tmp_path: Path) -> None:
    cubin = compile_changed(tmp_path, "pack.cu", "grid.h", "kMinBlocks = 3", "kMinBlocks = 8")
    command = [find_cuobjdump(), "--dump-resource-usage", cubin]
    assert memory_faults(subprocess.run(command, capture_output=True, text=True, check=True).stdout) != []


def width_faults(sass: str, num_loads: int, num_stores: int) -> list[str]:
    """What keeps main loops from being 16 bytes wide, by the SASS of one target."""
    loads = len(re.findall(r"\bLDG\.E\S*128", sass))
    stores = len(re.findall(r"\bSTG\.E\S*128", sass))
    faults = re.findall(r"\b(?:LDL|STL)\S*", sass)
    if loads < num_loads:
        faults.append(f"{loads} 16-byte loads")
    if stores < num_stores:
        faults.append(f"{stores} 16-byte stores")
    return faults


@pytest.mark.parametrize("source", list(WIDE))
def test_main_loops_move_16_bytes(built: Built, source: str) -> None:
    _, *targets = re.split(r"^arch = ", built.dump("--dump-sass", source), flags=re.MULTILINE)
    listings = {sass.split()[0]: sass for sass in targets}
    assert set(listings) == {f"sm_{arch}" for arch in ARCHS}
    assert {arch: width_faults(sass, *WIDE[source]) for arch, sass in listings.items()} == dict.fromkeys(listings, [])


def test_narrow_code_is_noticed(tmp_path: Path) -> None:
    # The plain store that the PTX one took the place of.
    cubin = compile_changed(tmp_path, "unscale.cu", "stream.cuh", "#if defined(__CUDA_ARCH__)", "#if 0")
    sass = subprocess.run([find_cuobjdump(), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert width_faults(sass, *WIDE["unscale"]) == ["0 16-byte stores"]


def arithmetic_faults(ptx: str) -> list[str]:
    """Instructions that would give other bits than IEEE arithmetic without contraction."""
    return re.findall(
        r"fma\.[a-z.]*f(?:32|64)|\S+\.ftz\S*|(?:div|sqrt|rcp|rsqrt)\.(?:full|approx)\S*|ex2\S*|lg2\S*", ptx
    )


@pytest.mark.parametrize("source", SOURCES)
def test_arithmetic_is_ieee(built: Built, source: str) -> None:
    ptx = built.dump("--dump-ptx", source)
    assert ".target sm_100" in ptx and arithmetic_faults(ptx) == []
    if source == "adam":
        assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "div.rn.f64" in ptx


@pytest.mark.parametrize("flag", ["--fmad=true", "--use_fast_math"])
def test_other_arithmetic_is_noticed(tmp_path: Path, flag: str) -> None:
    source = tmp_path / "one.cu"
    source.write_text(
        '#include "math/adam.h"\n'
        "__global__ void one(pyzero::AdamState* s, float g, pyzero::AdamCoefficients c, pyzero::AdamConstants k) {\n"
        "  *s = pyzero::adam_element<true>(*s, g, 1.0f, c, k);\n}\n"
    )
    command = [*find_nvcc(), "-std=c++17", flag, f"-I{build_spec.CSRC}", "-arch=sm_90", "-ptx", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "one.ptx")], check=True, capture_output=True)
    assert arithmetic_faults((tmp_path / "one.ptx").read_text()) != []


def test_module_imports_without_a_gpu(built: Built) -> None:
    """The runtime is linked statically: nothing of CUDA's to find, and no clash with the one that torch brings."""
    code = "import _native_cuda as m; print(m.build_hash, m.source_hash, m.adam_workspace_bytes(3), m.max_ranks)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=built.module.parent,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": ""},
    )
    assert done.stdout.split() == [*built.hashes, "36", "1024"], done.stderr
    assert b"libcudart.so" not in built.module.read_bytes()


def test_a_missing_gpu_is_an_error_in_words(built: Built) -> None:
    code = "import _native_cuda as m; m.loss_scale_update_(0, 0, (2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, False), 0, 0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=built.module.parent,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert re.search(r"RuntimeError: CUDA error while reading the current device: .*\(cudaError\w+\)", done.stderr)
