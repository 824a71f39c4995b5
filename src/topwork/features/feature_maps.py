"""A network that also returns the feature maps before pooling, and takes float pixels from 0 to 255.

In: (B, H, W, 3), uint8 or float32. Out: :class:`Opened`. Heatmaps need the maps, and checks of the normalization need
pixel values that uint8 cannot hold; embedding needs neither (``features/engine.py``).

The maps come from the compiled network: its graph is followed backwards from the pooled features to the means over
positions. So a model folder needs no second file, and OpenVINO needs no torch except for gradients. If the last
features are not a plain mean of a map (a norm after pooling, class tokens), ``maps`` is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import InputSpec
from topwork.errors import ModelError
from topwork.features.engine import (
    BATCH,
    _openvino,
    compiled_form,
    feature_network,
    feature_stages,
    first_output,
    map_layout,
    openvino_core,
    rounded,
    with_batch,
)
from topwork.memory import reuse_memory
from topwork.models.backbone import Backbone
from topwork.models.classifier import COMPILED
from topwork.models.head import LinearHead

Images = NDArray[Any]
_PASSED_OVER = ("Reshape", "Squeeze", "Unsqueeze", "Convert")
# Tolerance between the mean of the map and the features, relative to their spread; bf16 rounds at about 0.004.
_CLOSE = 0.05


@dataclass(frozen=True, eq=False)
class Opened:
    """The outputs for B images.

    Attributes:
        blocks: ``last`` (B, D) and ``stages`` (B, E) float16, as from the engine.
        maps: (B, D, h, w) float32 whose mean over h and w is ``last``; None if there is no such map.
        stage_maps: (B, C, h, w) of each stage, whose means and maxima are ``stages``; None if unknown.
    """

    blocks: dict[str, NDArray[np.float16]]
    maps: NDArray[np.float32] | None
    stage_maps: tuple[NDArray[np.float32], ...] | None = None


class OpenNetwork(Protocol):
    """Computes features and maps."""

    def run(self, images: Images) -> Opened:
        """Features and maps of (B, H, W, 3), uint8 or float32 in 0..255 and beyond, any B."""

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """See :meth:`TorchNetwork.gradient_maps`."""


def open_network(backbone: Backbone) -> OpenNetwork:
    """An open network for a backbone or a model folder, in f32; without mirrored positions. Compiling takes a moment."""
    own = backbone.folder / COMPILED[0]
    has_own = own.is_file() and backbone.spec.mirror == "none"
    backbone = backbone.with_spec(mirror="none")
    try:
        xml = own if has_own else compiled_form(backbone)
        return OpenVINONetwork(xml, backbone) if xml is not None else TorchNetwork(backbone)
    except ImportError:  # OpenVINO is not installed here
        return TorchNetwork(backbone)


class OpenVINONetwork:
    """The compiled network with float input and maps as additional outputs."""

    def __init__(self, xml: Path, backbone: Backbone) -> None:
        self.xml = xml
        self._backbone = backbone
        self._by_torch: TorchNetwork | None = None  # OpenVINO has no gradients
        self._compiled = _compiled(xml)

    def run(self, images: Images) -> Opened:
        """The last batch is padded."""
        form, chunks = self._compiled, []
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            padded = np.zeros((BATCH, *images.shape[1:]), np.float32)
            padded[: len(some)] = some
            outputs = form.network.create_infer_request().infer({0: padded})
            chunks.append([np.array(outputs[number][: len(some)]) for number in range(len(form.network.outputs))])
        last, stages, *maps = (np.concatenate(column) for column in zip(*chunks, strict=True))
        maps = [
            _channels_first(one, is_last, self._backbone.spec)
            for one, is_last in zip(maps, form.channels_last, strict=True)
        ]
        return _checked(last, stages, maps[0] if form.has_map else None, maps[form.has_map :])

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """See :meth:`TorchNetwork.gradient_maps`."""
        try:
            self._by_torch = self._by_torch or TorchNetwork(self._backbone)
        except ImportError:  # a server may not have torch and timm
            return None
        return self._by_torch.gradient_maps(head, images, labels)


class TorchNetwork:
    """The network run by torch in f32."""

    def __init__(self, backbone: Backbone) -> None:
        reuse_memory()
        self.module: Any = feature_network(backbone)
        self._backbone = backbone
        self._last: Any = None  # output of forward_features in the last forward pass
        network: Any = self.module.network
        if hasattr(network, "forward_features"):
            network.forward_features = self._kept(network.forward_features)

    def run(self, images: Images) -> Opened:
        """Runs batches of the engine's size, to bound memory."""
        import torch

        names = feature_stages(self._backbone)
        n_prefix, is_channels_last = map_layout(self.module.network)
        spec, chunks = self._backbone.spec, []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                last, stages = self.module(
                    torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH], np.float32))
                )
                stage_maps = [first_output(self.module.maps[name]) for name in names]
                stage_maps = [one[:, n_prefix:] if one.ndim == 3 else one for one in stage_maps]
                found = [self._last, *stage_maps] if getattr(self._last, "ndim", 0) == 4 else stage_maps
                maps = [_channels_first(one.numpy(), is_channels_last, spec) for one in found]
                chunks.append([last.numpy(), stages.numpy(), *maps])
        last, stages, *maps = (np.concatenate(column) for column in zip(*chunks, strict=True))
        n_last = len(maps) - len(names)
        return _checked(last, stages, maps[0] if n_last else None, maps[n_last:])

    def _kept(self, forward_features: Any) -> Any:
        def keeping(images: Any, **options: Any) -> Any:
            self._last = forward_features(images, **options)
            return self._last

        return keeping

    def gradient_maps(self, head: LinearHead, images: Images, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """(N, K, h, w) evidence for the classes (N, K) by gradient times activation, one backward pass for each of K.

        HiResCAM (Draelos and Carin 2020, arXiv 2011.08891, eq. 3) on the tokens before the last block, because after it
        the positions do not influence the logits of a network with a class token. A head that reads earlier stages is
        explained at the first of them. Logits are relative to their mean over the classes.

        Returns:
            None if no position of such a layer influences the logits.
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
        """Candidate layers, the best first."""
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
        """Sums over channels; patch tokens become a grid of the input's shape."""
        n_prefix, is_channels_last = map_layout(self.module.network)
        if values.ndim == 4:
            return values.sum(3 if is_channels_last else 1)
        flat = values[:, n_prefix:].sum(2)
        rows, columns = _grid(flat.shape[1], self._backbone.spec)
        return flat[:, : rows * columns].reshape(len(flat), rows, columns)


def _grid(n: int, spec: InputSpec) -> tuple[int, int]:
    """Rows and columns of n patches of an image."""
    rows = max(1, round((n * spec.height / spec.width) ** 0.5))
    return rows, n // rows


def _channels_first(values: NDArray[Any], is_channels_last: bool, spec: InputSpec) -> NDArray[np.float32]:
    """(B, C, h, w) of a map or of the tokens (B, n, C) or (B, n, 1, C) of patches."""
    values = values[:, :, None] if values.ndim == 3 else values
    values = np.moveaxis(values, -1, 1) if is_channels_last else values
    if values.shape[3] == 1 < values.shape[2]:
        rows, columns = _grid(values.shape[2], spec)
        values = values[:, :, : rows * columns].reshape(*values.shape[:2], rows, columns)
    return np.ascontiguousarray(values, np.float32)


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        kept[name] = first_output(output)

    return hook


def _logits(head: LinearHead, features: Any) -> Any:
    """Logits of a torch forward pass, relative to their mean over the classes."""
    import torch

    from topwork.models.modules import powered

    blocks = dict(zip(("last", "stages"), features, strict=True))
    transform = head.transform
    columns = powered(torch.cat([blocks[name] for name in transform.blocks], 1), transform.power, 1e-6)
    mean, scale, weight = (torch.from_numpy(v).float() for v in (transform.mean, transform.scale, head.weight))
    return ((columns - mean) / scale) @ (weight - weight.mean(0)).T


def _checked(
    last: NDArray[np.float32],
    stages: NDArray[np.float32],
    maps: NDArray[np.float32] | None,
    stage_maps: Sequence[NDArray[np.float32]],
) -> Opened:
    """Returns the maps only if their means over positions equal the features."""
    means = (
        np.concatenate([value for one in stage_maps for value in (one.mean((2, 3)), one.max((2, 3)))], 1)
        if stage_maps
        else None
    )
    return Opened(
        rounded({"last": last, "stages": stages}),
        maps if maps is not None and _is_close(maps.mean((2, 3)), last) else None,
        tuple(stage_maps) if means is not None and _is_close(means, stages) else None,
    )


def _is_close(means: NDArray[np.float32], features: NDArray[np.float32]) -> bool:
    return means.shape == features.shape and bool(
        np.abs(means - features).max() < _CLOSE * (float(features.std()) + 1e-12)
    )


# ---- the compiled graph


@dataclass(frozen=True)
class _Compiled:
    """A network with maps as outputs after ``last`` and ``stages``: the last map if there is one, then those of stages."""

    network: Any
    has_map: bool
    channels_last: tuple[bool, ...]


def _compiled(xml: Path) -> _Compiled:
    from openvino import opset13

    ov, core = _openvino(), openvino_core()
    try:
        model = with_batch(core.read_model(xml), BATCH)
        old = model.get_parameters()[0]
        new = opset13.parameter(old.get_partial_shape(), ov.Type.f32)
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(new.output(0))
        results = list(model.get_results())
        of_last = list(_pooled(results[0].input_value(0)))
        of_last = of_last if len(of_last) == 1 else []
        sources = [*of_last, *_pooled(results[1].input_value(0))]
        model = ov.Model([*results, *(opset13.result(source) for source, _ in sources)], [new])
        network = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ModelError(f"{xml}: cannot be compiled: {str(error).splitlines()[0]}") from None
    return _Compiled(network, bool(of_last), tuple(is_last for _, is_last in sources))


def _pooled(output: Any) -> Iterator[tuple[Any, bool]]:
    """The inputs of the position means behind an output of the graph, and whether their channels come last."""
    node = output.get_node()
    while node.get_type_name() in _PASSED_OVER:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Concat":
        for number in range(node.get_input_size()):
            yield from _pooled(node.input_value(number))
    if node.get_type_name() != "ReduceMean" or node.input_value(1).get_node().get_type_name() != "Constant":
        return
    source = node.input_value(0)
    rank = source.get_partial_shape().rank.get_length()
    over = {int(axis) % rank for axis in np.ravel(node.input_value(1).get_node().data)}
    if (rank, over) in ((3, {1}), (4, {1, 2}), (4, {2, 3})):
        yield source, over != {2, 3}
