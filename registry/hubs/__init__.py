"""Where model files come from: one module a hub.

A hub's module has two functions, `fetch(source, cache, report) -> Fetched` and `list_files(source)` (see `base.py`).
They are called only in the child program `python -P -m registry.hubs.fetch`, so that whoever runs that can end it at
any time.
This package itself imports no hub's library: `find_cached` is cheap enough to ask before each start.
"""

from __future__ import annotations

from registry.hubs.cache import find_cached

__all__ = ["HUBS", "find_cached"]

# hub -> its module
HUBS: dict[str, str] = {
    "csghub": "registry.hubs.csghub",
    "huggingface": "registry.hubs.huggingface",
    "local": "registry.hubs.local",
    "modelscope": "registry.hubs.modelscope",
    "openmind_hub": "registry.hubs.openmind_hub",
    "pypi": "registry.hubs.pypi",
}
