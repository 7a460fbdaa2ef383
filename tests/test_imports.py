"""The import law: which part of the project may import which, read off the source and tried out in fresh processes."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]

RANKS = {
    **dict.fromkeys(("__init__", "errors", "schedules", "seeds", "statistics", "types", "weights_digest"), 0),
    "config": 1,
    "dist": 1,
    **dict.fromkeys(("advantages", "batching", "losses", "replay", "rewards"), 2),
    **dict.fromkeys(("checkpoint", "data", "envs", "log", "memory", "rollout", "sync", "update"), 3),
    **dict.fromkeys(("assemble", "imitation", "planning", "run_folder"), 4),
    **dict.fromkeys(("cold_start", "evaluate", "learner"), 5),
    **dict.fromkeys(("sft", "trainer"), 6),
    **dict.fromkeys(("commands", "integrations"), 7),
    "cli": 8,
    "__main__": 9,
}
"""Parts of spear_fast; a part imports lower ranks only. A new file at the top or a new folder needs a line here."""

PURE = {part for part, rank in RANKS.items() if rank == 2}
PURE_WITH_OPS = {"advantages", "losses", "replay"}
"""The pure parts whose maths is in spear_kernels."""
SAME_RANK = (("rollout", "envs"), ("rollout", "data"), ("sync", "rollout.engine"), ("sync", "update.model"))
"""The only edges between parts of one rank above 0: importing part, imported module."""
LOG_READERS = {"commands", "sft", "trainer"}
"""Rooms return their numbers; only these hand them to log/."""

FENCES = {
    "transformers": (
        "integrations/",
        "data/chat.py",
        "data/tokenizer.py",
        "update/model.py",
        "rollout/hf_engine.py",
        "rollout/vllm_compat.py",
    ),
    "tokenizers": ("data/tokenizer.py",),
    "tensorboard": ("log/sinks.py",),
    "torch.utils.tensorboard": ("log/sinks.py",),
    "matplotlib": ("log/plot.py",),
    "vllm": ("rollout/vllm_compat.py",),
    "peft": ("update/lora.py",),
    "trl": ("integrations/trl.py", "integrations/trl/"),
    "verl": ("integrations/verl.py", "integrations/verl/"),
    "gymnasium": ("envs/adapters/gymnasium.py", "envs/adapters/actions.py"),
    "openenv": ("envs/adapters/openenv.py",),
    "verifiers": ("envs/adapters/verifiers.py", "envs/adapters/verifiers_trace.py", "envs/adapters/verifiers_tools.py"),
    "alfworld": ("envs/alfworld/textworld_game.py",),
    "textworld": ("envs/alfworld/textworld_game.py",),
    "minigrid": ("envs/babyai/library.py", "envs/babyai/expert.py", "envs/babyai/view.py"),
    "tantivy": ("envs/shopping/search_index.py",),
    "math_verify": ("envs/math/check_worker.py",),
    "reasoning_gym": ("envs/generators.py", "envs/math/check_worker.py"),
    "pydantic_monty": ("envs/sandbox/monty.py",),
    "liger_kernel": ("update/liger.py",),
    "pynvml": ("memory/readings.py",),
    "yaml": ("config/",),
    "rich": ("log/progress.py", "commands/pages.py"),
    "triton": (),
}
"""Packages of spear_fast that only these files (or folders) may import."""

TRITON_FILES = ("kernel.py", "counted_kernel.py", "launch.py", "tile.py", "compile_check.py")
"""Files of spear_kernels that may import triton; none of them is read on `import spear_kernels`."""

HEAVY = (
    "alfworld", "gymnasium", "jinja2", "math_verify", "matplotlib", "minigrid", "openenv", "pyarrow", "pydantic",
    "pydantic_core", "pydantic_monty", "reasoning_gym", "rich", "safetensors", "tantivy", "tensorboard", "textworld",
    "tokenizers", "transformers", "triton", "trl", "verifiers", "verl", "vllm", "wandb", "yaml",
)  # fmt: skip
"""What the two packages must not need on import: all but torch and what torch itself may load."""


@dataclass(frozen=True)
class Import:
    """`module` is imported by `file` (relative to the repository) in line `line`."""

    file: str
    line: int
    module: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def imports_of(path: Path, types_too: bool = False) -> tuple[Import, ...]:
    """Return all imports of a file, also those inside functions; those for type checkers only on request."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(
        Import(str(path.relative_to(ROOT)), node.lineno, module, names)
        for node in _statements(tree, types_too)
        for module, names in _targets(node, package)
    )


def _statements(node: ast.AST, types_too: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING") and not types_too:
            yield from _statements(ast.Module(child.orelse, []), types_too)
        else:
            yield from _statements(child, types_too)


def _targets(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """The absolute modules of a statement with the names taken from each."""
    if isinstance(node, ast.Import):
        return [(alias.name, ()) for alias in node.names]
    base = package[: len(package) - node.level + 1] if node.level else ()
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [(module, tuple(alias.name for alias in node.names))]


def targets_inside(entry: Import) -> list[str]:
    """What an import reaches inside spear_fast: `from spear_fast.rollout import engine` reaches "rollout.engine"."""
    package, _, module = entry.module.partition(".")
    if package != "spear_fast":
        return []
    reached = [".".join(filter(None, (module, name))) for name in entry.names] or [module]
    return ["__init__" if name == "" or name.startswith("__") else name for name in reached]


def own_part(path: Path) -> str:
    return path.relative_to(ROOT / "spear_fast").parts[0].removesuffix(".py")


def allowed(importer: str, target: str) -> bool:
    """The law itself: may this part of spear_fast import that module of it?"""
    imported = target.partition(".")[0]
    if importer == imported or RANKS.get(imported) == 0:
        return True
    if imported not in RANKS or (imported == "log" and importer not in LOG_READERS):
        return False
    if importer in PURE and imported in ("config", "dist"):
        return False
    return RANKS[imported] < RANKS[importer] or any(
        importer == source and is_from(target, module) for source, module in SAME_RANK
    )


def within(file: str, places: tuple[str, ...]) -> bool:
    inner = file.removeprefix("spear_fast/")
    return any(inner == place or (place.endswith("/") and inner.startswith(place)) for place in places)


def is_from(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_every_part_has_a_rank() -> None:
    unknown = {own_part(path) for path in python_files("spear_fast")} - RANKS.keys()
    assert not unknown, f"give {unknown} a rank in tests/test_imports.py"


def test_parts_import_downwards_only() -> None:
    wrong = [
        str(entry)
        for path in python_files("spear_fast")
        for entry in imports_of(path)
        if not all(allowed(own_part(path), target) for target in targets_inside(entry))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "target", "verdict"),
    [
        ("rewards", "types.Group", True),
        ("rewards", "advantages.fill", False),
        ("losses", "config.schema", False),
        ("batching", "dist", False),
        ("update", "dist", True),
        ("update", "losses.terms", True),
        ("update", "config.schema", True),
        ("update", "log.metrics", False),
        ("update", "nowhere", False),
        ("commands", "log.plot", True),
        ("trainer", "log.sinks", True),
        ("rollout", "envs.base", True),
        ("envs", "rollout.episode", False),
        ("sync", "rollout.engine.Engine", True),
        ("sync", "rollout.episode", False),
        ("config", "trainer", False),
    ],
)
def test_the_law_says_what_is_written_down(importer: str, target: str, verdict: bool) -> None:
    assert allowed(importer, target) is verdict


def test_the_reader_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport yaml.nodes\nfrom . import sibling\nfrom ..log.plot import x\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import rich\ndef f():\n    from spear_fast import types\n"
    )
    path = tmp_path / "spear_fast" / "envs" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [entry.module for entry in imports_of(path)]
    assert found == ["typing", "yaml.nodes", "spear_fast.envs", "spear_fast.log.plot", "rich", "spear_fast"]
    assert "torch" in [entry.module for entry in imports_of(path, types_too=True)]
    assert [targets_inside(entry) for entry in imports_of(path)[2:4]] == [["envs.sibling"], ["log.plot.x"]]
    assert targets_inside(imports_of(path)[-1]) == ["types"]


def test_packages_stay_behind_their_fences() -> None:
    wrong = [
        str(entry)
        for path in python_files("spear_fast")
        for entry in imports_of(path)
        for package, places in FENCES.items()
        if is_from(entry.module, package) and not within(entry.file, places)
    ]
    assert not wrong


def test_config_knows_no_torch() -> None:
    wrong = [entry for path in python_files("spear_fast/config") for entry in imports_of(path, types_too=True)
             if is_from(entry.module, "torch")]  # fmt: skip
    assert not [str(entry) for entry in wrong]


def test_of_the_pure_parts_only_those_with_maths_use_the_ops() -> None:
    wrong = [
        str(entry)
        for part in PURE - PURE_WITH_OPS
        for path in python_files(f"spear_fast/{part}")
        for entry in imports_of(path)
        if is_from(entry.module, "spear_kernels")
    ]
    assert not wrong


def test_the_ops_need_torch_and_triton_where_there_are_kernels() -> None:
    permitted = sys.stdlib_module_names | {"torch", "spear_kernels"}
    files = python_files("kernels/spear_kernels")
    assert files
    wrong = [
        str(entry)
        for path in files
        for entry in imports_of(path, types_too=True)
        if not entry.module.startswith("kernels.spear_kernels")
        and entry.module.split(".")[0] not in permitted | ({"triton"} if path.name in TRITON_FILES else set())
    ]
    assert not wrong


def test_tests_of_the_ops_know_no_trainer() -> None:
    wrong = [
        entry for path in python_files("tests/ops") for entry in imports_of(path) if is_from(entry.module, "spear_fast")
    ]
    assert not [str(entry) for entry in wrong]


def test_the_product_imports_neither_bench_nor_tests_nor_a_package_called_kernels() -> None:
    product = python_files("spear_fast") + python_files("kernels")
    entries = [entry for path in product for entry in imports_of(path, types_too=True)]
    assert not [str(entry) for entry in entries if entry.module.split(".")[0] in ("bench", "tests")]
    everywhere = [entry for folder in ("spear_fast", "bench", "tests") for path in python_files(folder)
                  for entry in imports_of(path, types_too=True)]  # fmt: skip
    assert not [str(entry) for entry in everywhere if is_from(entry.module, "kernels")]


def test_no_folder_can_hide_a_package() -> None:
    """An __init__.py in kernels/ or a test folder called like a package would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert not folders & {"kernels", "spear_kernels", "spear_fast"}
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_distribution_installs_exactly_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with a top-level `kernels` would overwrite Hugging Face's package of that name."""
    given: dict[str, list[str]] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert {package.split(".")[0] for package in given["packages"]} == {"spear_fast", "spear_kernels"}


def run_python(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter at the repository root with these entries first on sys.path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_WITH_TORCH_ALONE = f"""
import sys, time
import torch

for name in list(sys.modules):
    if name.split(".")[0] in {HEAVY!r}:
        del sys.modules[name]
sys.modules.update(dict.fromkeys({HEAVY!r}))  # None: not found, neither imported nor looked up.
started = time.process_time()
import spear_fast, spear_kernels
print(time.process_time() - started)
"""


def test_both_packages_import_with_torch_alone_and_soon() -> None:
    """CONTRIBUTING promises less than 3 s beyond torch; processor time, so that a busy machine does not decide."""
    assert float(run_python(IMPORT_WITH_TORCH_ALONE, ROOT, ROOT / "kernels")) < 3.0


def test_config_loads_without_torch() -> None:
    code = "import sys, spear_fast.config.load, spear_fast.config.describe; assert 'torch' not in sys.modules"
    run_python(code, ROOT)


FIND_KERNELS_LIKE_TRANSFORMERS = """
import importlib.metadata, importlib.util
found = importlib.util.find_spec("kernels") is not None
try:
    version = importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    import kernels
    version = getattr(kernels, "__version__", "N/A")
    print(found, version, kernels.__file__)
else:
    from kernels import CUDAProperties
    import spear_kernels
    print(found, version, CUDAProperties)
"""
"""transformers asks for the module, then its version, and imports from it if both are there."""


def test_an_installed_package_called_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("CUDAProperties = 'hugging face'\n")
    (tmp_path / "kernels-0.17.2.dist-info").mkdir()
    (tmp_path / "kernels-0.17.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n"
    )
    found = run_python(FIND_KERNELS_LIKE_TRANSFORMERS, ROOT, ROOT / "kernels", tmp_path)
    assert found.split(maxsplit=2) == ["True", "0.17.2", "hugging face\n"]


def test_without_it_our_folder_runs_no_code_under_that_name() -> None:
    """`-c` puts the repository root first on sys.path, so the name resolves, to an empty namespace."""
    assert run_python(FIND_KERNELS_LIKE_TRANSFORMERS, ROOT, ROOT / "kernels") == "True N/A None\n"
