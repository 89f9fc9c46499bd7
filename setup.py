"""Builds the native modules ahead of time, as pyzero/ops/build_spec.py says. The rest is in pyproject.toml.

PYZERO_BUILD chooses: auto (default: what this machine has the compilers for), none, cpu, cuda, all.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which only build isolation follows


def check_setuptools(version):
    """Refuse a setuptools that cannot read pyproject.toml."""
    if int(version.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"expected setuptools from {OLDEST_SETUPTOOLS}, got {version}; pip install --upgrade setuptools, or "
            f"leave out --no-build-isolation"
        )


def restore_links():
    """Make the two links again where a zip was unpacked without them: pip leaves files that hold the links' targets."""
    for name in ("ops", "csrc"):
        place = HERE / "pyzero" / name
        if place.is_file():
            link = place.with_name(f"{name}.link")
            try:
                link.symlink_to(Path("..", name))
                link.replace(place)
            except OSError as error:
                raise SystemExit(f"expected {place} to be a link: {error}; replace it by a copy of {name}") from error


def load(name):
    """Load pyzero/ops/<name>.py by its path: importing the package would need torch."""
    path = HERE / "pyzero" / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"pyzero_setup_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_setuptools(setuptools.__version__)
restore_links()
env = load("env")
build_spec = load("build_spec")


def cpu_spec():
    """Spec of the C++ module. Raises ToolchainError; SystemExit if $CXX is no C++ compiler."""
    asked = env.cxx()
    try:
        cxx = build_spec.find_cxx(asked)
    except build_spec.ToolchainError as error:
        if asked:
            raise SystemExit(f"cannot build the cpu kernels: {error}") from error
        raise
    return build_spec.cpu_spec(cxx)


def cuda_spec():
    """Spec of the CUDA module. Raises ToolchainError."""
    return build_spec.cuda_spec(build_spec.find_nvcc(env.cuda_home()), env.cuda_archs())


def chosen_specs():
    """Specs to build. A missing compiler is an error where its module was asked for, else a notice."""
    makers = {"cpu": cpu_spec, "cuda": cuda_spec}
    asked = env.build()
    wanted = {"none": (), "cpu": ("cpu",), "cuda": ("cuda",)}.get(asked, ("cpu", "cuda"))
    specs = []
    for kind in wanted:
        try:
            specs.append(makers[kind]())
        except build_spec.ToolchainError as error:
            if asked != "auto":
                raise SystemExit(f"PYZERO_BUILD={asked}: cannot build the {kind} kernels: {error}") from error
            print(f"pyzero: not building the {kind} kernels ahead of time: {error}", file=sys.stderr)
    return specs


class Build(build):
    """Starts from an empty folder: a module deleted since the last build must not be shipped."""

    def run(self):
        """Build everything anew."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Runs the spec's own commands in place of setuptools'."""

    def build_extension(self, ext):
        """Compile one native module to where setuptools wants it."""
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            ext.spec.build(Path(self.build_temp).absolute() / ext.spec.name, output, env.max_jobs())
        except build_spec.CompileError as error:
            remedy = "PYZERO_BUILD=none installs without kernels built ahead of time"
            raise SystemExit(f"{error}\nRemedy: {remedy}.") from error


def extension(spec):
    """An Extension that carries its spec."""
    ext = Extension(f"pyzero.{spec.name}", sources=[])
    ext.spec = spec
    return ext


setup(
    ext_modules=[extension(spec) for spec in chosen_specs()],
    cmdclass={"build": Build, "build_ext": BuildExt},
)
