"""Make .venv and install the CPU or the CUDA profile into it. Standard library only; runs on any Python 3.6+ to say so.

Usage: python3 .ci/bootstrap.py     (make does this; quick when nothing changed)
"""

import glob
import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
LOCK = os.path.join(ROOT, "requirements-cpu.txt")
LOG = os.path.join(VENV, "install.log")
STAMP = os.path.join(VENV, "installed")
DISK_GB = {"cpu": 6, "cuda": 20}
NEEDS_COMPILER = ("pycosat",)  # no wheel exists; one reasoning-gym task uses it


def main():
    check_python(sys.version_info)
    profile = "cuda" if has_nvidia_device() else "cpu"
    stamp = fingerprint(profile)
    if os.path.exists(STAMP) and open(STAMP).read() == stamp:
        return
    check_disk(shutil.disk_usage(ROOT).free, DISK_GB[profile])
    started = time.time()
    print("setting up .venv with the %s profile (minutes the first time; log: .venv/install.log)" % profile, flush=True)
    if not os.path.exists(os.path.join(VENV, "bin", "pip")):
        make_venv()
    (install_cpu if profile == "cpu" else install_cuda)()
    with open(STAMP, "w") as file:
        file.write(stamp)
    print("setup done in %.0f s" % (time.time() - started), flush=True)


def check_python(version):
    if not (3, 11) <= tuple(version[:2]) < (3, 15):
        fail(
            "Python %d.%d is not supported: this project needs 3.11 to 3.14. "
            "Name one with: make PYTHON=/path/to/python3.12 test" % (version[0], version[1])
        )


def check_disk(free, needed_gb):
    if free < needed_gb * 1e9:
        fail(
            "%.1f GB are free on the disk of this checkout, the packages need about %d GB: free some space, or clone "
            "to another disk" % (free / 1e9, needed_gb)
        )


def has_nvidia_device():
    return os.path.exists("/dev/nvidia0") or bool(os.environ.get("OAPL_PROFILE") == "cuda")


def fingerprint(profile):
    digest = hashlib.sha256((profile + sys.version).encode())
    sources = [LOCK, __file__, os.path.join(ROOT, "setup.py"), os.path.join(ROOT, "pyproject.toml")]
    for path in sources + sorted(glob.glob(os.path.join(ROOT, "csrc", "*"))):
        digest.update(open(path, "rb").read())
    return digest.hexdigest()


def make_venv():
    if subprocess.call([sys.executable, "-m", "venv", VENV], stdout=subprocess.DEVNULL) != 0:
        fail("python3 -m venv failed: install the venv module (Debian: apt install python3-venv)")


def install_cpu():
    with open(LOCK) as file:
        names = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    pinned = [n for n in names if n.split("==")[0] not in NEEDS_COMPILER]
    pip(["--no-deps"] + pinned, "the CPU profile (requirements-cpu.txt)")
    for name in (n for n in names if n.split("==")[0] in NEEDS_COMPILER):
        if not try_pip(["--no-deps", name]):
            print("note: %s needs a C compiler and was left out; only the zebra_puzzles task misses it" % name)
    pip(["--no-deps", "--no-build-isolation", "-e", ROOT], "this project")
    if not glob.glob(os.path.join(ROOT, "kernels", "oapl_kernels", "_cpu*.so")):
        print("note: no C++ compiler here, so oapl_kernels uses its torch backend on CPU")


def install_cuda():
    pip(["-e", ROOT + "[cuda,test]"], "the CUDA profile (pyproject.toml)")
    if not try_pip(["--no-build-isolation", "flash-attn"]):
        print("note: flash-attn did not install; torch's built-in varlen attention takes its place")


def try_pip(arguments):
    command = [os.path.join(VENV, "bin", "python"), "-m", "pip", "install", "--disable-pip-version-check"] + arguments
    with open(LOG, "a") as log:
        log.write("\n$ pip install %s\n" % " ".join(arguments)[:2000])
        log.flush()
        return subprocess.call(command, stdout=log, stderr=subprocess.STDOUT) == 0


def pip(arguments, what):
    if not try_pip(arguments):
        fail("installing %s failed: %s" % (what, reason(open(LOG).read().rpartition("\n$ pip install")[2])))


def reason(log):
    """What went wrong in the words of someone who can mend it."""
    if "No matching distribution found for torch" in log and "(from versions: none)" not in log:
        return (
            "your package index has no CPU build of torch (2.13.0+cpu): add PyTorch's index of CPU wheels, named on "
            "its 'Get Started' page, with PIP_EXTRA_INDEX_URL"
        )
    offline = ("NewConnectionError", "name resolution", "ConnectTimeoutError", "ProxyError", "(from versions: none)")
    if any(word in log for word in offline):
        return (
            "no package index answered. Is this machine offline? Connect it, or point pip at a mirror (PIP_INDEX_URL)"
        )
    if "No space left on device" in log:
        return "the disk is full"
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    return (errors[-1] if errors else "see .venv/install.log").strip()


def fail(message):
    print("setup: " + message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
