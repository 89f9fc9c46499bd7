"""nvcc's output, read without a GPU: registers, SASS and PTX of every kernel, and a module that imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyzero.ops import build_spec

ARCHS = ("80", "90", "100")
SOURCES = ("adam", "lion", "loss_scale", "pack", "reduce_scatter", "grad_stats", "sgd", "step_scalars", "unscale")
# Loads and stores of 16 and of 8 bytes, of all kernels of one file and target together, at least, counted by hand: one
# for each operand of each vector that a kernel names (those of a full chunk, and one in the loop for what is left), of
# 8 bytes for a 16-bit operand beside fp32, and of the weights one more, for peers. adam: 48 kernels of 3 vectors, lion:
# 24, half of each for gradients that lie apart; sgd: lion's, and as many without a momentum buffer; lists: 5 vectors
# with fp32, 3 without; reduce_scatter: 5 vectors for 1 and 2 slices, 3 for others, 1 for 8 of fp32.
WIDE = {
    "adam": {"LDG 16": 480, "LDG 8": 96, "STG 16": 504, "STG 8": 144},
    "lion": {"LDG 16": 168, "LDG 8": 48, "STG 16": 180, "STG 8": 72},
    "sgd": {"LDG 16": 264, "LDG 8": 96, "STG 16": 288, "STG 8": 144},
    "unscale": {"LDG 16": 22, "LDG 8": 0, "STG 16": 11, "STG 8": 0},
    "pack": {"LDG 16": 27, "LDG 8": 10, "STG 16": 27, "STG 8": 10},
    "reduce_scatter": {"LDG 16": 137, "LDG 8": 228, "STG 16": 110, "STG 8": 0},
}
# Full chunks by the number of vector loads, all of them under way before the first is used.
AHEAD = {
    "adam": {8: 48},
    "lion": {6: 24},
    "sgd": {4: 24, 6: 24},
    "unscale": {2: 4, 4: 2},  # of 16-bit types, of fp32; in both kernels
    "pack": {2: 4, 4: 9, 8: 5},  # twice as many where vectors lie across two: of 16-bit types, of fp32
    "reduce_scatter": {2: 3, 4: 6, 8: 9, 10: 3, 12: 3, 16: 2, 18: 2},  # any 2 or 4, 1: 4 or 8, 2: 8 or 12, 4: 8 or 10
}


def find_nvcc() -> tuple[str, ...]:
    try:
        return build_spec.find_nvcc()
    except build_spec.ToolchainError as error:
        pytest.skip(f"no cuda compiler: {error}")


def test_what_the_environment_adds_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-use_fast_math")
    spec = build_spec.cuda_spec(find_nvcc(), ("90",))
    flags = [flag for flag in spec.flags if "gencode" not in flag]
    (tmp_path / "divide.cu").write_text("__global__ void divide(float* x) { *x = sqrtf(*x / (x[1] * x[2] + x[3])); }\n")
    subprocess.run([*spec.compiler, *flags, "-arch=sm_90", "--ptx", "divide.cu"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "divide.ptx").read_text()
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and not re.search(r"ftz|approx|fma", ptx)


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
    folder: Path
    module: Path

    def dump(self, what: str, source: str) -> str:
        command = [find_cuobjdump(), what, str(self.folder / f"cuda-{source}.cu.o")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("cuda")
    spec = build_spec.cuda_spec(find_nvcc(), ARCHS, Path(shutil.copytree(build_spec.CSRC, root / "csrc")))
    built = Built(spec, root / "build", root / f"_native_cuda{build_spec.EXT_SUFFIX}")
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
    cubin = compile_changed(tmp_path, "adam.cu", "grid.h", "kMinBlocks = 4", "kMinBlocks = 8")
    command = [find_cuobjdump(), "--dump-resource-usage", cubin]
    assert memory_faults(subprocess.run(command, capture_output=True, text=True, check=True).stdout) != []


def sass_of(cubin: str) -> str:
    return subprocess.run([find_cuobjdump(), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout


def listings(built: Built, source: str) -> dict[str, str]:
    """The SASS of all kernels by target."""
    _, *targets = re.split(r"^arch = ", built.dump("--dump-sass", source), flags=re.MULTILINE)
    result = {sass.split()[0]: sass for sass in targets}
    assert set(result) == {f"sm_{arch}" for arch in ARCHS}
    return result


def width_faults(sass: str, wanted: dict[str, int]) -> list[str]:
    """What keeps main loops from being as wide as wanted, by the SASS of one target."""
    faults = re.findall(r"\b(?:LDL|STL)\S*", sass)
    for access, least in wanted.items():
        name, size = access.split()
        found = len(re.findall(rf"\b{name}\.E\S*\.{8 * int(size)}\b", sass))
        if found < least:
            faults.append(f"{found} x {access}")
    return faults


@pytest.mark.parametrize("source", list(WIDE))
def test_main_loops_move_vectors(built: Built, source: str) -> None:
    faults = {arch: width_faults(sass, WIDE[source]) for arch, sass in listings(built, source).items()}
    assert faults == dict.fromkeys(faults, [])


def test_narrow_code_is_noticed(tmp_path: Path) -> None:
    # The plain store that the PTX one took the place of.
    cubin = compile_changed(tmp_path, "unscale.cu", "vector_io.cuh", "  store_words(p, words);", "  *p = v.x[0];")
    assert width_faults(sass_of(cubin), WIDE["unscale"]) == ["0 x STG 16"]


VECTOR_LOAD = re.compile(r"\bLDG\.E\S*?\.(64|128)\S* R(\d+)")


def loads_ahead(block: list[str]) -> tuple[int, int]:
    """(vector loads before the first of their results is used or overwritten, vector loads) of a basic block."""
    loaded: set[str] = set()
    ahead = 0
    for instruction in block:
        if not loaded.isdisjoint(re.findall(r"\bR\d+", instruction)):
            break
        if load := VECTOR_LOAD.search(instruction):
            loaded |= {f"R{int(load[2]) + i}" for i in range(int(load[1]) // 32)}
            ahead += 1
    return ahead, sum(VECTOR_LOAD.search(instruction) is not None for instruction in block)


def full_chunks(sass: str) -> Counter[tuple[int, int]]:
    """`loads_ahead` of the basic blocks that __syncwarp ends, and how many have it; it leaves a NOP."""
    chunks: Counter[tuple[int, int]] = Counter()
    for function in sass.split("Function : ")[1:]:
        code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?) ?;", function, flags=re.MULTILINE)
        while code and code[-1] == "NOP":  # padding
            code.pop()
        block: list[str] = []
        for instruction in code:
            if instruction == "NOP":
                chunks[loads_ahead(block)] += 1
            block = [] if re.search(r"\b(?:BRA|BSYNC|EXIT|RET)\b", instruction) else [*block, instruction]
    return chunks


@pytest.mark.parametrize("source", list(AHEAD))
def test_all_loads_of_a_chunk_are_under_way_at_once(built: Built, source: str) -> None:
    for sass in listings(built, source).values():
        found = full_chunks(sass)
        if source == "pack":  # of fp32 across two vectors ptxas uses the first once three or more are under way
            for ahead in range(3, 8):
                found[8, 8] += found.pop((ahead, 8), 0)
        assert found == {(loads, loads): count for loads, count in AHEAD[source].items()}


def test_a_load_that_waits_is_noticed(tmp_path: Path) -> None:
    cubin = compile_changed(tmp_path, "reduce_scatter.cu", "grid.h", "kMinBlocks = 4", "kMinBlocks = 8")
    assert any(ahead < loads for ahead, loads in full_chunks(sass_of(cubin)))


def arithmetic_faults(ptx: str) -> list[str]:
    """Instructions that would give other bits than IEEE arithmetic without contraction."""
    faults = re.findall(r"fma\.[a-z.]*f32|\S+\.ftz\S*|(?:div|sqrt|rcp|rsqrt)\.(?:full|approx)\S*|ex2\S*|lg2\S*", ptx)
    for function in ptx.split(".entry ")[1:]:
        widened = set(re.findall(r"cvt\.f64\.f32\s+(%fd\d+)", function))
        for fma, x, y in re.findall(r"(fma\.[a-z.]*f64)\s+%fd\d+, (%fd\d+), (%fd\d+)", function):
            if x != y or x not in widened:  # the square of an fp32 value is exact in fp64: nothing is contracted
                faults.append(fma)
    return faults


@pytest.mark.parametrize("source", SOURCES)
def test_arithmetic_is_ieee(built: Built, source: str) -> None:
    ptx = built.dump("--dump-ptx", source)
    assert ".target sm_100" in ptx and arithmetic_faults(ptx) == []
    if source == "adam":
        assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "div.rn.f64" in ptx


def test_an_fma_of_two_numbers_is_noticed() -> None:
    square = ".entry f\ncvt.f64.f32 %fd1, %f1;\ncvt.f64.f32 %fd2, %f2;\nfma.rn.f64 %fd3, %fd1, %fd1, %fd4;\n"
    assert arithmetic_faults(square) == []
    assert arithmetic_faults(square.replace("%fd1, %fd1,", "%fd1, %fd2,")) == ["fma.rn.f64"]
    assert arithmetic_faults(square.replace("%fd1, %fd1,", "%fd4, %fd4,")) == ["fma.rn.f64"]


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
    code = "import _native_cuda as m; print(m.adam_workspace_bytes(3))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=built.module.parent,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": ""},
    )
    assert done.stdout.split() == ["36"], done.stderr
    spec = built.spec
    stamp = (spec.source_hash(), spec.build_hash(), ARCHS, spec.toolkit)
    assert spec.toolkit and build_spec.read_stamp(built.module) == stamp
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
