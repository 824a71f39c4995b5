"""Runs a frozen network: uint8 images in, pooled features out.

In: uint8 (B, H, W, 3). Out: ``last`` (B, D), the pooled last map that timm's classifier sees, and ``stages`` (B, E),
mean and maximum of the map at the end of each of the last stages; both rounded to float16, so that stored and newly
computed features are identical. Normalization is part of the graph.

On the CPU the network is compiled by OpenVINO, in bf16 if the processor supports it. The compiled network is kept next
to the weights, so later processes need no torch; its files are verified by digest. It is compared with torch fp32 on a
few images. If compiling fails or the results are worse than the limits below, torch runs the network, and the engine's
note says why. On a GPU, torch runs it, too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import threading
import uuid
import warnings
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import DECODER_VERSION
from topwork.data.transforms import MIRRORS, InputSpec, Pixels
from topwork.errors import ModelError, UsageError, first_line
from topwork.files import atomic_file, file_digest
from topwork.memory import reuse_memory
from topwork.models.backbone import Backbone

if TYPE_CHECKING:
    from torch import nn

Batch = dict[str, NDArray[np.float16]]
Blocks = dict[str, NDArray[np.float32]]

FORMAT = 3  # increase it when the outputs or the preprocessing change
BLOCKS = ("last", "stages")
BATCH = 16  # compiled for this size and for 1: 1.1 GB of memory instead of 3.3 GB with dynamic shapes
TRACED_IMAGES = 2  # unlike BATCH and 1, so that the check finds a batch size baked into the graph
MAX_STAGES = 5
LARGEST = 65504  # of float16
# Least cosine similarity with torch fp32, over the check images. bf16 keeps 8 bits: 0.996 is usual for lite0.
LEAST_COSINE = {"f32": 0.9999, "bf16": 0.98}


class Engine:
    """Turns input-sized images into features; ``note`` is a sentence for the user, if any."""

    kind: str
    precision: str
    note: str | None = None

    def run(self, images: Pixels) -> Batch:
        """Features of uint8 (B, H, W, 3), any B, as they are stored."""
        return rounded(self.run_unrounded(images))

    def run_unrounded(self, images: Pixels) -> Blocks:
        """The same in float32, not rounded."""
        raise NotImplementedError


@dataclass(frozen=True)
class EngineCheck:
    """The check of a compiled network.

    Attributes:
        device: processor and OpenVINO version it was checked with.
        cosine: by precision, the lowest cosine similarity with torch fp32 over the check images and both outputs.
        files: SHA-256 of the compiled files, by suffix.
        problem: why there is no compiled network, or None.
    """

    device: str
    cosine: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def fingerprint(backbone: Backbone, engine: Engine) -> str:
    """Identifies everything except the image that a stored feature depends on."""
    facts = [FORMAT, DECODER_VERSION, backbone.weights_digest, backbone.architecture, backbone.spec.as_dict()]
    facts += [engine.kind, engine.precision]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def load_engine(backbone: Backbone, kind: str = "auto", precision: str = "auto", device: str = "auto") -> Engine:
    """The fastest engine that passes the check on this machine.

    Args:
        kind: ``openvino``, ``torch`` or ``auto``: torch if there is a GPU, else OpenVINO, else torch.
        precision: ``bf16``, ``f32`` or ``auto``: bf16 if the processor supports it and the check passes.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UsageError: OpenVINO was requested but cannot run this network, or not on this device.
    """
    on_gpu = device in ("cuda", "mps") or (device == "auto" and kind != "openvino" and _has_gpu())
    if kind == "openvino" and on_gpu:
        raise UsageError(f"--engine openvino runs on the CPU; remove --device {device}.")
    if kind == "torch" or on_gpu or (kind == "auto" and not _has_openvino()):
        return TorchEngine(backbone, precision, best_device(device))
    xml = compiled_path(backbone)
    check, note = _read_check(xml), None
    if check is None:
        if xml.with_suffix(".json").is_file():
            note = f"{xml}: the compiled network was damaged or from another machine, so it was compiled again."
        check = _compile(backbone, xml)
    chosen = _choose_precision(check, precision)
    if chosen is not None:
        return OpenVINOEngine(xml, chosen, note)
    reason = check.problem or f"its features differ from torch's: cosine {check.cosine}"
    if kind == "openvino":
        raise UsageError(f"{backbone.name}: OpenVINO cannot run this network ({reason}); use torch.")
    return TorchEngine(
        backbone,
        precision,
        "cpu",
        f"{backbone.name}: OpenVINO cannot run this network ({reason}); using torch (slower).",
    )


def with_resizer(backbone: Backbone, engine: Engine) -> Backbone:
    """The backbone with the resizer for the engine: in f32 Pillow's, so that predictions match other programs.

    Its cost is small next to an f32 network. With bf16 it would be large, and bf16 changes predictions more than the
    resizer does.
    """
    return backbone.with_spec(resizer="pillow" if engine.precision == "f32" else "quick")


class OpenVINOEngine(Engine):
    """A compiled network read from its IR file; thread-safe."""

    kind = "openvino"

    def __init__(self, xml: Path, precision: str, note: str | None = None) -> None:
        self.precision, self.note = precision, note
        self._core = openvino_core()
        self._options = {"INFERENCE_PRECISION_HINT": precision}
        try:
            self._model = self._core.read_model(xml)
        except RuntimeError as error:
            raise ModelError(f"{xml}: cannot be read: {first_line(error)}") from None
        self.xml = xml
        self._compiled: dict[int, Any] = {}
        self._lock = threading.Lock()

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        _, height, width, _ = self._model.input(0).partial_shape
        return height.get_length(), width.get_length()

    def run_unrounded(self, images: Pixels) -> Blocks:
        """Runs whole batches; a few remaining images run one by one, which is faster than padding."""
        whole = len(images) // BATCH * BATCH
        rest = len(images) - whole
        chunks = [self._infer(self._of_size(BATCH), images[start : start + BATCH]) for start in range(0, whole, BATCH)]
        if rest > BATCH // 4:
            padded = np.zeros((BATCH, *images.shape[1:]), np.uint8)
            padded[:rest] = images[whole:]
            chunks.append({key: value[:rest] for key, value in self._infer(self._of_size(BATCH), padded).items()})
        else:
            chunks += [self._infer(self._of_size(1), images[row : row + 1]) for row in range(whole, len(images))]
        return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in BLOCKS}

    def _of_size(self, n: int) -> Any:
        """The network compiled for batches of n images, on first use: a refit from the store needs none."""
        with self._lock:
            if n not in self._compiled:
                try:
                    model = with_batch(self._model, n)
                    self._compiled[n] = self._core.compile_model(model, "CPU", self._options)
                except RuntimeError as error:
                    raise ModelError(f"{self.xml}: cannot be compiled: {first_line(error)}") from None
            return self._compiled[n]

    def _infer(self, compiled: Any, images: Pixels) -> Blocks:
        outputs = compiled.create_infer_request().infer({0: np.ascontiguousarray(images)})
        return {key: np.array(outputs[number]) for number, key in enumerate(BLOCKS)}


class TorchEngine(Engine):
    """The network in torch: on a GPU in bf16 if supported, on the CPU in f32."""

    kind = "torch"

    def __init__(
        self, backbone: Backbone, precision: str = "auto", device: str | None = None, note: str | None = None
    ) -> None:
        import torch

        reuse_memory()
        _compute_after_forks()
        self.note = note
        self.device = best_device("auto") if device is None else device
        on_gpu = self.device == "cuda" and gpu_has_bf16()
        self.precision = precision if precision != "auto" else ("bf16" if on_gpu else "f32")
        network = feature_network(backbone).to(self.device)
        self._network = network.to(memory_format=torch.channels_last)

    def run_unrounded(self, images: Pixels) -> Blocks:
        """Features of uint8 (B, H, W, 3), any B."""
        import torch

        outputs: list[list[NDArray[np.float32]]] = [[], []]
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # TF32 on a GPU would keep only 10 of 23 bits
            torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            for start in range(0, len(images), 4 * BATCH):
                chunk = torch.from_numpy(np.array(images[start : start + 4 * BATCH])).to(self.device)
                for kept, value in zip(outputs, self._network(chunk), strict=True):
                    kept.append(value.float().cpu().numpy())
        return {key: np.concatenate(kept) for key, kept in zip(BLOCKS, outputs, strict=True)}


@cache
def _compute_after_forks() -> None:
    """Lets forked processes run torch: without the threads of their parent, they would wait for them forever."""
    import torch

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def rounded(blocks: Blocks) -> Batch:
    """Features as they are stored: float16, clipped to its range."""
    return {name: np.clip(values, -LARGEST, LARGEST).astype(np.float16) for name, values in blocks.items()}


# ---- the network as a graph


def feature_network(backbone: Backbone) -> nn.Module:
    """A torch module: uint8 (B, H, W, 3) to (last, stages), including normalization and mirrored positions."""
    import torch
    from torch import nn

    class FeatureNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network: Any = backbone.module()
            self.mean: torch.Tensor
            self.std: torch.Tensor
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (backbone.spec.mean, backbone.spec.std))
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)
            self.maps: dict[str, Any] = {}
            for name in feature_stages(backbone):
                self.network.get_submodule(name).register_forward_hook(self._keep(name))

        def _keep(self, name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self.maps[name] = output

            return hook

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            positions = MIRRORS[backbone.spec.mirror]
            if len(positions) == 1:
                return self.features(images)
            last, stages = self.features(torch.cat([images.flip(axes) if axes else images for axes in positions]))
            return self._mean(last, len(positions)), self._mean(stages, len(positions))

        @staticmethod
        def _mean(features: torch.Tensor, n: int) -> torch.Tensor:
            return features.view(n, -1, features.shape[1]).mean(0)  # chunk() would fix the batch size of an export

        def features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Features of the images without changes."""
            x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
            last = self.network(x)
            layout = map_layout(self.network)
            pooled = [pool_map(self.maps[name], *layout) for name in feature_stages(backbone)]
            return last, torch.cat(pooled, 1) if pooled else last[:, :0]

    return FeatureNetwork().eval()


def map_layout(network: Any) -> tuple[int, bool]:
    """Number of prefix tokens (class, registers), and whether the channels of a map come last."""
    return getattr(network, "num_prefix_tokens", 0), getattr(network, "output_fmt", "NCHW") == "NHWC"


def pool_map(stage_map: Any, n_prefix: int, is_channels_last: bool) -> Any:
    """Mean and maximum over the positions of a stage's output: (B, 2C).

    Args:
        stage_map: (B, C, h, w), (B, h, w, C), or tokens (B, n, C); of several tensors the first.
        n_prefix: tokens to skip, because they are not positions.
    """
    import torch

    values = first_output(stage_map)
    if values.ndim == 3:
        values, is_channels_last = values[:, n_prefix:, None], True
    positions = (1, 2) if is_channels_last else (2, 3)
    return torch.cat([values.mean(positions), values.amax(positions)], 1)


def first_output(output: Any) -> Any:
    """The output of a module; the first of several tensors."""
    return output[0] if isinstance(output, tuple | list) else output


def feature_stages(backbone: Backbone) -> list[str]:
    """The modules whose maps are pooled: the last stages, or evenly spaced ones in very deep lists."""
    names = [stage.module for stage in backbone.stages if stage.module]
    if len(names) <= 2 * MAX_STAGES:
        return names[-MAX_STAGES:]
    return [names[round(i)] for i in np.linspace(0, len(names) - 1, MAX_STAGES + 1)[1:]]


# ---- the compiled form


def compiled_path(backbone: Backbone) -> Path:
    """Path of the compiled network of a backbone with its current input spec."""
    spec = {name: value for name, value in backbone.spec.as_dict().items() if name != "resizer"}
    key = json.dumps([FORMAT, spec], sort_keys=True)
    return backbone.folder / f"openvino-{hashlib.sha256(key.encode()).hexdigest()[:12]}.xml"


def compiled_form(backbone: Backbone) -> Path | None:
    """The ``.xml`` of the compiled network, if it and the ``.bin`` next to it match the check."""
    xml = compiled_path(backbone)
    check = _read_check(xml)
    return xml if check is not None and check.problem is None else None


def with_batch(model: Any, n: int) -> Any:
    """An OpenVINO network for batches of n images."""
    model = model.clone()
    shape = model.input(0).get_partial_shape()
    model.reshape([n, *(side.get_length() for side in list(shape)[1:])])
    return model


def _compile(backbone: Backbone, xml: Path) -> EngineCheck:
    """Writes the IR and its comparison with torch fp32, or why there is none."""
    import torch

    network, images = feature_network(backbone), drawn_images(backbone.spec)
    with torch.inference_mode():
        expected = [value.numpy() for value in network(torch.from_numpy(images))]
    try:
        model = _converted(network, backbone.spec)
    except Exception as error:  # noqa: BLE001 tracing and conversion raise errors of all kinds
        check = EngineCheck(_device(), {}, problem=first_line(error))
    else:
        _write_ir(model, xml)
        check = _compared(xml, images, expected)
    with atomic_file(xml.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(vars(check)))
    return check


def _converted(network: nn.Module, spec: InputSpec) -> Any:
    """The network as an OpenVINO graph that takes batches of any size."""
    ov = _openvino()
    shape = [-1, spec.height, spec.width, 3]
    try:
        return ov.convert_model(_traced(network, spec), input=[(shape, ov.Type.u8)])
    except Exception:
        changed = [module for module in network.modules() if getattr(module, "inplace", False)]
        if not changed:
            raise
    for module in changed:  # OpenVINO 2026.4 does not convert DenseNet's activations in place
        module.inplace = False  # type: ignore[assignment]
    return ov.convert_model(_traced(network, spec), input=[(shape, ov.Type.u8)])


def _traced(network: nn.Module, spec: InputSpec) -> Any:
    import torch

    example = torch.zeros(TRACED_IMAGES, spec.height, spec.width, 3, dtype=torch.uint8)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
        # no check by torch, which doubles the time: the graph is compared below anyway
        return torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]


def _compared(xml: Path, images: Pixels, expected: list[NDArray[np.float32]]) -> EngineCheck:
    """The check of the written files; with a batch size other than the traced one."""
    files = {suffix: file_digest(xml.with_suffix(suffix)) for suffix in (".xml", ".bin")}
    cosine = {}
    try:
        for precision in _precisions():
            # not rounded: some networks with random weights exceed the range of float16
            found = OpenVINOEngine(xml, precision).run_unrounded(images)
            pairs = zip(expected, (found["last"], found["stages"]), strict=True)
            cosine[precision] = min(_least_cosine(a, b) for a, b in pairs if a.shape[1])
    except (ModelError, RuntimeError) as error:
        return EngineCheck(_device(), {}, problem=first_line(error))
    return EngineCheck(_device(), cosine, files)


def _write_ir(model: Any, xml: Path) -> None:
    """OpenVINO names the second file after the first, so both are written aside and moved: .bin first."""
    partial = xml.with_name(f"{xml.stem}.{uuid.uuid4().hex[:8]}.xml")
    try:
        _openvino().save_model(model, partial, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            os.replace(partial.with_suffix(suffix), xml.with_suffix(suffix))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{xml.parent}: the compiled network cannot be written ({first_line(error)}): no space left, or no permission. "
            "Set TOPWORK_CACHE to another folder."
        ) from None
    finally:
        for suffix in (".bin", ".xml"):
            partial.with_suffix(suffix).unlink(missing_ok=True)


def _read_check(xml: Path) -> EngineCheck | None:
    """The stored check, if it is of the same files and for the same kind of processor."""
    try:
        check = EngineCheck(**json.loads(xml.with_suffix(".json").read_text()))
        is_whole = all(file_digest(xml.with_suffix(suffix)) == digest for suffix, digest in check.files.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    is_whole = is_whole and (check.problem is not None or set(check.files) == {".xml", ".bin"})
    return check if is_whole and check.device == _device() else None


def _choose_precision(check: EngineCheck, wanted: str) -> str | None:
    good = [p for p in ("bf16", "f32") if check.cosine.get(p, 0) >= LEAST_COSINE[p]]
    if wanted == "auto":
        return good[0] if good else None
    return wanted if wanted in good else None


def _precisions() -> list[str]:
    has_bf16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["f32", "bf16"] if has_bf16 else ["f32"]


def check_precision(kind: str, precision: str) -> None:
    """Raises UsageError if this machine cannot run a network in bf16 with that engine."""
    has_bf16 = ("bf16" in _precisions()) if kind == "openvino" else kind == "torch" and _has_gpu() and gpu_has_bf16()
    if precision == "bf16" and not has_bf16:
        raise UsageError(f"--precision bf16: not available here with {kind}; use f32.")


def _device() -> str:
    return f"{openvino_core().get_property('CPU', 'FULL_DEVICE_NAME')} openvino {_openvino().__version__}"


_core_lock = threading.Lock()


def openvino_core() -> Any:
    """OpenVINO's core, one per process; do not create another.

    Its CPU plugin installs a signal stack and frees it with the core. With several cores, a thread can keep a freed
    one, and the next signal (such as Ctrl+C) causes a segmentation fault: seen with OpenVINO 2026.4, docs/lab-log.md,
    2026-11-25.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    with _core_lock:
        return _core()


@lru_cache(maxsize=1)
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    """The openvino module, without its telemetry."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _has_gpu() -> bool:
    """Whether torch sees a GPU; checks the driver's device files first, because importing torch takes seconds."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or os.name == "nt"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def best_device(asked: str = "auto") -> str:
    """``cpu``, ``cuda`` or ``mps`` for training and features; ``auto`` is a CUDA GPU if there is one, else the CPU.

    Raises:
        UsageError: PyTorch does not see the requested device.
    """
    if asked == "cpu" or (asked == "auto" and not _has_gpu()):
        return "cpu"
    import torch

    is_there = torch.backends.mps.is_available() if asked == "mps" else torch.cuda.is_available()
    if not is_there:
        raise UsageError(f"--device {asked}: PyTorch finds no such device. Use --device cpu, or leave it out.")
    return "mps" if asked == "mps" else "cuda"


def gpu_has_bf16() -> bool:
    """Whether the GPU supports bfloat16; those before Ampere (such as a T4) only emulate it slowly."""
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def drawn_images(spec: InputSpec) -> Pixels:
    """Eight varied images drawn from a fixed seed: smooth gradients, edges, stripes and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : spec.height, 0 : spec.width] / max(spec.height, spec.width)
    images = []
    for _ in range(8):
        waves = rng.normal(size=(6, 3)) * [9, 9, 3]
        base = np.stack([np.sin(a * x + b * y + c) for a, b, c in waves[:3]], -1)
        disc = ((x - rng.uniform()) ** 2 + (y - rng.uniform()) ** 2 < rng.uniform(0.02, 0.2))[..., None]
        picture = np.where(disc, rng.uniform(0, 255, 3), 127 + 90 * base + rng.normal(0, 12, base.shape))
        images.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(images)


def _least_cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # 1e-9 with the random weights of some networks
    equal = (a == b).all(1).astype(np.float64)
    return float(np.divide((a * b).sum(1), lengths, out=equal, where=lengths > 0).min())
