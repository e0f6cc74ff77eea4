"""Starts a worker under any Python: `python -P .../engines/workers NAME ARGUMENTS...`.

Run by its path, so that the Python of an engine's own environment needs nothing of ours installed. The worker finds
its siblings as `engines.workers`, and nothing else of the gateway's packages, whose libraries may clash with its own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Run the module that the first argument names."""
    folders: dict[str, list[str]] = {"engines": [], "engines.workers": [str(Path(__file__).resolve().parent)]}
    for name, path in folders.items():
        package = ModuleType(name)
        package.__path__ = path
        sys.modules[name] = package
    name = sys.argv.pop(1)
    runpy.run_module(f"engines.workers.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
