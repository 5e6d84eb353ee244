"""torchvision, whatever PyTorch it was built for.

PyPI has it built for CUDA; beside a PyTorch for CPUs its import fails, because its operators are missing.
Networks for classification use none of them, so it is enough that they are declared.
"""

import re
import sys

import torch

_declared = []


def import_torchvision():
    """The module; raises ImportError where it is not installed."""
    while True:
        try:
            import torchvision
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            _declared.append(library)  # what it declares goes with it
        else:
            return torchvision
