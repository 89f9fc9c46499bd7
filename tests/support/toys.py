"""A toy extension module that compiles in a second, for tests of the build."""

from pathlib import Path

from pyzero.ops import build_spec
from pyzero.ops.build_spec import Spec, Unit

SOURCE = """
#include <Python.h>
#include "toy.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_toy", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__toy() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""


def write_toy(root: Path, answer: str = "42") -> Path:
    """Write the toy's sources below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "toy.cpp").write_text(SOURCE)
    (root / "toy.h").write_text(f"#define ANSWER {answer}\n")
    return root


def toy_spec(root: Path, compiler: tuple[str, ...] = ("c++",), flags: tuple[str, ...] = ("-fPIC",)) -> Spec:
    """The toy's spec."""
    units = (Unit("toy.cpp"),)
    return Spec("_toy", root, units, compiler, flags, includes=build_spec.python_includes(), fingerprint="toy")
