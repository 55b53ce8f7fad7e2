"""Import this before transformers where torchvision is installed on a machine without CUDA.

Its wheel is built for CUDA and lacks these operators on a CPU, where TRL and vLLM import it all the same. Their schemas
are enough: nobody here calls them. They are defined when torchvision is imported, so that a .pth file can name this
module for an environment: the processes that vLLM starts then know them too, and other processes do not load torch.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

_KEPT = []  # a library's operators go with it


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            operators = torch.library.Library("torchvision", "DEF")
            operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(operators)


sys.meta_path.insert(0, _BeforeTorchvision())
