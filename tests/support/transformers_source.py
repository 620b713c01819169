"""Parts of transformers that cannot be imported without torchvision, taken out of their files as oracles."""

import __future__

import ast
import math
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers


def functions(file: str, *names: str) -> SimpleNamespace:
    """Functions and methods of ``transformers/models/<file>`` that need no torchvision themselves."""
    path = Path(transformers.__file__).parent / "models" / file
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(found) == len(names)
    space = {"math": math, "lru_cache": lru_cache, "defaultdict": defaultdict, "np": np, "torch": torch}
    module = ast.Module(body=found, type_ignores=[])
    exec(compile(module, file, "exec", flags=__future__.annotations.compiler_flag), space)
    return SimpleNamespace(**{name: space[name] for name in names})
