"""The arrows between modules and the rules of travel, read from the imports."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python


PACKAGE = ROOT / "panfoma_hf"
COMMAND = ROOT / "panfoma_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
TRAVELLING = [
    *sorted((PACKAGE / "modeling").glob("*_panfoma.py")),
    PACKAGE / "modeling" / "selective_scan.py",
    *sorted((PACKAGE / "modeling").glob("*_kernels.py")),
    *(path for path in sorted((PACKAGE / "tokenization").glob("*.py")) if path.name != "__init__.py"),
]

# Which parts of the package each part may import.
ARROWS = {
    "modeling": set(),
    "tokenization": set(),
    "version": set(),
    "plotting": set(),
    "data": {"tokenization", "version"},
    "shipped": set(),
    "hub": {"modeling", "tokenization"},
    "evaluation": {"data", "modeling", "tokenization"},
    # Tasks and methods stand above what they judge; the rest of the folder is below it.
    "evaluation/methods": {"data", "inference", "modeling", "shipped", "tokenization", "training"},
    "evaluation/tasks": {"data", "inference", "modeling", "shipped", "tokenization", "training"},
    "evaluation/public_tasks": {"data", "inference", "modeling", "shipped", "tokenization", "training"},
    "inference": {"data", "evaluation", "modeling", "tokenization", "version"},
    "training": {"data", "evaluation", "hub", "modeling", "shipped", "tokenization", "version"},
    "pipelines": {"inference", "modeling", "shipped"},
    "doctor": {"data", "tokenization"},
    "demo": {"evaluation", "inference", "plotting", "training"},
    "__main__": set(),
    "__init__": {
        "data",
        "doctor",
        "evaluation",
        "inference",
        "modeling",
        "pipelines",
        "shipped",
        "tokenization",
        "training",
        "version",
    },
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Names of what a file imports, with the level of relative imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is None:
            found += [(alias.name, node.level) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, node.level))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_import_only_along_the_arrows(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    of_file = str(path.relative_to(PACKAGE).with_suffix("").as_posix())
    allowed = ARROWS.get(of_file, ARROWS[part_of(path)]) | {part_of(path)}
    for name, level in imports(path):
        target = (*here[: len(here) - level], *name.split(".")) if level else tuple(name.split("."))
        if target[0] == "panfoma_hf":
            assert level, f"{path} imports its own package by its full name: {name}"
            assert target[1] in allowed, f"{path} imports {'.'.join(target)}"
            has_above = part_of(path) in {"evaluation", "inference", "training"}
            above = {name for name in ARROWS if "/" in name and has_above}
            is_above = "/".join(target[1:3]) in above
            assert not is_above or of_file in above, f"{path} imports {'.'.join(target)}, which stands above it"


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_travelling_files_import_siblings_and_what_every_user_has(path):
    allowed = {"torch", "transformers"} if path.parent.name == "modeling" else {"numpy", "transformers"}
    for name, level in imports(path):
        if level:
            assert level == 1, f"{name} would not travel"
            assert (path.parent / f"{name}.py").is_file(), f"{name} would not travel"
        else:
            root = name.split(".")[0]
            optional = root in {"llvmlite", "mamba_ssm", "numba", "numpy", "triton"}  # inside a try block
            assert root in sys.stdlib_module_names | allowed or optional, f"{root} would be required of every user"


def test_optional_imports_are_hidden_from_the_requirements_of_remote_code():
    from transformers.dynamic_module_utils import get_imports

    required = {name for path in TRAVELLING for name in get_imports(path)} - sys.stdlib_module_names
    assert required == {"numpy", "torch", "transformers"}


def test_base_names_of_travelling_files_are_unique():
    names = [path.name for path in TRAVELLING]
    assert len(set(names)) == len(names)


def test_scripts_and_the_command_import_the_package_and_never_the_other_way():
    for path in MODULES:
        above = {"scripts"} if path.name == "__main__.py" else {"scripts", "panfoma_cli"}
        assert not any(name.split(".")[0] in above for name, _ in imports(path)), path


def test_the_command_imports_the_package_inside_of_its_verbs_alone():
    for path in sorted(COMMAND.glob("*.py")):
        at_the_top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if is_import(node)]
        for node in at_the_top:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.startswith("panfoma_hf") for name in names), path


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_importing_the_package_is_light():
    heavy = ["anndata", "datasets", "scanpy", "numba", "matplotlib", "sklearn", "scipy", "mamba_ssm"]
    code = f"import sys, panfoma_hf; print([name for name in {heavy} if name in sys.modules])"
    # scipy and sklearn are imported by transformers itself where they are installed.
    allowed = run_python(
        "import sys\n"
        "from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer\n"
        "import transformers.modeling_layers\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    loaded = set(ast.literal_eval(run_python(code))) - set(ast.literal_eval(allowed))
    assert not loaded


def test_every_public_name_exists():
    import panfoma_hf

    for name in panfoma_hf.__all__:
        assert getattr(panfoma_hf, name) is not None
    assert set(panfoma_hf.__all__) <= set(dir(panfoma_hf))
    with pytest.raises(AttributeError, match="no attribute 'anotate'"):
        panfoma_hf.anotate  # noqa: B018
