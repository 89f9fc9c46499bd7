"""Which file of pyzero/ may import which: from the rows above its own, so that no cycle can come about."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import pyzero

PYZERO = Path(__file__).resolve().parents[2] / "pyzero"

# Imports inside functions count too; those under TYPE_CHECKING do not.
LAYERS = (
    {"ops", "profiling", "streams"},
    {"memory"},
    {"checkpoint", "checkpoint.checksummed_stream", "checkpoint.deepspeed_files", "checkpoint.files"},
    {"checkpoint.export", "comm", "comm.futex", "comm.process", "comm.root_gather", "comm.shared_pages"},
    {"comm.process_group_pool", "comm.shared_memory", "comm.wait_records"},
    {"comm.work"},
    {"comm.group"},
    {"comm.transport"},
    {"comm.shared_memory_transport", "comm.symmetric_memory_transport"},
    {"comm.multi_host_transport"},
    {"comm.make_transport"},
    {"sharding", "sharding.blocks", "sharding.fsdp", "sharding.layout", "sharding.modules", "sharding.spans"},
    {"sharding.sharded_grad", "sharding.state_checks"},
    {"sharding.local_param"},
    {"arguments", "report", "sharding.mesh_grad", "sharding.topology", "update_rule"},
    {"arguments.hyper_parameters", "arguments.params"},
    {"arguments.options"},
    {"arguments.groups"},
    {"sharding.aliases", "sharding.flat_params"},
    {"sharding.agreement", "sharding.buckets"},
    {"sharding.gather", "sharding.param_buckets"},
    {"rank_state", "rank_state.notes", "rank_state.saved_cut", "rank_state.saved_param", "rank_state.sharded_state"},
    {"rank_state.export", "rank_state.load"},
    {"gradients", "gradients.backward_end", "gradients.nonfinite", "gradients.pieces", "gradients.stats_rows"},
    {"gradients.amp", "gradients.carried_scale", "gradients.grad_stats", "gradients.norms"},
    {"gradients.hooks"},
    {"gradients.interface", "update"},
    {"gradients.local", "gradients.local.deferred_clip", "gradients.local.scale_tracker"},
    {"gradients.local.unreduced"},
    {"gradients.reduced", "gradients.reduced.accumulation", "gradients.reduced.arrival_order"},
    {"gradients.reduced.bucket_grads"},
    {"gradients.reduced.exchange"},
    {"gradients.reduced.records"},
    {"gradients.reduced.deferred_factors", "gradients.reduced.readiness", "gradients.reduced.unsent_scale"},
    {"gradients.reduced.rounds"},
    {"gradients.reduced.stage1_reducer"},
    {"gradients.reduced.stage2_reducer"},
    {"gradients.reduced.reduction"},
    {"loss_scale", "loss_scale.overflow", "loss_scale.scaler"},
    {"loss_scale.scaled_backward"},
    {"base"},
    {"full_access", "status"},
    {"state_dict"},
    {"copies"},
    {"optimizer"},
    {"optimizers", "optimizers.adam", "optimizers.lamb", "optimizers.lion", "optimizers.sgd"},
    {"optimizers.muon"},
    {"checkpoint.agreement", "checkpoint.content", "checkpoint.from_deepspeed", "checkpoint.storage"},
    {"estimate.figures"},
    {"estimate.buckets"},
    {"estimate.blocks"},
    {"estimate"},
    {"checkpoint.writer"},
    {"checkpoint.convert", "checkpoint.saving"},
    {"checkpoint.loading"},
    *(
        {f"deepspeed.{name}" for name in row.split()}
        for row in (
            "constants launcher offload_config",
            "accelerator arguments checkpoint_constants comm config config.keys engine engine.applied_steps "
            "engine.param_owners engine.tensors engine.weights estimates ops.op_builder ops.optimizer_spec parallel "
            "parallel.mesh loss_scaler pipe.layers pipe.topology schedules stage_3 stage_3.kept_views "
            "stage_3.parameter_offload stage_3.root_weights stage_3.sharded_param zero_to_fp32",
            "config.dtype_sections config.optimizer_section config.scheduler_section config.sections "
            "config.tensor_parallel_section config.unknown_keys config.zero_section engine.inner_optimizer "
            "engine.output_hooks engine.plain_backward ops.adam ops.lamb ops.lion parallel.groups pipe.runner "
            "stage_3.shard timers",
            "checkpointing config.schema ops parallel.tp_plan profiling.flops_profiler utils",
            "config.reader engine.data engine.ranks engine.saving monitor parallel.tensor_parallel "
            "pipe.module profiling",
            "config.deepspeed_config",
            "engine.settings",
            "engine.engine optimizers partition pipe stage_3.init",
            "conversion engine.eval_engine log pipe.engine zero",
            "entry",
        )
    ),
    {"deepspeed"},
    {"__main__", "accelerate", "compat"},
    {"transformers"},
)
FOLDERS = (
    "arguments",
    "checkpoint",
    "comm",
    "deepspeed",
    "estimate",
    "gradients",
    "loss_scale",
    "optimizers",
    "rank_state",
    "sharding",
)
MODULES = {*PYZERO.glob("*.py"), *(p for f in FOLDERS for p in (PYZERO / f).rglob("*.py"))} - {PYZERO / "__init__.py"}


def name_of(path: Path) -> str:
    """As in LAYERS: dotted, below pyzero."""
    return ".".join(path.relative_to(PYZERO).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, package: str = "pyzero") -> set[str]:
    """Names of the modules of pyzero that a file imports. package: the one that the file is in."""
    found = set()

    def add(module: str, names: list[str]) -> None:
        folder = PYZERO.joinpath(*module.split(".")[1:])
        is_package = module == "pyzero" or folder.is_dir()
        of_package = [name for name in names if is_package and module_exists(f"{module}.{name}")]
        found.update(f"{module}.{name}".removeprefix("pyzero.") for name in of_package)
        if module != "pyzero" and len(of_package) < len(names):
            found.add(module.removeprefix("pyzero."))

    def module_exists(module: str) -> bool:
        place = PYZERO.joinpath(*module.split(".")[1:])
        return place.is_dir() or place.with_suffix(".py").is_file()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module]).rstrip(".")
            if module == "pyzero.ops" or module.startswith("pyzero.ops."):
                found.add("ops")
            elif module == "pyzero" or module.startswith("pyzero."):
                add(module, [alias.name for alias in node.names])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_imports_go_one_way():
    below: set[str] = set()
    for layer in LAYERS:
        for path in MODULES:
            name = name_of(path)
            if name in layer:
                package = ".".join(["pyzero", *path.relative_to(PYZERO).parts[:-1]])
                wrong = imported(path, package) - below
                assert not wrong, f"pyzero/{name} imports {sorted(wrong)}, which lie beside or above it"
        below |= layer
    assert below - {"ops"} == {name_of(path) for path in MODULES}


def test_local_and_reduced_gradients_know_nothing_of_each_other():
    for folder, other in (("local", "reduced"), ("reduced", "local")):
        for path in (PYZERO / "gradients" / folder).glob("*.py"):
            assert not [name for name in imported(path) if name.startswith(f"gradients.{other}")], path


def test_imports_are_found(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(
        "from pyzero import ops\ndef f():\n    from . import estimate\n    from .comm import Group\n"
        "    from pyzero.deepspeed import comm, entry\n    from pyzero.deepspeed.config.reader import load\n"
        "    from pyzero.ops.checks import FLOAT_DTYPES\n"
    )
    wanted = {"ops", "estimate", "comm", "deepspeed.comm", "deepspeed.entry", "deepspeed.config.reader"}
    assert imported(path) == wanted
    path.write_text("from .keys import Section\nfrom . import sections\nfrom .. import comm\n")
    assert imported(path, "pyzero.deepspeed.config") == {
        "deepspeed.config.keys",
        "deepspeed.config.sections",
        "deepspeed.comm",
    }


def test_public_names_are_found_beside_their_files_too():
    from pyzero.checkpoint import load_checkpoint, save_checkpoint
    from pyzero.optimizer import FusedZeroAdam
    from pyzero.optimizers import FusedZeroAdamW

    assert (load_checkpoint, save_checkpoint) == (pyzero.load_checkpoint, pyzero.save_checkpoint)
    assert (FusedZeroAdam, FusedZeroAdamW) == (pyzero.FusedZeroAdam, pyzero.FusedZeroAdamW)
    for module in ("checkpoint", "optimizer", "optimizers"):
        with pytest.raises(AttributeError, match="has no attribute 'FusedAdam'"):
            getattr(importlib.import_module(f"pyzero.{module}"), "FusedAdam")  # noqa: B009


def test_tests_share_through_support():
    """A test file is found by another only if pytest has collected its folder: helpers lie in tests/support/."""
    tests = Path(__file__).resolve().parents[1]
    line = re.compile(r"^\s*(from|import) test_", re.MULTILINE)
    found = [str(path.relative_to(tests)) for path in tests.rglob("*.py") if line.search(path.read_text())]
    assert not found, f"{found} import from test files; move what they import to tests/support/"
