"""nvcc's output, read without a GPU: registers, SASS and PTX of every kernel, and a module that imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyzero.ops import build_spec

ARCHS = ("80", "90", "100")
STREAMING = ("adam_kernel", "unscale_kernel", "pack_kernel", "reduce_scatter_kernel")
READ_ONLY = "unscale_kernelILb0E"  # inv_scale 1: nothing is stored


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
    """Every .cu compiled for all of ARCHS: file name -> object, and what ptxas said of it."""

    objects: dict[str, Path]
    ptxas: dict[str, str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("cuda")
    spec = build_spec.cuda_spec(find_nvcc(), ARCHS)
    commands = {command[-1]: command for command in spec.compile_commands(folder) if command[-3].endswith(".cu")}

    def compile_one(command: list[str]) -> str:
        done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:5000]
        return done.stderr

    with ThreadPoolExecutor(build_spec.num_cpus()) as pool:
        reports = list(pool.map(compile_one, commands.values()))
    names = [Path(path).name for path in commands]
    return Built(dict(zip(names, map(Path, commands), strict=True)), dict(zip(names, reports, strict=True)))


def spills(ptxas: str) -> list[str]:
    """What ptxas -v says of memory that a thread should not need."""
    return [
        match[0]
        for match in re.finditer(r"(\d+) bytes (stack frame|spill stores|spill loads|cumulative stack)", ptxas)
        if int(match[1])
    ]


def test_no_kernel_spills(built: Built) -> None:
    for name, report in built.ptxas.items():
        assert spills(report) == [], name
        if name != "cuda-tensor_list.cu.o":  # the host's side alone
            assert {f"sm_{arch}" for arch in ARCHS} <= set(re.findall(r"sm_\d+", report)), name


def test_spills_are_noticed() -> None:
    assert spills("8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads") == [
        "8 bytes stack frame",
        "4 bytes spill loads",
    ]


def kernels(sass: str) -> Iterator[tuple[str, str]]:
    """(mangled name, instructions) of every kernel in a listing."""
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), body


def width_faults(name: str, body: str) -> list[str]:
    """What keeps a streaming kernel's main loop from being 16 bytes wide, by its SASS."""
    loads = re.findall(r"\bLDG\.E\S*\.128", body)
    stores = re.findall(r"\bSTG\.E\S*\.128", body)
    faults = [f"{name}: local memory" for _ in re.findall(r"\b(?:LDL|STL)\b", body)]
    if not loads:
        faults.append(f"{name}: no 16-byte load")
    if not stores and READ_ONLY not in name:
        faults.append(f"{name}: no 16-byte store")
    # Scalar stores belong to heads and tails (one per stream and loop) and to the report. Anything more is a vector
    # that the compiler took apart.
    narrow = re.findall(r"\bSTG\.E(?!\S*\.128)\S*", body)
    if len(narrow) > MAX_NARROW_STORES[kernel_kind(name)]:
        faults.append(f"{name}: {len(narrow)} narrow stores")
    return faults


# adam: four streams. The lists: one per input type, found_inf, the partial sum; reduce_scatter: one, and those two.
MAX_NARROW_STORES = {"adam_kernel": 4, "unscale_kernel": 5, "pack_kernel": 5, "reduce_scatter_kernel": 3}


def kernel_kind(name: str) -> str | None:
    return next((kind for kind in STREAMING if kind in name), None)


@pytest.mark.parametrize("file", ["adam", "unscale", "pack", "reduce_scatter"])
def test_main_loops_move_16_bytes(built: Built, file: str) -> None:
    cuobjdump = find_cuobjdump()
    listing = subprocess.run(
        [cuobjdump, "--dump-sass", built.objects[f"cuda-{file}.cu.o"]], capture_output=True, text=True, check=True
    ).stdout
    seen = [(name, body) for name, body in kernels(listing) if kernel_kind(name)]
    assert len(seen) == len(ARCHS) * {"adam": 24, "unscale": 2, "pack": 3, "reduce_scatter": 15}[file]
    assert [fault for name, body in seen for fault in width_faults(name, body)] == []


def test_narrow_code_is_noticed() -> None:
    wide = "LDG.E.128 R4, desc[UR4][R2.64] ;\n STG.E.128 desc[UR4][R2.64], R4 ;\n LDG.E.128.CONSTANT R8 ;"
    assert width_faults("pack_kernel", wide) == []
    assert width_faults("pack_kernel", wide.replace("STG.E.128", "STG.E.U16")) == ["pack_kernel: no 16-byte store"]
    assert width_faults("pack_kernel", wide.replace("LDG.E", "LDG.E.64 R1;LD")) != []
    assert width_faults("pack_kernel", wide + "\nSTG.E.U16 a;" * 6) == ["pack_kernel: 6 narrow stores"]
    assert width_faults("pack_kernel", wide + "\nSTL [R1], R2 ;") == ["pack_kernel: local memory"]


def arithmetic_faults(ptx: str) -> list[str]:
    """Instructions that would give other bits than IEEE arithmetic without contraction."""
    return re.findall(
        r"fma\.[a-z.]*f(?:32|64)|\S+\.ftz\S*|(?:div|sqrt|rcp|rsqrt)\.(?:full|approx)\S*|ex2\S*|lg2\S*", ptx
    )


def test_arithmetic_is_ieee(built: Built) -> None:
    cuobjdump = find_cuobjdump()
    for name, path in built.objects.items():
        ptx = subprocess.run([cuobjdump, "--dump-ptx", path], capture_output=True, text=True, check=True).stdout
        assert arithmetic_faults(ptx) == [], name
        if "adam" in name:
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


def test_module_imports_without_a_gpu(tmp_path: Path) -> None:
    module = tmp_path / f"_native_cuda{build_spec.EXT_SUFFIX}"
    spec = build_spec.cuda_spec(find_nvcc(), ["90"])
    spec.build(tmp_path / "build", module)
    code = "import _native_cuda as m; print(m.build_hash, m.source_hash, m.adam_workspace_bytes(3), m.max_ranks)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.stdout.split() == [spec.build_hash(), spec.source_hash(), "36", "1024"], done.stderr


def test_module_needs_no_cuda_library(tmp_path: Path) -> None:
    """Static runtime: nothing to find at import, and no clash with the one that torch brings."""
    spec = build_spec.cuda_spec(find_nvcc(), ["90"])
    assert "-cudart=static" in spec.link_flags
