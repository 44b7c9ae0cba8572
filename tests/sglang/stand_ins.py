"""Stand-ins for what SGLang's sources import and these tests never call: kernels that need CUDA libraries,
and packages that vLLM's environment does not have. A plug-in of pytest, so that they are in place before
SGLang is imported.

Only names that are not installed get one: feature tests of the kind `try: import x` see every other package
as it is.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

import transformers.utils.import_utils as _transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NAMES = ("IPython", "gguf", "orjson", "sgl_kernel", "torchvision", "xxhash")


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__file__, module.__all__ = [], "stand-in", []
        return module

    def exec_module(self, module):
        pass

    def __init__(self):
        self.names = {name for name in NAMES if importlib.util.find_spec(name) is None}


# transformers looks for torchvision, too, and must not find this one: it remembers the first answer.
_transformers.is_torchvision_available()
_transformers.is_torchvision_greater_or_equal("0.27")
sys.meta_path.append(_StandIn())
# SGLang registers models that a newer transformers has by then.
_mapping = type(CONFIG_MAPPING)
_register = _mapping.register
_mapping.register = lambda self, key, value, exist_ok=True: _register(self, key, value, exist_ok=True)
