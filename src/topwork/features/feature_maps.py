"""The network opened up: besides the features, the last map before they are pooled, also for pixels between 0 and 255.

In: (B, H, W, 3), uint8 or float32. Out: :class:`Opened`. Explanations need the map, and checks of the normalization need
pixel values that uint8 cannot hold; embedding needs neither and stays with ``features/engine.py``.

The map comes from the compiled form itself: its graph is followed backwards from the pooled features to the mean over
positions. So a model folder needs no second file, and nothing here needs torch where OpenVINO runs the network. Where
the features are no plain mean of a map (a norm after pooling, class tokens) there is no map, and ``maps`` is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from topwork.errors import ModelError
from topwork.features.engine import (
    BATCH,
    _openvino,
    compiled_form,
    feature_network,
    feature_stages,
    map_layout,
    openvino_core,
    rounded,
    with_batch,
)
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED
from topwork.models.head import LinearHead

Images = NDArray[Any]
_PASSED_OVER = ("Reshape", "Squeeze", "Unsqueeze", "Convert")
# How far the mean of the map may be from the features, as a share of their spread; bf16 rounds at about 0.004.
_CLOSE = 0.05


@dataclass(frozen=True, eq=False)
class Opened:
    """What the network makes of B images.

    Attributes:
        blocks: ``last`` (B, D) and ``stages`` (B, E) float16, as the engine gives them.
        maps: (B, D, h, w) float32 whose mean over h and w is ``last``; None if there is no such map.
    """

    blocks: dict[str, NDArray[np.float16]]
    maps: NDArray[np.float32] | None


class OpenNetwork(Protocol):
    """Anything that gives features and the last map."""

    def run(self, images: Images) -> Opened:
        """Features and maps of (B, H, W, 3), uint8 or float32 in 0..255 and beyond, any B."""

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """See :meth:`TorchNetwork.gradient_maps`."""


def open_network(backbone: Backbone) -> OpenNetwork:
    """The opened form of a backbone, or of the network in a model folder, in f32; without mirrored positions."""
    own = backbone.folder / COMPILED[0]
    has_own = own.is_file() and backbone.spec.mirror == "none"
    backbone = backbone.with_spec(mirror="none")
    try:
        xml = own if has_own else compiled_form(backbone)
        return OpenVINONetwork(xml, backbone) if xml is not None else TorchNetwork(backbone)
    except ImportError:  # OpenVINO is not installed here
        return TorchNetwork(backbone)


class OpenVINONetwork:
    """The compiled form with a float input and the map as a third output."""

    def __init__(self, xml: Path, backbone: Backbone) -> None:
        self._backbone = backbone
        self._by_torch: TorchNetwork | None = None  # OpenVINO has no gradients
        ov = _openvino()
        core = openvino_core()
        try:
            model, self._is_channels_last = _opened(ov, with_batch(core.read_model(xml), BATCH))
            self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise ModelError(f"{xml}: cannot be compiled: {str(error).splitlines()[0]}") from None

    def run(self, images: Images) -> Opened:
        """The last, incomplete batch is filled up."""
        chunks = []
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            padded = np.zeros((BATCH, *images.shape[1:]), np.float32)
            padded[: len(some)] = some
            outputs = self._compiled.create_infer_request().infer({0: padded})
            chunks.append([np.array(outputs[number][: len(some)]) for number in range(len(self._compiled.outputs))])
        last, stages, *maps = (np.concatenate(column) for column in zip(*chunks, strict=True))
        return _checked(last, stages, maps[0] if maps else None, self._is_channels_last)

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """See :meth:`TorchNetwork.gradient_maps`."""
        if self._by_torch is None:
            self._by_torch = TorchNetwork(self._backbone)
        return self._by_torch.gradient_maps(head, images, labels)


class TorchNetwork:
    """The network run by torch in f32."""

    def __init__(self, backbone: Backbone) -> None:
        self.module: Any = feature_network(backbone)
        self._backbone = backbone

    def run(self, images: Images) -> Opened:
        """Batches of the engine's size, so that memory stays flat."""
        import torch

        chunks = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                some = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH], np.float32))
                last, stages = self.module(some)
                normalized = (some.permute(0, 3, 1, 2) - self.module.mean) / self.module.std
                maps = self.module.network.forward_features(normalized)
                found = [last, stages, maps] if getattr(maps, "ndim", 0) == 4 else [last, stages]
                chunks.append([value.numpy() for value in found])
        last, stages, *maps = (np.concatenate(column) for column in zip(*chunks, strict=True))
        is_channels_last = getattr(self.module.network, "output_fmt", "NCHW") == "NHWC"
        return _checked(last, stages, maps[0] if maps else None, is_channels_last)

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """(N, K, h, w) evidence for the classes (N, K) by gradient times activation, one backward pass for each of K.

        HiResCAM (Draelos and Carin 2020, arXiv 2011.08891, eq. 3) on the tokens before the last block: the positions
        behind it do not reach the logits of a network that reads its class token. A head that reads earlier stages is
        explained at the first of them. In logits relative to the mean of the classes.

        Returns:
            None if no position of such a layer reaches the logits.
        """
        import torch

        names = self._explained_layers("stages" in head.transform.blocks)
        kept: dict[str, Any] = {}
        hooks = [self.module.network.get_submodule(name).register_forward_hook(_keeper(kept, name)) for name in names]
        chunks = []
        try:
            for start in range(0, len(images), BATCH):
                some = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH], np.float32))
                with torch.enable_grad():
                    logits = _logits(head, self.module(some.requires_grad_()))
                chunks.append(self._backward(logits, labels[start : start + BATCH], [kept[name] for name in names]))
        finally:
            for hook in hooks:
                hook.remove()
        whole = [chunk for chunk in chunks if chunk is not None]
        return np.concatenate(whole) if len(whole) == len(chunks) else None

    def _explained_layers(self, reads_stages: bool) -> list[str]:
        """Where to look, the best place first."""
        if reads_stages:
            return feature_stages(self._backbone)[:1]
        ends = [stage.module for stage in self._backbone.stages if stage.module]
        container, _, number = (ends or [""])[-1].rpartition(".")
        before = [f"{container}.{int(number) - 1}"] if number.isdecimal() and int(number) > 0 else []
        return [*ends[-1:], *before, *ends[-2:-1]]

    def _backward(self, logits: Any, labels: NDArray[np.int64], layers: Sequence[Any]) -> NDArray[np.float32] | None:
        import torch

        wanted = logits.gather(1, torch.from_numpy(labels))
        for layer in layers:
            maps = []
            for column in wanted.T:
                (gradient,) = torch.autograd.grad(column.sum(), layer, retain_graph=True, allow_unused=True)
                if gradient is None:
                    break
                maps.append(self._positions(gradient * layer))
            if len(maps) == wanted.shape[1] and any(bool(one.any()) for one in maps):
                return np.stack([one.detach().numpy() for one in maps], 1)
        return None

    def _positions(self, values: Any) -> Any:
        """Sums over channels; tokens become a grid of the input's shape, without those that stand for no position."""
        n_prefix, is_channels_last = map_layout(self.module.network)
        if values.ndim == 4:
            return values.sum(3 if is_channels_last else 1)
        spec, flat = self._backbone.spec, values[:, n_prefix:].sum(2)
        rows = max(1, round((flat.shape[1] * spec.height / spec.width) ** 0.5))
        return flat[:, : rows * (flat.shape[1] // rows)].reshape(len(flat), rows, -1)


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple | list) else output

    return hook


def _logits(head: LinearHead, features: Any) -> Any:
    """Of a torch forward pass, relative to the mean of the classes."""
    import torch

    from topwork.models.modules import powered

    blocks = dict(zip(("last", "stages"), features, strict=True))
    transform = head.transform
    columns = powered(torch.cat([blocks[name] for name in transform.blocks], 1), transform.power, 1e-6)
    mean, scale, weight = (torch.from_numpy(v).float() for v in (transform.mean, transform.scale, head.weight))
    return ((columns - mean) / scale) @ (weight - weight.mean(0)).T


def _checked(
    last: NDArray[np.float32], stages: NDArray[np.float32], maps: NDArray[np.float32] | None, is_channels_last: bool
) -> Opened:
    """Gives the map only if its mean over positions really is the features."""
    blocks = rounded({"last": last, "stages": stages})
    if maps is None or maps.ndim != 4:
        return Opened(blocks, None)
    maps = np.ascontiguousarray(np.moveaxis(maps, -1, 1) if is_channels_last else maps, np.float32)
    if maps.shape[1] != last.shape[1]:
        return Opened(blocks, None)
    gap = np.abs(maps.mean((2, 3)) - last).max() / (float(last.std()) + 1e-12)
    return Opened(blocks, maps if gap < _CLOSE else None)


# ---- the compiled graph


def _opened(ov: Any, model: Any) -> tuple[Any, bool]:
    """The graph with a float input and, where there is one, the map as third output; and whether channels come last."""
    from openvino import opset13

    old = model.get_parameters()[0]
    new = opset13.parameter(old.get_partial_shape(), ov.Type.f32)
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
    results = list(model.get_results())
    found, is_channels_last = _map_output(results[0])
    if found is not None:
        results.append(opset13.result(found))
    return ov.Model(results, [new]), is_channels_last


def _map_output(result: Any) -> tuple[Any, bool]:
    """The input of the mean over positions that makes ``last``, or None, and whether its channels come last."""
    node = result.input_value(0).get_node()
    while node.get_type_name() in _PASSED_OVER:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "ReduceMean":
        return None, False
    source, axes = node.input_value(0), node.input_value(1).get_node()
    if source.get_partial_shape().rank.get_length() != 4 or axes.get_type_name() != "Constant":
        return None, False
    over = {int(axis) % 4 for axis in np.ravel(axes.data)}
    return (source, over == {1, 2}) if over in ({2, 3}, {1, 2}) else (None, False)
