"""The vision features of images: each image is encoded once, as long as the weights stay."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.policy import ImageFeatures, image_features
from axpo.tree import Image

Part = tuple[Image, int, int]  # the tokens of an image, from where to where
_KEPT = 256  # images


class Pictures:
    """Encodes images, and keeps the features of the last ones that were asked for."""

    def __init__(self, model: PreTrainedModel, chat: Chat) -> None:
        self._model = model
        self._chat = chat
        self._features: OrderedDict[bytes, tuple[Tensor, list[Tensor]]] = OrderedDict()

    def reset(self) -> None:
        """The weights have changed."""
        self._features.clear()

    def features(self, parts: Sequence[Part]) -> ImageFeatures:
        """The features of these parts, one entry each."""
        missing = list({image.data: image for image, _, _ in parts if image.data not in self._features}.values())
        if missing:
            new = image_features(self._model, *self._chat.pixels(missing))
            for index, image in enumerate(missing):
                layers = [layer[index].clone() for layer in new.deepstack_features]
                self._features[image.data] = (new.pooler_output[index].clone(), layers)
        pooled, deep = [], []
        for image, start, end in parts:
            self._features.move_to_end(image.data)
            features, layers = self._features[image.data]
            pooled.append(features[start:end])
            deep.append([layer[start:end] for layer in layers])
        while len(self._features) > _KEPT:
            self._features.popitem(last=False)
        return ImageFeatures(pooled, list(zip(*deep, strict=True)))
