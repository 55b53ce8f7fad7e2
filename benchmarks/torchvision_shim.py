"""Import this before transformers where torchvision is installed on a machine without CUDA.

TRL's imports need torchvision, whose wheel is built for CUDA and lacks these operators on a CPU. Their schemas are
enough: nobody here calls them.
"""

import torch

_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
