"""A compiled module of the package: loaded at the first use, or a sentence that says why it can't be.

"Never built", "built for another Python", "built from another version" and "does not load" are different errors, each
with what to do about it. Nothing is cached but a module that has loaded whole.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

# First of all: torch's wheels bring the OpenMP runtime under the name that _native asks for. Loaded before it, one
# runtime, and one pool of threads, serves both.
import torch  # noqa: F401

from .._version import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


class Compiled:
    """The loader of one compiled module.

    Args:
        name: of the file in the package, less its suffix, such as "_native".
        variable: the environment variable that names another file to load (instrumented builds).
        rebuild: how to build it, a sentence.
        note: under which key setup.py's note in the package says why it wasn't built.
    """

    def __init__(self, name: str, variable: str, rebuild: str, note: str) -> None:
        self.file, self.name = name, f"inti_kernels.{name}"
        self.variable, self.rebuild, self.note = variable, rebuild, note
        self._lock = threading.Lock()
        self._module: ModuleType | None = None

    def load(self) -> ModuleType:
        """Load the module, once.

        Raises:
            RuntimeError: it was never built, is built for another Python or from another version of the sources, or
                does not load; the message says which, and how to rebuild.
        """
        with self._lock:
            if self._module is None:
                self._module = self._load(self._find())
            return self._module

    def why_not(self) -> list[str]:
        """Why the module can't be used here, as sentences; an empty list if it can. Loads it to find out."""
        try:
            self.load()
        except RuntimeError as error:
            return [str(error)]
        return []

    def _find(self) -> Path:
        """The file to load; RuntimeError with the reason if there is none."""
        if named := os.environ.get(self.variable):
            if not Path(named).is_file():
                raise RuntimeError(
                    f"{self.variable} must name the compiled module's file, got {named!r}, which does not exist; "
                    "correct it or unset it."
                )
            return Path(named)
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (path := _PACKAGE / f"{self.file}{suffix}").is_file():
                return path
        tag = sys.implementation.cache_tag
        patterns = (f"{self.file}*.so", f"{self.file}*.pyd")
        if others := sorted(path.name for pattern in patterns for path in _PACKAGE.glob(pattern)):
            raise RuntimeError(
                f"{self.name} was built for another Python: {', '.join(others)} is there, and this is {tag}. "
                f"{self.rebuild}"
            )
        remedy = "" if sys.platform == "win32" else f" {self.rebuild}"
        raise RuntimeError(f"{self.name} was never built ({self._why_never_built()}).{remedy}")

    def _why_never_built(self) -> str:
        """The reason that setup.py left in the package, as the middle of a sentence."""
        try:
            note = json.loads((_PACKAGE / "_build.json").read_text())
        except FileNotFoundError:
            return "the package was imported from its sources without being installed"
        if self.note not in note:
            return "the package was installed without it"
        return note[self.note] or "its last build did not finish"

    def _load(self, path: Path) -> ModuleType:
        """Load the extension module from a file and put it into sys.modules, whole or not at all."""
        loader = importlib.machinery.ExtensionFileLoader(self.name, str(path))
        spec = importlib.util.spec_from_file_location(self.name, path, loader=loader)
        assert spec is not None
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except Exception as error:
            sys.modules.pop(self.name, None)
            raise RuntimeError(f"{self.name} is there ({path}) but does not load: {error}. {self.rebuild}") from error
        built = module.build_info()["version"]
        if built != __version__:
            raise RuntimeError(
                f"{self.name} was built from version {built} of the sources ({path}), and this is {__version__}. "
                f"{self.rebuild}"
            )
        sys.modules[self.name] = module
        return module
