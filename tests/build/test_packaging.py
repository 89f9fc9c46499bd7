"""Every way to have pyzero: wheel, sdist, editable install, bare checkout; with and without compilers."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from pyzero.ops import env

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "out", "runs", "*.egg-info", "*.so", "__pycache__")
PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
NO_COMPILER = {"CXX": "", "PATH": "/no-such-folder", "CUDA_HOME": "/no-such-folder"}

# Prints where pyzero.ops came from, after one op has run.
USE = """
import torch, pyzero, pyzero.ops
x, found_inf = torch.ones(5), torch.zeros(1)
pyzero.ops.unscale_([x], 0.5, found_inf=found_inf)
assert x.tolist() == [0.5] * 5
print(pyzero.ops.__file__)
"""


def clean_environ(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYZERO_", "PYTHON"))}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=clean_environ(**environ), capture_output=True, text=True)


def succeed(*command: str | Path, cwd: Path, **environ: str) -> str:
    done = run(*command, cwd=cwd, **environ)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=NOT_COPIED))


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's torch, but not this one's editable pyzero; returns its python."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    site = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path | str, *arguments: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=cwd, **environ)


def install(python: Path, *what: str | Path, cwd: Path, **environ: str) -> None:
    done = pip(python, "install", *PIP_OPTIONS, "--ignore-installed", *what, cwd=cwd, **environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture(scope="module")
def sdist_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the CPU module, built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    script = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    succeed(sys.executable, "-c", script, folder, cwd=checkout, PYZERO_BUILD="none")
    sdist = next(folder.glob("pyzero-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    wanted = {re.sub("^(ops|csrc)/", r"pyzero/\1/", name) for name in files if not name.startswith("pyzero.egg-info/")}
    assert not wanted - names, "files of the checkout, hidden ones aside, with the two links as folders"
    assert not any(name.startswith(("ops", "csrc")) for name in names), "twice in the sdist"
    succeed(
        *(sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", folder, sdist),
        cwd=folder,
        PYZERO_BUILD="cpu",
    )
    return next(folder.glob("pyzero-*.whl"))


@pytest.fixture(scope="module")
def wheel_python(sdist_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python = make_environment(folder / "env")
    install(python, sdist_wheel, cwd=folder)
    return python


def test_the_wheel_holds_every_file_and_no_other(checkout: Path, sdist_wheel: Path) -> None:
    wanted = {"pyzero/py.typed"}
    for folder, patterns in (
        ("pyzero", ["*.py"]),
        ("pyzero/ops", ["*.py"]),
        ("pyzero/csrc", ["*.h", "*.cuh", "*.cpp", "*.cu"]),
    ):
        for pattern in patterns:
            wanted |= {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob(pattern)}
    with zipfile.ZipFile(sdist_wheel) as archive:
        got = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert got == wanted | {f"pyzero/_native_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"}


def test_a_wheel_works_from_anywhere(wheel_python: Path, checkout: Path, tmp_path: Path) -> None:
    site = wheel_python.parent.parent
    used = succeed(wheel_python, "-c", USE, cwd=tmp_path, PYZERO_JIT="0", PYZERO_BACKEND="cpu")
    assert used.startswith(str(site))
    script = "from pyzero.ops import native; print(native.unusable_reason('cpu'), native.load('cpu').__file__)"
    assert succeed(wheel_python, "-c", script, cwd=tmp_path, PYZERO_JIT="0").startswith(f"None {site}")
    # In the checkout's own folder the checkout comes first, and has to work.
    used = succeed(wheel_python, "-c", USE, cwd=checkout, PYZERO_JIT="0")
    assert used.startswith(str(checkout / "pyzero" / "ops"))


def test_a_wheel_can_build_at_first_use(wheel_python: Path, tmp_path: Path) -> None:
    script = "from pyzero.ops import jit; print(jit.unavailable_reason('cpu'), jit.make_spec('cpu').source_hash())"
    reason, source_hash = succeed(wheel_python, "-c", script, cwd=tmp_path).split()
    assert reason == "None"
    script = """if True:
        from pathlib import Path
        from pyzero.ops import build_spec, native
        print(build_spec.read_stamp(Path(native.load("cpu").__file__)).source_hash)"""
    assert succeed(wheel_python, "-c", script, cwd=tmp_path, PYZERO_JIT="0").split() == [source_hash]


def test_an_editable_install_works_from_anywhere(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = make_environment(tmp_path / "env")
    install(python, "-e", checkout, cwd=tmp_path, PYZERO_BUILD="none")
    (tmp_path / "elsewhere").mkdir()
    for cwd in (tmp_path / "elsewhere", checkout, checkout / "tests"):
        assert succeed(python, "-c", USE, cwd=cwd, PYZERO_JIT="0").startswith(str(checkout / "pyzero" / "ops"))


def test_an_uninstalled_checkout_works_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    for cwd, path in ((tmp_path, str(checkout)), (checkout, ""), (checkout / "ops", str(checkout))):
        used = succeed(python, "-c", USE, cwd=cwd, PYTHONPATH=path, PYZERO_JIT="0")
        assert used.startswith(str(checkout / "pyzero" / "ops"))


@pytest.mark.parametrize("name", ["setup", "tests", "benchmarks", "docs"])
def test_the_rest_of_a_checkout_is_no_part_of_the_package(checkout: Path, name: str) -> None:
    done = run(sys.executable, "-c", f"import pyzero.{name}", cwd=checkout)
    assert done.returncode != 0 and f"No module named 'pyzero.{name}'" in done.stderr


def test_ops_is_not_a_package_of_its_own(checkout: Path) -> None:
    done = run(sys.executable, "-c", "import ops", cwd=checkout)
    assert done.returncode != 0 and "expected `import pyzero.ops`" in done.stderr


def test_without_a_compiler_the_install_succeeds(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    ghost = checkout / "build" / "lib" / "pyzero" / "ghost.py"
    ghost.parent.mkdir(parents=True)
    ghost.write_text("deleted since the last build\n")
    python = make_environment(tmp_path / "env")
    done = pip(python, "install", "-v", *PIP_OPTIONS[1:], checkout, cwd=tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr  # pip has moved it from one to the other
    assert "not building the cpu kernels ahead of time: no C++ compiler" in said
    assert "not building the cuda kernels ahead of time: no nvcc" in said
    used = succeed(python, "-c", USE, cwd=tmp_path, **NO_COMPILER)
    assert used.startswith(str(tmp_path / "env"))
    assert not list((tmp_path / "env").rglob("ghost.py"))


def test_a_zip_unpacked_without_links(tmp_path: Path) -> None:
    """As pip and uv unpack the zip of a repository: a link becomes a file that holds its target."""
    checkout = copy_checkout(tmp_path / "checkout")
    for name in ("ops", "csrc"):
        (checkout / "pyzero" / name).unlink()
        (checkout / "pyzero" / name).write_text(f"../{name}")
    python = make_environment(tmp_path / "env")
    install(python, checkout, cwd=tmp_path, PYZERO_BUILD="none")
    assert succeed(python, "-c", USE, cwd=tmp_path, PYZERO_JIT="0").startswith(str(tmp_path / "env"))
    assert (checkout / "pyzero" / "ops").is_symlink(), "so that an editable install works, too"


def test_an_old_setuptools_without_build_isolation(checkout: Path, tmp_path: Path) -> None:
    """65.5 lies in every new environment of Python 3.10 and 3.11, and cannot read pyproject.toml."""
    fake = tmp_path / "setuptools"
    (fake / "command").mkdir(parents=True)
    (fake / "__init__.py").write_text('__version__ = "65.5.0"\nExtension = setup = None\n')
    for name in ("build", "build_ext"):
        (fake / "command" / f"{name}.py").write_text(f"class {name}: pass\n")
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, PYTHONPATH=str(tmp_path), PYZERO_BUILD="none")
    assert done.returncode != 0
    assert "expected setuptools from 77, got 65.5.0; pip install --upgrade setuptools" in done.stderr
    assert '"setuptools>=77"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("build", "said"), [("cpu", "no C++ compiler"), ("cuda", "no nvcc"), ("all", "no C++ compiler")]
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(checkout: Path, build: str, said: str) -> None:
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, PYZERO_BUILD=build, **NO_COMPILER)
    assert done.returncode != 0
    assert f"PYZERO_BUILD={build}: cannot build the" in done.stderr and said in done.stderr


@pytest.mark.parametrize("build", ["auto", "cpu", "all"])
@pytest.mark.parametrize(
    ("cxx", "said"),
    [
        ("no-such-compiler -O2", "expected a C++ compiler in CXX, got no-such-compiler -O2, not found; correct it or"),
        ("gcc", "expected a C++ compiler, got CXX=gcc for C; set CXX=g++"),
    ],
)
def test_a_compiler_that_was_asked_for_is_not_left_out(checkout: Path, build: str, cxx: str, said: str) -> None:
    """Or a spelling mistake would install the package without its kernels."""
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, PYZERO_BUILD=build, CXX=cxx)
    assert done.returncode != 0 and f"cannot build the cpu kernels: {said}" in done.stderr
    done = run(sys.executable, "setup.py", "--version", cwd=checkout, PYZERO_BUILD="none", CXX=cxx)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_build_isolation_without_torch(tmp_path: Path) -> None:
    """What a user types. The build environment has what pyproject.toml asks for, and no torch."""
    checkout = copy_checkout(tmp_path / "checkout")
    with (checkout / "setup.py").open("a") as file:
        file.write("\nassert importlib.util.find_spec('torch') is None, 'torch in the build environment'\n")
    done = pip(sys.executable, "wheel", "--no-deps", "-w", tmp_path, checkout, cwd=tmp_path, PYZERO_BUILD="cpu")
    if done.returncode != 0 and "No matching distribution found for" in done.stderr:
        pytest.skip("no package index can be reached for the build's requirements")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("pyzero-*.whl"))) as archive:
        assert any("_native_cpu" in name for name in archive.namelist())


def test_importing_does_nothing_visible(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pyzero, pyzero.ops; print('torch' in sys.modules)"
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYZERO_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    script = f"""
import sys, torch, time
sys.path.insert(0, {str(ROOT)!r})
start = time.perf_counter()
import pyzero, pyzero.ops, pyzero.ops.registry
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
"""
    seconds = [float(succeed(sys.executable, "-c", script, cwd=tmp_path, HOME=str(tmp_path))) for _ in range(3)]
    assert min(seconds) < 0.2, seconds
    assert not (tmp_path / "cache").exists() and not (tmp_path / ".cache").exists()


def test_the_names_at_the_top() -> None:
    import pyzero

    assert {"FusedZeroAdam", "FusedZeroAdamW", "LossScale", "initialize", "__version__"} <= set(dir(pyzero))
    for package in (pyzero, pyzero.ops):
        for name in package.__all__:
            assert callable(getattr(package, name)), name
        with pytest.raises(AttributeError, match="no_such_name"):
            package.no_such_name  # noqa: B018


def test_readme_lists_the_environment_variables() -> None:
    rows = re.findall(r"^\| `(PYZERO_\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(rows) == env.VARIABLES
    assert len(rows) <= 8


def test_one_file_reads_the_environment() -> None:
    code = [path for folder in ("pyzero", "pyzero/ops") for path in (ROOT / folder).rglob("*.py")] + [ROOT / "setup.py"]
    readers = {path.relative_to(ROOT).as_posix() for path in code if re.search(r"environ\b|getenv", path.read_text())}
    of_launchers = {"pyzero/comm/process.py", "pyzero/deepspeed/launcher.py"}  # torchrun's own variables
    assert readers - of_launchers == {"pyzero/ops/env.py"}
    assert not [name for name in of_launchers if "PYZERO_" in (ROOT / name).read_text()]
    named = {name for path in code for name in re.findall(r"PYZERO_(?:[A-Z]+_?)+", path.read_text())}
    macros = {"PYZERO_ISA", "PYZERO_HAVE_"}
    assert named - macros == set(env.VARIABLES)


def test_a_forbidden_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("judge", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    monkeypatch.setenv("PYZERO_REQUIRE", "cuda,triton")
    assert "PYZERO_REQUIRE forbids" in judge.forbidden_skip("CUDA: no GPU that this torch can use")
    assert "names its reason" in judge.forbidden_skip("")
    assert judge.forbidden_skip("no package index") is None
    monkeypatch.delenv("PYZERO_REQUIRE")
    assert judge.forbidden_skip("cuda: no GPU") is None
