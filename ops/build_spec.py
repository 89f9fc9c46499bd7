"""How the native modules are built: sources, flags, hash, commands. setup.py and jit.py share it, so they agree.

Imports only the standard library, because setup.py loads this file by its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

# Beside this folder, in a checkout and in an installed package.
CSRC = Path(__file__).resolve().parent.parent / "csrc"
EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
DEFAULT_CUDA_ARCHS = ("80", "90", "100")
MAX_OUTPUT_LINES = 60
MAX_REASON = 300  # characters

# First, so that what $CXX adds (as in "g++ -ffast-math") changes no bit and loses no NaN. Also in the link: there it
# would make the whole process flush subnormals to zero.
_EXACT_FLAGS = ("-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only")
# No -march=native, because a wheel runs on other machines. Contraction is off, because an fma would change the bits.
# Without -fno-math-errno, sqrtf is not vectorised.
_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread")
_CXX_FLAGS = (*_EXACT_FLAGS, "-std=c++17", *_HOST_FLAGS)
# Each of what -use_fast_math in $NVCC_APPEND_FLAGS would change: a flag of its own comes before it.
_NVCC_EXACT_FLAGS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_NVCC_FLAGS = ("-O3", "-std=c++17", *_NVCC_EXACT_FLAGS, "-Xcompiler", ",".join(_HOST_FLAGS))
_X86_ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mprefer-vector-width=512"),
}


class CompileError(RuntimeError):
    """A compiler failed. Has the command and the first lines of its output."""

    def __init__(self, command: Sequence[str], output: str) -> None:
        self.command = shlex.join(command)
        self.output = "\n".join(output.strip().splitlines()[:MAX_OUTPUT_LINES])
        super().__init__(f"{self.command}\n{self.output}")


class ToolchainError(RuntimeError):
    """Something that a build needs is missing. The message says what, and the remedy."""


@dataclass(frozen=True)
class Unit:
    """One compilation of one source."""

    source: str  # relative to Spec.root
    flags: tuple[str, ...] = ()
    tag: str = ""  # tells apart several compilations of one source

    @property
    def object_name(self) -> str:
        """The object file's name within the build folder."""
        return "-".join(filter(None, (self.source.replace("/", "-"), self.tag))) + ".o"


@dataclass(frozen=True)
class Spec:
    """One extension module: its sources, compiler and flags."""

    name: str  # as in PyInit_<name>
    root: Path  # the sources' folder
    units: tuple[Unit, ...]
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ("-shared", "-pthread")
    includes: tuple[str, ...] = ()  # not in the hash, because the same headers lie elsewhere in another environment
    fingerprint: str = ""  # versions of the compiler, of Python's ABI and of pybind11
    archs: tuple[str, ...] = ()  # GPU architectures that it has code for; in the stamp
    toolkit: str = ""  # version of the CUDA toolkit, as in "12.8"; in the stamp

    def source_hash(self) -> str:
        """Return the hash of the names and contents of all sources and headers."""
        return source_hash(self.root, (unit.source for unit in self.units))

    def build_hash(self) -> str:
        """Return the hash of the sources and of everything else that affects the module."""
        units = [(unit.source, unit.flags, unit.tag) for unit in self.units]
        flags = (*self.compiler[1:], *self.flags)  # the compiler itself is in the fingerprint
        what = (self.name, self.source_hash(), units, flags, self.link_flags, self.fingerprint)
        return _digest([repr(what).encode()])

    def compile_commands(self, build_dir: Path) -> list[list[str]]:
        """Return one command per object. The last compiles the stamp that read_stamp() finds."""
        common = [*self.compiler, *self.flags, f"-I{self.root}", *(f"-I{folder}" for folder in self.includes)]
        commands = []
        for unit in self.units:
            source = str(self.root / unit.source)
            commands.append([*common, *unit.flags, "-c", source, "-o", str(build_dir / unit.object_name)])
        stamp = ["-c", str(build_dir / "stamp.cpp"), "-o", str(build_dir / "stamp.o")]
        return [*commands, [*self.compiler, *self.flags, *stamp]]

    def link_command(self, build_dir: Path, output: Path) -> list[str]:
        """Return the command that links the objects into the module."""
        objects = [str(build_dir / name) for name in (*(unit.object_name for unit in self.units), "stamp.o")]
        return [*self.compiler, *self.link_flags, *objects, "-o", str(output)]

    def build(self, build_dir: Path, output: Path, max_jobs: int | None = None) -> None:
        """Compile and link, with at most this many compilers at a time, or one per CPU. Raises CompileError."""
        build_dir.mkdir(parents=True, exist_ok=True)
        text = f"pyzero-stamp:{self.source_hash()}:{self.build_hash()}:{','.join(self.archs)}:{self.toolkit}"
        declared = 'extern "C" { extern const char pyzero_stamp[]; const char pyzero_stamp[] = "%s"; }\n'
        (build_dir / "stamp.cpp").write_text(declared % text)
        with ThreadPoolExecutor(max_jobs or num_cpus()) as pool:
            list(pool.map(_execute, self.compile_commands(build_dir)))
        _execute(self.link_command(build_dir, output))


def source_hash(root: Path, sources: Iterable[str]) -> str:
    """Return the hash of the named sources and of all headers below root."""
    headers = (str(path.relative_to(root)) for pattern in ("*.h", "*.cuh") for path in root.rglob(pattern))
    names = sorted({*sources, *headers})
    return _digest(part for name in names for part in (name.encode(), (root / name).read_bytes()))


class Stamp(NamedTuple):
    """What a built module says of itself."""

    source_hash: str
    build_hash: str
    archs: tuple[str, ...]  # GPU architectures that it has code for
    toolkit: str  # version of the CUDA toolkit that built it, or ""


def read_stamp(module: Path) -> Stamp | None:
    """Return the stamp of a built module, or None if it has none. Reads its bytes and does not load it."""
    found = re.search(rb"pyzero-stamp:([0-9a-f]+):([0-9a-f]+):([0-9af,]*):([0-9.]*)\0", module.read_bytes())
    if found is None:
        return None
    source_hash, build_hash, archs, toolkit = (part.decode() for part in found.groups())
    return Stamp(source_hash, build_hash, tuple(filter(None, archs.split(","))), toolkit)


def needed_driver(toolkit: str) -> int:
    """Return the CUDA version that the driver of a module from this toolkit must support, as in 12010; or 0.

    It is that of the kernel parameters in csrc/cuda/launch.cuh. torch has looked at what every kernel needs.
    """
    return 12010 if toolkit and tuple(map(int, toolkit.split("."))) >= (12, 1) else 0


def runs_on(archs: Sequence[str], gpu: str) -> bool:
    """Whether `cuda_spec(archs)` has code for a GPU: for an earlier one of its generation, or PTX for any earlier."""
    return any(_covers(arch, int(gpu), has_ptx=arch == max(archs, key=_arch_number)) for arch in archs)


def _covers(arch: str, gpu: int, has_ptx: bool) -> bool:
    number = _arch_number(arch)
    if not arch.isdigit():  # 90a: only for that GPU
        return number == gpu
    return number <= gpu and (has_ptx or number // 10 == gpu // 10)


def cpu_sources(root: Path = CSRC) -> list[str]:
    """Return the CPU module's sources, relative to root."""
    return [*(f"cpu/{path.name}" for path in sorted((root / "cpu").glob("*.cpp"))), "bind_cpu.cpp"]


def cuda_sources(root: Path = CSRC) -> list[str]:
    """Return the CUDA module's sources, relative to root. The slowest comes first, so that it runs beside others."""
    return ["bind_cuda.cpp", *(f"cuda/{path.name}" for path in sorted((root / "cuda").glob("*.cu")))]


def cpu_spec(cxx: Sequence[str], root: Path = CSRC, machine: str = platform.machine()) -> Spec:
    """Return the CPU module's spec: cpu/kernels.cpp once per instruction set, everything else once."""
    isas = _X86_ISA_FLAGS if machine.lower() in ("x86_64", "amd64") else {"baseline": ()}
    have = tuple(f"-DPYZERO_HAVE_{isa.upper()}" for isa in isas if isa != "baseline")
    units = []
    for source in cpu_sources(root):
        if source == "cpu/kernels.cpp":
            units += [Unit(source, (f"-DPYZERO_ISA={isa}", *flags), tag=isa) for isa, flags in isas.items()]
        else:
            units.append(Unit(source, have))
    link = (*_EXACT_FLAGS, "-shared", "-pthread", "-ldl", *_macos_link_flags())
    print_as = _fingerprint(cxx)
    return Spec("_native_cpu", root, tuple(units), tuple(cxx), _CXX_FLAGS, link, python_includes(), print_as)


def cuda_spec(nvcc: Sequence[str], archs: Sequence[str] = (), root: Path = CSRC) -> Spec:
    """Return the CUDA module's spec for these architectures, with PTX of the highest for later ones."""
    archs = sorted(archs, key=_arch_number) or default_cuda_archs(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    units = [Unit(source) for source in cuda_sources(root)]
    flags = (*_NVCC_FLAGS, *targets)
    link = ("-shared", "-cudart=static", *targets)
    print_as = _fingerprint(nvcc)
    release = re.search(r"release (\d+\.\d+)", print_as)
    return Spec(
        "_native_cuda",
        root,
        tuple(units),
        tuple(nvcc),
        flags,
        link,
        python_includes(),
        print_as,
        tuple(archs),
        toolkit=release[1] if release else "",
    )


def default_cuda_archs(nvcc: Sequence[str]) -> list[str]:
    """Return those of DEFAULT_CUDA_ARCHS that this nvcc knows. Raises ToolchainError if it knows none."""
    known = _output([*nvcc, "--list-gpu-code"]).split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if f"sm_{arch}" in known]
    if not archs:
        raise ToolchainError(f"{nvcc[0]} builds for none of {DEFAULT_CUDA_ARCHS}; set PYZERO_CUDA_ARCHS")
    return archs


def find_cxx(asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the C++ compiler's command: `asked` ($CXX), c++, g++ or clang++. Raises ToolchainError."""
    for word in takewhile(lambda word: not word.startswith("-"), asked):  # such a module would lack C++'s library
        if found := re.fullmatch(r"(.*-)?(gcc|clang|cc)(-[0-9.]+)?", Path(word).name):
            prefix, name, version = (part or "" for part in found.groups())
            wanted = prefix + {"gcc": "g++", "clang": "clang++", "cc": "c++"}[name] + version
            raise ToolchainError(f"expected a C++ compiler, got CXX={shlex.join(asked)} for C; set CXX={wanted}")
    for command in [tuple(asked)] if asked else [("c++",), ("g++",), ("clang++",)]:
        if os.name == "posix" and shutil.which(command[0]):
            return command
    if asked:
        raise ToolchainError(
            f"expected a C++ compiler in CXX, got {shlex.join(asked)}, not found; correct it or unset it"
        )
    raise ToolchainError("no C++ compiler (c++, g++ and clang++ not found); install g++ or clang++, or set CXX")


def find_nvcc(cuda_home: str | None = None) -> tuple[str, ...]:
    """Return nvcc's command: in `cuda_home` if given, else on PATH or in /usr/local/cuda. Raises ToolchainError."""
    folders = [str(Path(cuda_home, "bin"))] if cuda_home else [None, "/usr/local/cuda/bin"]
    for folder in folders:
        if found := shutil.which("nvcc", path=folder):
            return (found,)
    tried = folders[0] if cuda_home else "PATH and /usr/local/cuda/bin"
    raise ToolchainError(f"no nvcc (looked in {tried}); install the CUDA toolkit, or set CUDA_HOME")


def python_includes() -> tuple[str, ...]:
    """Return the folders of Python's and pybind11's headers. Raises ToolchainError."""
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        raise ToolchainError(f"no Python.h in {', '.join(folders)}; install Python's headers (python3-dev)")
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is None or pybind11.origin is None:
        raise ToolchainError("no pybind11 headers; pip install pybind11")
    return (*folders, str(Path(pybind11.origin).parent / "include"))


def compiler_version(compiler: Sequence[str]) -> str:
    """Return the output of the compiler's --version."""
    return _output([*compiler, "--version"]).strip()


def num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fingerprint(compiler: Sequence[str]) -> str:
    pybind11 = Path(python_includes()[-1], "pybind11", "detail", "common.h").read_bytes()
    machine = f"{platform.system()} {platform.machine()} {EXT_SUFFIX}"
    return f"{compiler_version(compiler)}\n{machine}\npybind11 {_digest([pybind11])}"


def _macos_link_flags() -> tuple[str, ...]:
    return ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()


def _arch_number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part) + part)  # lengths keep ("ab", "c") and ("a", "bc") apart
    return digest.hexdigest()[:16]


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())[:MAX_REASON].rstrip(".")
        raise ToolchainError(f"{shlex.join(command)} failed: {said}; set CXX or CUDA_HOME to another") from error


def _execute(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise CompileError(command, done.stdout or f"exit status {done.returncode}")
