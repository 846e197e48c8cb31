"""Unpacks nvcc 11.8 and g++-11 into a folder, without installing either: `make test-nvcc` compiles for sm_70 with them.

    python tests/unpack_nvcc.py FOLDER

They are Debian 12's packages nvidia-cuda-toolkit (in its section non-free) and g++-11, fetched by apt-get with lists of
its own, so that the machine's sources stay as they are and nobody has to be root. FOLDER/cuda then looks as NVIDIA's
own installer would have it, with bin/nvcc, and FOLDER/root/usr/bin has g++-11.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = (
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main non-free"
)
WHOLE = ("nvidia-cuda-toolkit", "libcu++-dev", "g++-11", "gcc-11", "cpp-11", "libgcc-11-dev", "libstdc++-11-dev")
# 5 GB unpacked; of all its libraries only the runtime's are needed.
PARTIAL = "nvidia-cuda-dev"
WANTED = ("./usr/include/*", "*/libcudart_static.a", "*/libcudadevrt.a", "*/libculibos.a")
PROGRAMS = ("ptxas", "cudafe++", "fatbinary", "nvlink", "bin2c", "cuobjdump", "nvdisasm")
# Where nvcc looks for the others: beside itself, and not in /usr/lib as Debian has it.
PROFILE = """\
TOP = $(_HERE_)/..
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/bin:$(CICC_PATH):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
"""


def fetch(folder: Path) -> list[Path]:
    """Download the packages; the lists stay in the folder too."""
    lists, cache, packages = folder / "lists", folder / "cache", folder / "packages"
    for made in (lists / "partial", cache / "archives" / "partial", packages):
        made.mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(SOURCE + "\n")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": lists,
        "Dir::Cache": cache,
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *WHOLE, PARTIAL], check=True, cwd=packages)
    return sorted(packages.glob("*.deb"))


def unpack(packages: list[Path], root: Path) -> None:
    """Unpack the packages below root."""
    for package in packages:
        if not package.name.startswith(PARTIAL):
            subprocess.run(["dpkg", "--extract", package, root], check=True)
            continue
        with subprocess.Popen(["dpkg", "--fsys-tarfile", package], stdout=subprocess.PIPE) as tar:
            extract = ["tar", "--extract", "--directory", root, "--wildcards", *WANTED]
            subprocess.run(extract, stdin=tar.stdout, check=True)
    # This link leads to the library of an installed g++; the machine's newer one does for what g++-11 compiles.
    library = root / "usr/lib/gcc/x86_64-linux-gnu/11/libstdc++.so"
    installed = subprocess.run(["g++", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True)
    library.unlink()
    library.symlink_to(Path(installed.stdout.strip()).resolve())


def arrange(root: Path, cuda: Path) -> None:
    """Lay the toolkit out as nvcc and CMake know it."""
    toolkit = root / "usr/lib/nvidia-cuda-toolkit"
    for made in ("bin", "lib64", "nvvm/bin"):
        (cuda / made).mkdir(parents=True)
    for program in PROGRAMS:
        shutil.copy2(root / "usr/bin" / program, cuda / "bin")
    shutil.copy2(toolkit / "bin/nvcc", cuda / "bin")
    shutil.copytree(toolkit / "bin/crt", cuda / "bin/crt")
    shutil.copy2(toolkit / "bin/cicc", cuda / "nvvm/bin")
    shutil.copytree(toolkit / "libdevice", cuda / "nvvm/libdevice")
    for library in (root / "usr/lib/x86_64-linux-gnu").glob("*.a"):
        shutil.copy2(library, cuda / "lib64")
    (cuda / "include").symlink_to(Path("../root/usr/include"))
    (cuda / "bin/nvcc.profile").write_text(PROFILE)


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    if (folder / "complete").exists():
        return 0
    if missing := [name for name in ("apt-get", "dpkg", "g++") if shutil.which(name) is None]:
        raise SystemExit(f"unpack_nvcc: needs {' and '.join(missing)}: a Debian or Ubuntu system with g++")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unpack(fetch(folder), folder / "root")
    arrange(folder / "root", folder / "cuda")
    shutil.rmtree(folder / "packages")
    (folder / "complete").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
