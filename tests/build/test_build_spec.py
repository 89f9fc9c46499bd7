"""What is built and how: flags, instruction sets, hashes, and what is said when a compiler is missing."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toys import toy_spec, write_toy

from pyzero.ops import build_spec, env
from pyzero.ops.build_spec import CompileError, ToolchainError

ROOT = Path(__file__).resolve().parents[2]


def make_fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    """A script that answers as nvcc does, but compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 || echo "release {release}"\n')
    nvcc.chmod(0o755)
    return nvcc


def test_a_wheel_runs_elsewhere_and_keeps_its_bits(tmp_path: Path) -> None:
    specs = [build_spec.cpu_spec(("c++",)), build_spec.cuda_spec((str(make_fake_nvcc(tmp_path)),))]
    for spec in specs:
        commands = "\n".join(" ".join(command) for command in spec.compile_commands(tmp_path))
        assert not re.search(r"march=native|(?<!-fno-)fast.math|ftz(?!=false)|prec-(?!.{3,4}=true)", commands)
        assert commands.count("-ffp-contract=off") == len(spec.units) + 1  # the stamp
    assert "--fmad=false" in specs[1].flags


@pytest.mark.parametrize("added", [(), ("-ffast-math",), ("-Ofast",), ("-ffinite-math-only",)])
def test_what_cxx_adds_changes_no_bit(tmp_path: Path, added: tuple[str, ...]) -> None:
    """With them adam_ gives other bits, no op sees a NaN, and the whole process may flush subnormals to zero."""
    spec = build_spec.cpu_spec(("c++", *added))
    defined = subprocess.run([*spec.compiler, *spec.flags, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True)
    macros = dict(re.findall(r"^#define (\w+) (.*)$", defined.stdout.decode(), re.MULTILINE))
    assert "__FAST_MATH__" not in macros and macros["__FINITE_MATH_ONLY__"] == "0"
    link = [*spec.compiler, "-###", *spec.link_command(tmp_path, tmp_path / "module.so")[len(spec.compiler) :]]
    assert "crtfastmath" not in subprocess.run(link, capture_output=True, text=True).stderr


def test_kernels_are_compiled_once_per_instruction_set() -> None:
    spec = build_spec.cpu_spec(("c++",), machine="x86_64")
    kernels = {unit.tag: unit.flags for unit in spec.units if unit.source == "cpu/kernels.cpp"}
    assert {tag: flags[0] for tag, flags in kernels.items()} == {
        "baseline": "-DPYZERO_ISA=baseline",
        "avx2": "-DPYZERO_ISA=avx2",
        "avx512": "-DPYZERO_ISA=avx512",
    }
    assert not any(flag.startswith("-m") for flag in kernels["baseline"])
    others = [unit for unit in spec.units if unit.source != "cpu/kernels.cpp"]
    assert all(not any(flag.startswith("-m") for flag in unit.flags) for unit in others)
    assert all("-DPYZERO_HAVE_AVX512" in unit.flags for unit in others)

    elsewhere = build_spec.cpu_spec(("c++",), machine="aarch64")
    assert [unit.tag for unit in elsewhere.units if unit.source == "cpu/kernels.cpp"] == ["baseline"]
    assert not any("HAVE" in flag for unit in elsewhere.units for flag in unit.flags)


def test_cuda_architectures(tmp_path: Path) -> None:
    nvcc = (str(make_fake_nvcc(tmp_path)),)
    targets = [flag for flag in build_spec.cuda_spec(nvcc).flags if "gencode" in flag]
    assert targets == [  # this nvcc does not know sm_100; PTX of the highest serves what comes later
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "-gencode=arch=compute_100,code=sm_100" in build_spec.cuda_spec(nvcc, ("100", "90a")).flags
    assert "-gencode=arch=compute_100,code=compute_100" in build_spec.cuda_spec(nvcc, ("100", "90a")).flags


def test_the_hash_follows_all_that_shapes_the_module(tmp_path: Path) -> None:
    root = write_toy(tmp_path)
    spec = toy_spec(root)
    seen = {spec.build_hash()}
    others = [
        replace(spec, flags=("-O3",)),
        replace(spec, fingerprint="another compiler"),
        replace(spec, compiler=("c++", "-march=native")),
        replace(spec, name="_other"),
    ]
    others += [replace(spec, units=(replace(spec.units[0], flags=("-mavx2",)),)), replace(spec, link_flags=())]
    for other in others:
        assert other.source_hash() == spec.source_hash()
        seen.add(other.build_hash())
    assert len(seen) == len(others) + 1
    assert replace(spec, includes=("/elsewhere",)).build_hash() == spec.build_hash()

    before = spec.source_hash()
    for edit in (root / "toy.cpp", root / "toy.h", root / "deep" / "new.cuh"):
        edit.parent.mkdir(exist_ok=True)
        with edit.open("a") as file:
            file.write("// edited\n")
        assert spec.source_hash() != before
        before = spec.source_hash()
        seen.add(spec.build_hash())
    assert len(seen) == len(others) + 4


def test_the_compiler_version_is_in_the_hash(tmp_path: Path) -> None:
    old = build_spec.cuda_spec((str(make_fake_nvcc(tmp_path / "old", "12.8")),))
    new = build_spec.cuda_spec((str(make_fake_nvcc(tmp_path / "new", "13.0")),))
    assert old.build_hash() != new.build_hash()
    assert old.source_hash() == new.source_hash()


def test_a_module_carries_its_stamp(tmp_path: Path) -> None:
    spec = toy_spec(write_toy(tmp_path / "csrc"))
    module = tmp_path / "_toy.so"
    spec.build(tmp_path / "build", module)
    assert build_spec.read_stamp(module) == (spec.source_hash(), spec.build_hash(), (), "")
    replace(spec, archs=("80", "90a"), toolkit="12.8").build(tmp_path / "build", module)
    assert build_spec.read_stamp(module) == (spec.source_hash(), spec.build_hash(), ("80", "90a"), "12.8")
    assert build_spec.read_stamp(ROOT / "setup.py") is None


def test_which_driver_a_toolkit_needs(tmp_path: Path) -> None:
    toolkit = build_spec.cuda_spec((str(make_fake_nvcc(tmp_path, "12.8")),)).toolkit
    assert toolkit == "12.8"
    needed = {"": 0, "11.8": 0, "12.0": 0, "12.1": 12010, "12.10": 12010, "13.0": 12010}
    assert {toolkit: build_spec.needed_driver(toolkit) for toolkit in needed} == needed


def test_which_gpus_a_module_has_code_for(tmp_path: Path) -> None:
    archs = build_spec.cuda_spec((str(make_fake_nvcc(tmp_path)),)).archs
    assert archs == ("80", "90")
    gpus = {"70": False, "75": False, "80": True, "86": True, "89": True, "90": True, "100": True, "120": True}
    assert {gpu: build_spec.runs_on(archs, gpu) for gpu in gpus} == gpus
    assert [build_spec.runs_on(("86", "90a"), gpu) for gpu in ("80", "89", "90", "100")] == [False, True, True, False]


def test_a_compile_error_has_the_command_and_the_output(tmp_path: Path) -> None:
    spec = toy_spec(write_toy(tmp_path / "csrc", answer="no_such_name"))
    with pytest.raises(CompileError, match="no_such_name") as caught:
        spec.build(tmp_path / "build", tmp_path / "_toy.so")
    assert "-c" in caught.value.command and "toy.cpp" in caught.value.command


def test_max_jobs_compilers_at_a_time(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\nmkdir {tmp_path}/running || exit 1\nsleep 0.3\nrmdir {tmp_path}/running\n")
    compiler.chmod(0o755)
    write_toy(tmp_path)
    twice = (build_spec.Unit("toy.cpp", tag="one"), build_spec.Unit("toy.cpp", tag="other"))
    spec = replace(toy_spec(tmp_path), compiler=(str(compiler),), units=twice)
    spec.build(tmp_path / "build", tmp_path / "_toy.so", max_jobs=1)
    with pytest.raises(CompileError, match="File exists"):
        spec.build(tmp_path / "build", tmp_path / "_toy.so", max_jobs=2)


def test_a_missing_compiler_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainError, match="in CXX, got no-such-compiler, not found; correct"):
        build_spec.find_cxx(("no-such-compiler",))
    with pytest.raises(ToolchainError, match=f"looked in {tmp_path}/bin.*set CUDA_HOME"):
        build_spec.find_nvcc(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="install"):
        build_spec.find_cxx()
    with pytest.raises(ToolchainError, match="--version failed"):
        build_spec.compiler_version(("no-such-compiler",))
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho no room in the inn >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ToolchainError, match="--version failed: no room in the inn; set CXX"):
        build_spec.compiler_version((str(broken),))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [("gcc", "g++"), ("/usr/bin/cc", "c++"), ("ccache clang-14", "clang++-14"), ("amd64-gnu-gcc -m64", "gnu-g++")],
)
def test_a_c_compiler_is_refused(asked: str, wanted: str) -> None:
    """It compiles C++, and links a module that cannot be imported ("undefined symbol")."""
    with pytest.raises(ToolchainError, match=re.escape(wanted)):
        build_spec.find_cxx(tuple(asked.split()))


def test_a_compiler_of_any_other_name_is_taken() -> None:
    for asked in ("c++", "g++", "ccache g++", "c++ -B/opt/cc/gcc"):
        if shutil.which(asked.split()[0]):
            assert build_spec.find_cxx(tuple(asked.split())) == tuple(asked.split())


def test_setup_can_read_it_without_the_package() -> None:
    script = f"""
import importlib.util, sys
for name in ("env", "build_spec"):
    spec = importlib.util.spec_from_file_location("alone_" + name, {str(ROOT)!r} + f"/pyzero/ops/{{name}}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
assert not {{"torch", "pyzero", "pybind11"}} & set(sys.modules), "imports more than the standard library"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_no_torch_in_csrc() -> None:
    sources = [path for path in build_spec.CSRC.rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert len(sources) > 10
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text()), path


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("PYZERO_BUILD", "gpu", env.build),
        ("PYZERO_CUDA_ARCHS", "80;hopper", env.cuda_archs),
        ("PYZERO_CUDA_ARCHS", "90x", env.cuda_archs),
        ("PYZERO_JIT", "maybe", env.jit_enabled),
        ("PYZERO_BACKEND", "fast", env.default_backend),
        ("PYZERO_NUM_THREADS", "0", env.num_threads),
    ],
)
def test_a_wrong_variable_is_refused(monkeypatch, name, value, read) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        read()


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYZERO_CUDA_ARCHS", "8.0, sm_90a;100")
    assert env.cuda_archs() == ("80", "90a", "100")
    monkeypatch.delenv("PYZERO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert env.cache_dir() == Path("/somewhere/pyzero")
    monkeypatch.setenv("PYZERO_CACHE_DIR", "/elsewhere")
    assert env.cache_dir() == Path("/elsewhere")
