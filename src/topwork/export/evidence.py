"""Where a model looked, as pictures: the original with the evidence for a class laid over it.

In: a predictor, an image, a class. Out: uint8 pixels, or a JPEG file named after the image. The evidence itself is found
in ``evaluation/explain.py``.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from topwork.data.images import decode
from topwork.data.transforms import Pixels, fit_to_input, resize
from topwork.errors import ImageError, TopworkError
from topwork.export.predictor import Prediction, Predictor, read_image
from topwork.files import atomic_file

PICTURE_SIDE = 640  # pixels, of the long side


class Evidence:
    """Makes pictures for one predictor. Safe to call from several threads."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._network: Any = None
        self._lock = threading.Lock()

    def picture(self, data: bytes, label: str) -> Pixels:
        """uint8 (h, w, 3): the upright image, long side at most ``PICTURE_SIDE``, with the evidence for a class."""
        from topwork.evaluation.explain import find_evidence, overlay
        from topwork.features.feature_maps import open_network

        classifier = self.predictor.classifier
        spec = self.predictor.spec
        pixels = decode(data, min_side=max(spec.min_side, PICTURE_SIDE)).pixels
        with self._lock:
            if self._network is None:
                self._network = open_network(classifier.backbone)
            number = classifier.classes.index(label)
            found = find_evidence(
                classifier, fit_to_input(pixels, spec)[None], [[number]], self._network, self.predictor.engine
            )
        seen = found.maps[0, 0]
        scale = min(1.0, PICTURE_SIDE / max(pixels.shape[:2]))
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        return overlay(resize(pixels, height, width), seen, spec, max(float(seen.max()), 1e-9))

    def jpeg(self, data: bytes, label: str) -> bytes:
        """The picture as a JPEG file."""
        import simplejpeg

        return bytes(simplejpeg.encode_jpeg(self.picture(data, label), quality=88))

    def write(self, number: int, prediction: Prediction, folder: Path) -> None:
        """Writes the picture of a prediction as ``NUMBER-NAME.jpg``; errors have none.

        Raises:
            TopworkError: the folder cannot be written.
        """
        if prediction.label is None:
            return
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(prediction.path).stem)[:80]
        try:
            picture = self.jpeg(read_image(prediction.path), prediction.top[0][0])
            with atomic_file(folder / f"{number:06d}-{name}.jpg") as partial:
                partial.write_bytes(picture)
        except ImageError:
            return  # gone since it was read a moment ago
        except OSError as error:
            raise TopworkError(f"{folder}: cannot be written: {(error.strerror or str(error)).lower()}.") from None
