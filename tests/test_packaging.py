"""What is in the wheel and the sdist, how an install goes with and without a compiler, what the module is made of."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINUX_X86 = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux alone has")


def run_python(code: str, *, cwd: Path = ROOT, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter; a variable given as None is taken out of its environment."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={key: value for key, value in env.items() if value is not None},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to build in: without what building, testing and installing leave behind."""
    copy = tmp_path_factory.mktemp("sources") / "inti_kernels"
    ignored = shutil.ignore_patterns(
        ".*cache",
        ".git",
        ".venv",
        ".hypothesis",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "_native*",
        "_cuda*.so",
        "_build.json",
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


# What a build depends on, unset; nor is an nvcc that happens to be there to be used.
CLEAN: dict[str, str | None] = {
    **dict.fromkeys(("INTI_NATIVE", "INTI_CPU_ISAS", "CXX", "CXXFLAGS")),
    **dict.fromkeys(("INTI_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDACXX")),
    "INTI_CUDA": "off",
}


def build(tree: Path, kind: str, target: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Call the build backend, as pip does but without its isolation: what it needs is in the `test` extra."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    return run_python(code, cwd=tree, **{**CLEAN, **environment})


@pytest.fixture(scope="module")
def native_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel with the native module, for one instruction set to be quick."""
    target = tmp_path_factory.mktemp("native")
    done = build(tree, "wheel", target, INTI_NATIVE="require", INTI_CPU_ISAS="baseline")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        yield wheel


@pytest.fixture
def no_compiler(tmp_path: Path) -> str:
    """A PATH on which there is no compiler."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return str(folder)


def modules_on_disk() -> set[str]:
    """The package's files as a wheel should name them."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "inti_kernels").rglob("*.py")}
    benchmarks = {f"inti_kernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "benchmarks").rglob("*.py")}
    return package | benchmarks | {"inti_kernels/py.typed"}


def test_wheel_holds_the_package_and_the_module(native_wheel: zipfile.ZipFile) -> None:
    names = {name for name in native_wheel.namelist() if ".dist-info/" not in name}
    modules = {name for name in names if Path(name).name.startswith("_native")}
    assert len(modules) == 1
    assert names - modules == modules_on_disk() | {"inti_kernels/_build.json"}
    assert "py3-none-any" not in native_wheel.filename


def test_wheel_metadata(native_wheel: zipfile.ZipFile) -> None:
    from inti_kernels import __version__

    (path,) = (name for name in native_wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = native_wheel.read(path).decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    required = set(re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE))
    assert {name for name in required if "extra ==" not in name} == {
        "torch>=2.7",
        "numpy",
        'triton; platform_system == "Linux"',
    }
    assert set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)) == {
        "test",
        "models",
        "demo",
        "bench",
    }


def test_module_of_the_wheel_loads_and_knows_its_build(native_wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    (name,) = (name for name in native_wheel.namelist() if "/_native." in name)
    code = "from inti_kernels.backends import native; print(native.load().__file__, native.build_info()['cpu_isas'])"
    done = run_python(code, INTI_NATIVE_LIBRARY=native_wheel.extract(name, tmp_path), INTI_CPU=None)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "baseline" in done.stdout
    assert "avx" not in done.stdout.removeprefix(str(tmp_path))


def test_sdist_can_be_built_and_tested(tree: Path, tmp_path: Path) -> None:
    done = build(tree, "sdist", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "python", "benchmarks", "tests", "inti_kernels")
    sources = {
        path.relative_to(tree).as_posix()
        for folder in folders
        for path in (tree / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".inc", ".in", ".cmake", ".md") or path.name == "CMakeLists.txt"
    }
    top = {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}
    assert sources | top <= names
    assert not [name for name in names if Path(name).suffix in (".so", ".pyd", ".pyc") or name.endswith("_build.json")]


def test_without_a_compiler_the_install_is_pure_and_says_why(tree: Path, tmp_path: Path, no_compiler: str) -> None:
    done = build(tree, "wheel", tmp_path / "wheel", PATH=no_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a pure install, without the native module: no C++ compiler was found" in done.stdout
    (path,) = (tmp_path / "wheel").glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == modules_on_disk() | {"inti_kernels/_build.json"}
        wheel.extractall(tmp_path / "site")
    code = "from inti_kernels.backends import native; print(native.__file__, *native.why_not_native())"
    done = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), INTI_NATIVE_LIBRARY=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "was never built (no C++ compiler was found at install time)" in done.stdout
    assert "pip install --force-reinstall" in done.stdout


def test_a_missing_compiler_is_an_error_where_the_module_is_required(
    tree: Path, tmp_path: Path, no_compiler: str
) -> None:
    done = build(tree, "wheel", tmp_path, PATH=no_compiler, INTI_NATIVE="require")
    assert done.returncode != 0
    assert "INTI_NATIVE=require, but the native module cannot be built: no C++ compiler was found" in done.stderr


def test_off_builds_nothing(tree: Path, tmp_path: Path) -> None:
    done = build(tree, "wheel", tmp_path, INTI_NATIVE="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"INTI_NATIVE": "yes"}, "INTI_NATIVE must be auto, require or off, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler', and there is no such program"),
    ],
)
def test_a_wrong_choice_is_an_error(tree: Path, tmp_path: Path, environment: dict[str, str], message: str) -> None:
    done = build(tree, "wheel", tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_compiler_that_fails_is_an_error_with_its_log(tree: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'internal compiler error: planted here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tree, "wheel", tmp_path / "wheel", CXX=str(compiler))
    assert done.returncode != 0
    assert "internal compiler error: planted here" in done.stdout
    assert "building inti_kernels._native failed; the log is above" in done.stderr
    assert not list((tmp_path / "wheel").glob("*.whl"))


def test_an_unknown_instruction_set_is_an_error(tree: Path, tmp_path: Path) -> None:
    done = build(tree, "wheel", tmp_path, INTI_CPU_ISAS="baseline,avx1024")
    assert done.returncode != 0
    assert "INTI_CPU_ISAS names 'avx1024'" in done.stdout


def test_import_is_light() -> None:
    """No native code, no optional package, and little time beyond torch's own."""
    code = """
        import sys, time
        import torch
        before, start = set(sys.modules), time.perf_counter()
        import inti_kernels
        seconds = time.perf_counter() - start
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        optional = {"matplotlib", "rich", "tqdm", "transformers", "timm", "av", "skvideo", "triton", "hypothesis"}
        print(seconds)
        print(sorted(new & optional), "inti_kernels._native" in sys.modules)
    """
    runs = [run_python(code) for _ in range(2)]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    assert min(float(done.stdout.split()[0]) for done in runs) < 0.5
    assert runs[0].stdout.splitlines()[1] == "[] False"


@needs_linux
def test_import_maps_no_native_code_and_use_adds_no_second_openmp() -> None:
    code = """
        import pathlib
        def mapped(word):
            lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
            return sorted({line.split()[-1] for line in lines if word in line.rpartition("/")[2]})
        import inti_kernels
        print(len(mapped("_native.")), len(mapped("libgomp")))
        import torch
        x, logits = torch.randn(2, 4, 50, 64), torch.randn(2, 2, 50, 2)
        inti_kernels.ops.pair_interpolate(x, logits, backend="cpu")
        print(len(mapped("_native.")), *mapped("libgomp"))
    """
    done = run_python(code, INTI_BACKEND=None)
    assert done.returncode == 0, done.stderr
    imported, used = (line.split() for line in done.stdout.splitlines())
    assert imported[0] == "0", "import inti_kernels loaded the native module"
    assert used[0] == "1"
    assert len(used[1:]) == int(imported[1]) == 1, f"not one OpenMP runtime but {used[1:]}"


def vector_instructions(library: str) -> Iterator[tuple[str, str]]:
    """Every VEX- or EVEX-encoded instruction of a library, with the demangled name of the symbol that it lies in."""
    listing = subprocess.run(["objdump", "-d", "-C", "-w", library], capture_output=True, text=True, check=True).stdout
    # In 64-bit mode C4, C5 and 62 begin nothing else; prefixes for the segment and the address size may precede them.
    encoded = re.compile(r"^\s*[0-9a-f]+:\t(?:(?:2e|36|3e|26|64|65|67) )*(?:c4|c5|62) ")
    symbol = ""
    for line in listing.splitlines():
        if encoded.match(line):
            yield symbol, line
        elif header := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            symbol = header[1]


@pytest.mark.skipif(not LINUX_X86, reason="AVX is of x86-64, and the listing is that of Linux's objdump")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, from binutils")
def test_vector_code_lies_in_the_namespace_of_its_instruction_set() -> None:
    """Anywhere else it could run on a processor that doesn't have it."""
    from inti_kernels.backends import native

    seen, outside = set(), []
    for symbol, line in vector_instructions(native.load().__file__):
        namespaces = set(re.findall(r"\binti::(avx2|avx512)::", symbol))
        seen |= namespaces
        # Zero or two namespaces, or 512-bit registers and masks outside avx512: it doesn't belong there.
        wide = re.search(r"%zmm|%k[0-7]", line) is not None
        if len(namespaces) != 1 or (wide and namespaces != {"avx512"}):
            outside.append(f"{symbol}: {line.strip()}")
    assert not outside, "\n".join(outside[:20])
    assert seen == set(native.build_info()["cpu_isas"]) - {"baseline"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("capabilities", "torch"),
    [("7.0", "2.7.1"), ("7.2", "2.7.1"), ("7.5", "newest"), ("9.0", "newest"), ("7.0\n8.0", "2.7.1"), (None, "newest")],
)
def test_makefile_chooses_torch_by_the_gpu(tmp_path: Path, capabilities: str | None, torch: str) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n" if capabilities is None else f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    smi.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env.pop("TORCH", None)
    env.pop("MAKEFLAGS", None)
    command = ["make", "--no-print-directory", "help"]
    text = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[0].endswith(f"torch here: {torch}")
    text = subprocess.run([*command, "TORCH=2.8.0"], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    assert text.splitlines()[0].endswith("torch here: 2.8.0")


def test_readme_lists_the_environment_variables() -> None:
    """Every INTI_ variable that the sources read is in the README's table, and the table names no other."""
    places = [ROOT / "setup.py", ROOT / "tests" / "conftest.py", ROOT / "tests" / "mutants.py"]
    for folder in ("inti_kernels", "benchmarks", "csrc", "python"):
        places += (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    text = "\n".join(path.read_text() for path in places if path.is_file())
    read = set(re.findall(r"[\"'](INTI_[A-Z0-9_]+)[\"']", text))
    table = "\n".join(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|"))
    assert set(re.findall(r"\bINTI_[A-Z0-9_]+", table)) == read
