"""Who imports whom, and that importing a file does nothing."""

import ast
import re
from pathlib import Path

import pytest
from helpers_unit import ROOT

PACKAGES = ("utils", "models", "data", "tools", "segmentation", "detection")
# Given built objects, above models and data.
LOOPS = {"utils.distillation", "utils.engine", "utils.report", "utils.resume", "utils.scoring", "utils.trained"}
RUNS = {
    "utils.classification",
    "utils.keeper",
    "utils.task",
    "utils.trainer",
}  # above the loops, which they run and watch over
SCRIPTS, RUN, LOOP, PARTS, LEAVES = 5, 4, 3, 2, 1


def product_modules():
    """Dotted name -> path of every module that is no test."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = product_modules()


def floor(name):
    if name in LOOPS:
        return LOOP
    if name in RUNS:
        return RUN
    return {"utils": LEAVES, "models": PARTS, "data": PARTS}.get(name.split(".")[0], SCRIPTS)


def imports(name):
    """The product modules that a module imports, anywhere in it: scripts import in functions, once they have parsed."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            wanted = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(target for target in wanted if target in MODULES)
    return found - {name}


def test_the_modules_are_found():
    assert {"train", "test", "utils.engine", "models.groupmixformer", "data.build", "utils", "tools"} <= set(MODULES)
    assert set(MODULES) >= LOOPS | RUNS
    assert "utils.trainer" in imports("train")  # in a function
    assert "models.build" in imports("test")
    assert "utils.checkpoint" in imports("utils.scoring")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(name):
    assert {target for target in imports(name) if floor(target) > floor(name)} == set()


@pytest.mark.parametrize("name", sorted(name for name in MODULES if floor(name) != SCRIPTS))
def test_only_scripts_import_inside_functions(name):
    tree = ast.parse(MODULES[name].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = [part for node in functions for part in ast.walk(node) if isinstance(part, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(part) for part in inside] == []


@pytest.mark.parametrize("name", ["utils.cli", "utils.config", "utils.errors"])
def test_what_a_command_line_needs_imports_nothing_heavy(name):
    found, wanted = set(), {name}
    while wanted:
        found |= wanted
        wanted = {target for module in wanted for target in imports(module)} - found
    texts = [MODULES[module].read_text() for module in found]
    assert not any(
        re.search(r"^(import|from) (torch|timm|torchvision|numpy|matplotlib)\b", text, re.M) for text in texts
    )


@pytest.mark.parametrize("name", sorted(name for name in MODULES if floor(name) == PARTS))
def test_models_and_data_do_not_import_each_other(name):
    other = {"models": "data", "data": "models"}[name.split(".")[0]]
    assert {target for target in imports(name) if target.split(".")[0] == other} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_programs_are_imported_by_nobody_outside_their_package(name):
    package = name.split(".")[0]
    assert {target for target in imports(name) if floor(target) == SCRIPTS and target.split(".")[0] != package} == set()


def test_every_file_that_lies_right_in_tools_is_a_program():
    parts = [path.name for path in (ROOT / "tools").glob("*.py") if '__name__ == "__main__"' not in path.read_text()]
    assert parts == ["__init__.py"]


def test_no_module_leads_back_to_itself():
    graph = {name: imports(name) for name in MODULES}
    while free := [name for name, targets in graph.items() if not targets]:
        for name in free:
            del graph[name]
        for targets in graph.values():
            targets.difference_update(free)
    assert graph == {}


# Importing a file does nothing

DECLARATIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign)
ACTIVE = {"open", "print", "input", "exec", "eval", "torch", "np", "numpy", "random", "os", "subprocess", "shutil"}


def dotted(node):
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_declaration(node, is_script):
    """Whether a statement at the top of a module only declares something."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return True
    if isinstance(node, DECLARATIONS):
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        return not any(dotted(call.func).split(".")[0] in ACTIVE for call in calls)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
    if isinstance(node, ast.With):  # silences what an import warns of
        items = {dotted(item.context_expr.func) for item in node.items if isinstance(item.context_expr, ast.Call)}
        quiet = [part for part in node.body if not ast.unparse(part).startswith("warnings.")]
        return items == {"warnings.catch_warnings"} and all(is_declaration(part, is_script) for part in quiet)
    if isinstance(node, ast.Try):
        return all(isinstance(part, (ast.Import, ast.ImportFrom)) for part in node.body)
    if isinstance(node, ast.Expr):
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return is_text or (is_script and ast.unparse(node).startswith("sys.path.insert("))
    return False


@pytest.mark.parametrize("name", sorted(MODULES))
def test_importing_a_module_only_declares(name):
    tree = ast.parse(MODULES[name].read_text())
    acting = [ast.unparse(node) for node in tree.body if not is_declaration(node, floor(name) == SCRIPTS)]
    assert acting == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_function_changes_a_modules_variables(name):
    tree = ast.parse(MODULES[name].read_text())
    assert [node.names for node in ast.walk(tree) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("name", sorted(name for name, path in MODULES.items() if path.name != "__init__.py"))
def test_a_module_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))


def test_tests_are_no_part_of_the_product():
    product = {Path(path).read_text() for path in MODULES.values()}
    assert not any("import pytest" in text or "from tests" in text for text in product)
