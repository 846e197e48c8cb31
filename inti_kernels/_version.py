"""The version, stated once: pyproject.toml and CMakeLists.txt read this line without importing the package."""

__version__ = "0.1.0"
