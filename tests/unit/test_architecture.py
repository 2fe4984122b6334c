"""The structure holds: layers, size, no name tests, no pickle; and the checks notice when it does not."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from oapl_kernels.objectives import OBJECTIVES

from oapl_engine.schedule_config import MODES
from oapl_engine.weights.transports import TRANSPORTS
from tests.conftest import ROOT

SOURCES = [
    p for d in ("oapl_engine", "kernels", "csrc") for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".cpp", ".h")
]
PYTHON = [p for p in SOURCES if p.suffix == ".py"]
STATEMENTS = 8700
NATIVE_LINES = 900
FILE_LINES, CLASS_LINES, FUNCTION_LINES, ATTRIBUTES = 350, 150, 45, 12
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]


def lint(tree):
    return subprocess.run(LINT, cwd=tree, capture_output=True, text=True, env={"PYTHONPATH": f"{tree}:{tree}/kernels"})


def test_layers_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("oapl_engine/rollout_log/log.py", "import oapl_engine.trainer.step"),
        ("oapl_engine/samples.py", "import oapl_engine.rollout_log.log"),
        ("oapl_engine/scheduler/core.py", "import oapl_engine.rollout_log.log"),
        ("kernels/oapl_kernels/group.py", "import oapl_engine.samples"),
        ("oapl_engine/scheduler/buffer.py", "import oapl_engine.scheduler.core"),
        ("oapl_engine/weights/receiver/update.py", "import oapl_engine.weights.attest"),
    ],
)
def test_a_crossing_of_layers_or_a_circle_is_caught(tmp_path, file, line):
    for name in ("oapl_engine", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text().replace("\nfrom ", f"\n{line}\nfrom ", 1) + f"\n{line}\n")
    assert lint(tmp_path).returncode != 0


def test_kernels_is_no_package():
    """kernels/__init__.py would shadow the PyPI package `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_kernels_loads_torch_only():
    others = ("triton", "vllm", "transformers", "oapl_engine")
    code = f"import sys, oapl_kernels; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_command_line_is_quick_to_load():
    code = "import sys, oapl_engine.cli; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_pickle_and_no_drawer():
    pickled = re.compile(r"\bpickle\.|torch\.load\((?!.*weights_only=True)|send_object|gather_object|broadcast_object")
    for path in SOURCES:
        assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc", "manager"), path
        assert not pickled.search(path.read_text()), f"{path} pickles"


def count_statements(tree):
    """Statements without imports and docstrings: formatting does not change the number."""
    text = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    skipped = sum(isinstance(n.value.value, str) for n in text)
    return (
        sum(isinstance(n, ast.stmt) and not isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(tree))
        - skipped
    )


def over_the_limits(text, file="x.py"):
    """What of a file is longer or has more state than the limits allow. Frozen records may have more fields."""
    tree = ast.parse(text)
    found = [file] if text.count("\n") > FILE_LINES else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if isinstance(node, ast.ClassDef):
            too_much = lines > CLASS_LINES or (not is_frozen(node) and len(attributes(node)) > ATTRIBUTES)
        else:
            too_much = lines > FUNCTION_LINES
        found += [f"{file}: {node.name}"] if too_much else []
    return found


def attributes(node):
    fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return fields | {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}


def is_frozen(node):
    return any("frozen=True" in ast.unparse(n) for n in (*node.decorator_list, *node.keywords)) or any(
        ast.unparse(base) == "NamedTuple" for base in node.bases
    )


def test_the_core_stays_small():
    assert sum(count_statements(ast.parse(p.read_text())) for p in PYTHON) <= STATEMENTS, "what can come out?"
    native = [p for p in SOURCES if p not in PYTHON] + list((ROOT / "csrc").glob("*.inc"))
    assert sum(len(p.read_text().splitlines()) for p in native) <= NATIVE_LINES


def test_files_classes_and_functions_stay_small():
    assert [name for p in PYTHON for name in over_the_limits(p.read_text(), str(p.relative_to(ROOT)))] == []


def test_the_meter_measures():
    long_function = "def f():\n" + "    x = 1\n" * 45
    wide_class = "class A:\n    def __init__(self):\n" + "".join(f"        self.x{i} = 1\n" for i in range(13))
    record = "@dataclass(frozen=True)\nclass B:\n" + "".join(f"    x{i}: int\n" for i in range(13))
    assert over_the_limits(long_function) == ["x.py: f"]
    assert over_the_limits(wide_class) == ["x.py: A"]
    assert over_the_limits(record) == []
    assert over_the_limits("x = 1\n" * 351) == ["x.py"]
    assert count_statements(ast.parse('"""Doc."""\nimport os\nif os:\n    x = 1; y = 2\n')) == 3


def name_tests(text):
    """Lines that compare something with the name of an objective, a mode or a transport."""
    names = {*OBJECTIVES, *MODES, *TRANSPORTS}
    tested = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Compare | ast.MatchValue)]
    return [c.lineno for n in tested for c in ast.walk(n) if isinstance(c, ast.Constant) and c.value in names]


def test_no_file_tests_the_name_of_a_tables_member():
    """Objectives, modes and transports declare what the rest of the code asks for."""
    assert {str(p): lines for p in PYTHON if (lines := name_tests(p.read_text()))} == {}
    assert name_tests('if mode == "offline" or name in ("grpo", "x"):\n    pass\n') == [1, 1]


TEXT_FOLDERS = ("oapl_engine", "kernels", "benchmarks", "experiments", "tests/support")
TEXT = [p for d in TEXT_FOLDERS for p in (ROOT / d).rglob("*.py")]


def reads_as_the_terminal(text):
    """Lines that read or write text in the terminal's encoding. Ruff's PLW1514 is a preview rule, does not know that a
    name holds a Path, and says nothing of processes."""
    found = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("read_text", "write_text") or keywords.keys() & {"text", "universal_newlines"}:
            found += [call.lineno] if "encoding" not in keywords else []
        elif name in ("open", "fdopen") and "encoding" not in keywords:
            words = [a.value for a in (*call.args, *keywords.values()) if isinstance(a, ast.Constant)]
            modes = [word for word in words if isinstance(word, str) and re.fullmatch(r"[rwax][+tb]*", word)]
            plain = isinstance(call.func, ast.Name) and not modes  # open(path)
            found += [call.lineno] if plain or any("b" not in mode for mode in modes) else []
    return found


def test_text_is_utf8_whatever_the_terminal_is():
    """A recipe that was kept in the encoding of one terminal is refused on another."""
    found = {str(p): reads_as_the_terminal(p.read_text(encoding="utf-8")) for p in TEXT}
    assert {file: lines for file, lines in found.items() if lines} == {}
    bad = 'open(p)\nopen(p, "a")\np.read_text()\np.open(mode="w")\nos.fdopen(1, "w")\nrun(x, text=True)\n'
    good = 'open(p, "ab+")\np.read_text(encoding="utf-8")\nos.open(p, 0)\ndriver.open(m)\nrun(x, encoding="utf-8")\n'
    assert reads_as_the_terminal(bad) == [1, 2, 3, 4, 5, 6]
    assert reads_as_the_terminal(good) == []


def test_ruff_and_types():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
