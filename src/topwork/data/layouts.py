"""Labels, parts and groups from file names.

In: the names that a folder or an archive holds, and the user's :class:`Rules`. Out: a :class:`Listing`. Whether the names come
from a disk or from an archive makes no difference, so the same images give the same dataset either way.

Class folders may be nested in other folders, and train, valid and test folders
are recognized by their usual names. If the names are ambiguous, an error prints both readings with the command for each; nothing
is guessed. Only names are used here; whether a file is an image is known once it is decoded.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from topwork.data.folders import Found
from topwork.data.samples import PATIENT_ID, Entry, Listing, Reject, Rules
from topwork.errors import AmbiguousError, UsageError
from topwork.text import canonical, count, escape, first_names, natural_key

_PART_WORDS = {
    "train": "train training trainval entrainement apprentissage entrenamiento treino treinamento addestramento",
    "valid": "valid validation validate val dev validierung validacion validacao validazione",
    "test": "test testing eval evaluation prueba pruebas teste",
}
PART_NAMES = {word: part for part, words in _PART_WORDS.items() for word in words.split()}
_NO_CLASS_NAMES = {"unlabeled", "unlabelled", "no_label", "no_labels", "not_labeled"}  # the third of CVAT
_UNLABELED_NAMES = {"pred", "predict", "prediction", "unlabeled", "unlabelled"}
# Folders of these names hold images but are not classes.
CONTAINER_NAMES = {
    "images", "jpegimages", "image", "imgs", "img", "photos", "pictures", "pics", "files", "jpg", "jpeg", "png", "data",
}  # fmt: skip
_IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".dcm",
    ".jpe", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".dng", ".cr2", ".nef", ".arw",  # not decoded, but missed
)  # fmt: skip
_NOTE_ENDINGS = (
    ".xml", ".txt", ".lst", ".list", ".json", ".jsonl", ".ndjson", ".manifest", ".csv", ".tsv", ".parquet", ".xlsx", ".xls", ".docx",
    ".yaml", ".yml", ".md", ".html", ".pdf", ".py", ".ipynb",
)  # fmt: skip
# Folders of a repository or download with a few pictures that are not data.
_OTHER_NAMES = {
    "doc", "docs", "assets", "figures", "figure", "figs", "fig", "screenshots", "screenshot", "media", "static", "examples", "demo", "notebooks",
    "readme", "misc", "papers", "results", "output", "outputs",
}  # fmt: skip
_OUTSIDE = "not in a class folder"
_FEW_PATIENTS = 4  # fewer numbered folders may be folds or domains
# What describes images and stands next to them: folders beside images/, and files such as 7_mask.png beside 7.png.
ANNOTATION_NAMES = {
    "annotations", "annotation", "masks", "mask", "labels", "trimaps", "segmentation", "segmentations", "segmentationclass",
    "segmentationobject", "xmls", "bboxes",
}  # fmt: skip
_MAY_BE_CLASSES = {"masks", "mask", "labels"}  # of those, unless they lie beside images/
_TRUTH = "seg|segmentation|superpixels|ground[ _-]?truth|gt"
_MASK_NAME = re.compile(rf"(.+)[ _.-](?:masks?|{_TRUTH})(?:[ _-]?\d+)?\.\w+$", re.IGNORECASE)
_TRUTH_NAME = re.compile(rf"(.+)[ _.-](?:{_TRUTH})$", re.IGNORECASE)  # of a folder beside that of the images


def folders_of(name: str) -> Iterator[str]:
    """The folders around a file, or a folder and those around it if its name ends with a slash: ``a`` and ``a/b`` of ``a/b/1.jpg``."""
    return accumulate(name.split("/")[:-1], "{}/{}".format)


@dataclass
class Folder:
    """A folder with its images, counted by name: ``n_direct`` lie in it, ``n_images`` at any depth."""

    name: str  # from the root, with a slash at the end; "" for the root
    n_direct: int = 0
    n_images: int = 0
    children: dict[str, Folder] = field(default_factory=dict)

    @property
    def full(self) -> dict[str, Folder]:
        """The folders in it that hold images at any depth, in natural order."""
        found = [(own, child) for own, child in self.children.items() if child.n_images]
        return dict(sorted(found, key=lambda item: natural_key(item[0])))


@dataclass(frozen=True)
class Place:
    """A folder of class folders, and its part."""

    part: str | None
    folder: Folder


def looks_like_image(name: str) -> bool:
    """Whether a file name has an ending that images have."""
    return name.lower().endswith(_IMAGE_ENDINGS)


def without_notes(names: Sequence[str]) -> list[str]:
    """The files of a folder without texts such as a readme or labels, if endings say which files are images."""
    has_images = any(map(looks_like_image, names))
    return [name for name in names if not (has_images and name.lower().endswith(_NOTE_ENDINGS))]


def tree_of(found: Found) -> Folder:
    """The folders with their images; if no name has the ending of an image, every file counts as one."""
    root = Folder("")
    for name in found.folders:
        _reach(root, name.split("/"))
    images = [name for name in found.files if looks_like_image(name)] or found.files
    for name in images:
        *folders, _ = name.split("/")
        root.n_images += 1
        for folder in (path := _reach(root, folders)):
            folder.n_images += 1
        (path[-1] if path else root).n_direct += 1
    return root


def _reach(root: Folder, pieces: Sequence[str]) -> list[Folder]:
    path, folder = [], root
    for piece in pieces:
        if piece not in folder.children:
            folder.children[piece] = Folder(f"{folder.name}{piece}/")
        folder = folder.children[piece]
        path.append(folder)
    return path


def arrange(root: Path, found: Found, rules: Rules) -> Listing:
    """Gives each file its label, part and group by its place and name.

    Raises:
        UsageError: the names can be read in two ways.
    """
    found, notes = _without_masks(found)
    tree = look_through(tree_of(found))
    places, aside = places_of(tree)
    if rules.label_regex is not None:
        listing = _by_name(root, found, places, rules.label_regex)
    else:
        listing = _by_folder(root, found, tree, places, aside)
    listing = replace(listing, notes=(*listing.notes, *notes))
    return with_groups(_without_copies(merged_forms(listing), found), rules)


def _without_masks(found: Found) -> tuple[Found, list[str]]:
    """The names without those of masks, and a sentence on them: files beside the image of that name, folders beside images/."""
    split = [posixpath.split(folder) for folder in found.folders]
    beside = {outer for outer, own in split if own.lower() in CONTAINER_NAMES}
    other = {posixpath.join(*one) for one in split if one[1].lower() in ANNOTATION_NAMES - _MAY_BE_CLASSES}
    if other:
        other &= {folder for name in found.files if looks_like_image(name) for folder in folders_of(name)}
    known = set(found.folders)
    other |= {name for name in known if (match := _TRUTH_NAME.match(name)) and match[1] in known}
    masks = other | {posixpath.join(*one) for one in split if one[0] in beside and one[1].lower() in ANNOTATION_NAMES}
    named = {name: match[1] for name in found.files if (match := _MASK_NAME.match(name)) and looks_like_image(name)}
    stems = {posixpath.splitext(name)[0] for name in found.files} if named else set()

    def is_mask(name: str) -> bool:
        return named.get(name) in stems or (bool(masks) and not masks.isdisjoint(folders_of(name)))

    aside = sorted(filter(is_mask, found.files), key=natural_key)
    if not aside:
        return found, []
    left_out = set(aside)
    images = set(filter(looks_like_image, found.files))
    if images and images <= left_out:
        return found, []
    rejects = [Reject(name, "a mask or annotation of another image", expected=True) for name in aside]
    files = [name for name in found.files if name not in left_out]
    note = f"Ignored as masks or annotations of other images: {first_names(aside, 3)}."
    folders = [name for name in found.folders if not is_mask(f"{name}/")]
    return replace(found, files=files, folders=folders, rejects=[*found.rejects, *rejects]), [note]


def make_listing(
    root: Path,
    layout: str,
    entries: Iterable[Entry],
    rejects: Iterable[Reject],
    notes: Iterable[str],
    class_names: Iterable[str] = (),
) -> Listing:
    """A listing in natural order; ``class_names`` are those of classes that may have no image."""
    kept = tuple(sorted(entries, key=lambda entry: natural_key(entry.path)))
    names = {*class_names, *(entry.label for entry in kept)}
    return Listing(
        root=root,
        layout=layout,
        entries=kept,
        class_names=tuple(sorted(names, key=natural_key)),
        rejects=tuple(sorted(rejects, key=lambda reject: natural_key(reject.path))),
        notes=tuple(notes),
    )


# ---- which folders are the classes


def look_through(folder: Folder) -> Folder:
    """The folder whose folders are the classes or the parts: a single folder around them is passed, with what lies next to it."""
    while len(data := _data_folders(folder)) == 1:
        ((name, inner),) = data.items()
        holds_classes = inner.full and _is_stray(inner) and not _is_part(name, inner)
        if not holds_classes or not _is_stray(folder):
            break
        folder = inner
    return folder


def _data_folders(folder: Folder) -> dict[str, Folder]:
    """The folders that may hold data, without a few pictures in ``docs`` or ``assets`` next to a folder of class folders."""
    deep = {
        name: child
        for name, child in folder.full.items()
        if sum(not inner.full for inner in child.full.values()) > 1 or any(inner.full for inner in child.full.values())
    }
    others = [child for name, child in folder.full.items() if name not in deep]
    are_few = 5 * sum(child.n_images for child in others) <= folder.n_images
    return (
        deep
        if len(deep) == 1 and are_few and all(_own_name(child) in _OTHER_NAMES or _is_new(child) for child in others)
        else folder.full
    )


def _is_new(folder: Folder) -> bool:
    """Whether a folder is called test or predict and holds images without class folders, such as ``test/test/1.jpg`` or ``Test cases/1.jpg``."""
    own = _own_name(folder)
    part, rest = _split_name(own) or (None, "")
    is_alone = all(name.lower() in (own, *CONTAINER_NAMES) and not inner.full for name, inner in folder.full.items())
    return is_alone and part in ("test", "unlabeled") and rest in ("", "cases", *CONTAINER_NAMES)


def _own_name(folder: Folder) -> str:
    return folder.name.rstrip("/").rsplit("/", 1)[-1].lower()


def _is_stray(folder: Folder) -> bool:
    """Whether a folder holds few images directly compared with its subfolders."""
    sizes = [child.n_images for child in folder.full.values()]
    return not folder.n_direct or 2 * folder.n_direct <= median(sizes or [0]) or 100 * folder.n_direct <= sum(sizes)


def places_of(tree: Folder) -> tuple[list[Place], list[Folder]]:
    """Where the class folders are: one place, or one for each part; and folders next to the parts."""
    parts = parts_among(tree.full)
    if not parts:
        unlabeled = [child for name, child in tree.full.items() if name.lower() in _NO_CLASS_NAMES or _is_new(child)]
        aside = [Place("unlabeled", child) for child in unlabeled if len(tree.full) > 2]
        return [Place(None, tree), *aside], []
    places = [Place(part, _inside(tree.full[name])) for name, part in parts.items()]
    return places, [child for name, child in tree.full.items() if name not in parts]


def _inside(folder: Folder) -> Folder:
    """The folder of class folders inside a part, which may hold a folder of the same name."""
    while len(folder.full) == 1 and _is_stray(folder):
        (inner,) = folder.full.values()
        own, outer = _own_name(inner), _own_name(folder)
        if not inner.full and own != outer and own not in CONTAINER_NAMES:
            break
        if inner.full and not _is_stray(inner):
            break
        folder = inner
    return folder


def _is_part(name: str, folder: Folder) -> bool:
    """Whether a folder that stands alone is a part: it is called so and holds class folders, no images."""
    return name.lower() in PART_NAMES and _holds_classes(folder)


def _holds_classes(folder: Folder) -> bool:
    return bool(folder.full) and _is_stray(folder)


def parts_among(folders: Mapping[str, Folder]) -> dict[str, str]:
    """The part of each folder named after one: ``train``, ``valid``, ``test``, or ``unlabeled``; {} if they are classes.

    Both ``train`` and ``val`` and, if the rest of the names is the same, ``seg_train`` and ``seg_test`` are recognized.
    """
    families: dict[str, dict[str, str]] = {}
    for name in folders:
        if (split := _split_name(name)) is not None:
            families.setdefault(split[1], {})[name] = split[0]
    pieces: dict[str, list[dict[str, str]]] = {}
    for rest, family in families.items():
        pieces.setdefault(rest.rstrip("0123456789").rstrip("_- ."), []).append(family)
    for rest, found in pieces.items():  # train_1, train_2 and test, unless each number has both, as folds have
        if len(found) > 1 and all(len(family) == 1 for family in found):
            families[rest] = {name: part for family in found for name, part in family.items()}
    alone = {name: part for family in families.values() for name, part in family.items()}
    of_parts = list(alone.values())
    if (
        "train" in of_parts
        and len(set(of_parts)) == len(of_parts) > 1
        and all(_holds_classes(folders[name]) for name in alone)
    ):
        return alone  # one folder for each, whatever else their names say, such as train_mini and val
    for _, family in sorted(families.items(), key=lambda item: (item[0] != "", -len(item[1]))):
        kinds = set(family.values()) - {"unlabeled"}
        if len(kinds) > 1 and ("train" in kinds or not any(folders[name].n_direct for name in family)):
            return family
        if kinds and all(_is_part(name, folders[name]) for name in family if family[name] != "unlabeled"):
            return family
    return {}


def _split_name(name: str) -> tuple[str, str] | None:
    """(part, the rest of the name) of a folder name with exactly one word for a part in it."""
    name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    name = re.sub(r"^(\d+|[a-z](?=\.))[_\-. ]+", "", name)  # 01_train, a. Training Set
    pieces = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^A-Za-z]+", name)
    words = [piece.lower() for piece in pieces]
    known = [n for n, word in enumerate(words) if word in PART_NAMES or word in _UNLABELED_NAMES]
    if len(known) != 1:
        return None
    rest = "".join(words[: known[0]] + words[known[0] + 1 :]).strip("_- .")
    return PART_NAMES.get(words[known[0]], "unlabeled"), "" if rest in ("set", "data", "public", "private") else rest


def are_parts(names: Iterable[str]) -> bool:
    """Whether folders that hold images directly are named like parts, including a train part, so that none is a class."""
    found = [_split_name(name) for name in names]
    kinds = {split[0] for split in found if split and split[1].strip("0123456789") in ("", *CONTAINER_NAMES)}
    return "train" in kinds and all(split and split[0] in kinds for split in found)


def part_of_name(name: str) -> str | None:
    """The part given by the name of a file or its folder: ``train.csv``, ``valid/_classes.csv``."""
    *folders, own = name.split("/")
    for piece in (own.rsplit(".", 1)[0], *reversed(folders)):
        split = _split_name(piece)
        if split is not None and split[0] != "unlabeled":
            return split[0]
    return None


def part_word(text: str) -> str | None:
    """The part that a text names and says nothing more about, as ``Training``, ``test set`` and ``PublicTest`` do."""
    part, rest = _split_name(text.strip()) or (None, "")
    return part if part != "unlabeled" and not rest else None


def parts_in(text: str) -> list[str]:
    """The parts that words of a name stand for: train and valid for ``train_val_list``."""
    return [PART_NAMES[word] for word in re.findall("[a-z]+", text.lower()) if word in PART_NAMES]


def part_named(value: str | None, where: str) -> str | None:
    """``train``, ``valid`` or ``test`` for any of their usual names; raises UsageError for others."""
    if value is None or not value.strip():
        return None
    split = _split_name(value.strip())
    if split is None or split[0] == "unlabeled":
        raise UsageError(f"{escape(where)}: split is {escape(value)!r}; it must be train, valid, test or empty.")
    return split[0]


# ---- from class folders


def _by_folder(root: Path, found: Found, tree: Folder, places: list[Place], aside: list[Folder]) -> Listing:
    labeled = [place for place in places if _has_classes(place) and not _is_unknown(place, places)]
    aside = aside + [place.folder for place in places if place not in labeled and place.part]
    inner_parts = _parts_in_classes(root, places) if sum(place.part != "unlabeled" for place in places) == 1 else {}
    nested = _nested_classes(root, labeled) if not inner_parts and labeled else []
    takers = [(place.folder.name, place.part) for place in labeled]
    entries: list[Entry] = []
    rejects = list(found.rejects)
    outside: Counter[str] = Counter()
    notes_only = _folders_of_notes(found.files, [place.folder for place in labeled])
    left_out = sorted([*aside, *notes_only], key=lambda folder: -len(folder.name))
    for name in found.files:
        folder = next((folder.name for folder in left_out if name.startswith(folder.name)), None)
        if folder is not None:
            outside[folder] += 1
            continue
        prefix, part = next(((own, part) for own, part in takers if name.startswith(own)), (None, None))
        label, slash, rest = name.removeprefix(prefix or "").partition("/")
        if prefix is None or not slash:
            rejects.append(Reject(name, _OUTSIDE, expected=not looks_like_image(name) or _is_stray(tree)))
        else:
            own = rest.split("/", 1)[0] if inner_parts else ""
            entries.append(Entry(name, label, inner_parts.get(own, part)))
    rejects += [
        Reject(name, f"{count(n, 'file')} next to the class folders", expected=True) for name, n in outside.items()
    ]
    class_names = {name for place in labeled for name, child in place.folder.children.items() if child not in left_out}
    notes = _notes_on_folders(root, places, labeled, aside, outside)
    notes = (
        [f"Nested folders count as the class folder they are in: {first_names(nested)}.", *notes] if nested else notes
    )
    layout = "parts" if places[0].part or inner_parts else "folders"
    return make_listing(root, layout, entries, rejects, notes, class_names)


def _folders_of_notes(files: Iterable[str], places: Sequence[Folder]) -> list[Folder]:
    """The folders where class folders are that hold nothing but texts, such as annotations; images may have any ending."""
    folders = {child.name: child for place in places for child in place.children.values() if not child.n_images}
    seen: dict[str, bool] = {}
    for name in files if folders else ():
        place = next((place.name for place in places if name.startswith(place.name)), "")
        folder = f"{place}{name.removeprefix(place).partition('/')[0]}/"
        if folder in folders:
            seen[folder] = seen.get(folder, True) and name.lower().endswith(_NOTE_ENDINGS)
    return [folders[name] for name, are_notes in seen.items() if are_notes]


def _has_classes(place: Place) -> bool:
    """Whether a place has class folders; a single folder called ``images`` does not count."""
    names = {name.lower() for name in place.folder.full}
    return place.part != "unlabeled" and bool(names) and not (len(names) == 1 and names <= CONTAINER_NAMES)


def _is_unknown(place: Place, places: Sequence[Place]) -> bool:
    """Whether the only folder of a part is no class of another, as ``test/unknown`` for Keras."""
    others = {name for one in places if one is not place for name in one.folder.full}
    return (
        place.part != "train"
        and len(place.folder.full) == 1
        and len(others) > 1
        and others.isdisjoint(place.folder.full)
    )


def _parts_in_classes(root: Path, places: list[Place]) -> dict[str, str]:
    """{folder name: part} if every class folder holds train and test folders.

    Raises:
        UsageError: these hold the same class folders, so that each folder is a dataset of its own.
    """
    tops = list(places[0].folder.full.values())
    found: dict[str, str] = {}
    for top in tops:
        parts = parts_among(top.full)
        if top.n_direct or set(parts) != set(top.full) or len(set(parts.values())) < 2:
            return {}
        found |= parts
    if len(tops) < 2 or "unlabeled" in found.values():
        return {}
    inner = [set(part.full) for top in tops for part in top.full.values() if part.full]
    if len(inner) > 1 and len(set.intersection(*inner[:2])) > 1 and set.intersection(*inner):
        path = shlex.quote(str(root))
        raise AmbiguousError(
            f"{escape(str(root))}: {first_names([_own_name(top) for top in tops], 4)} each hold {first_names(list(found), 3)} folders with the same class folders; choose one:\n"
            f"- One of them: topwork fit {shlex.quote(str(root / tops[0].name))}\n"
            f"- All images, divided anew: topwork fit {path} --label-regex '([^/]+)/[^/]+$' --domain-by '^{'[^/]+/' * (tops[0].name.count('/') - 1)}([^/]+)/'"
        )
    return found


def _nested_classes(root: Path, labeled: list[Place]) -> list[str]:
    """Class folders that hold images only in subfolders.

    Raises:
        UsageError: most images lie so deep that the inner folders may be the classes, or inner folders are called like classes.
    """
    tops: dict[str, list[Folder]] = {}
    for place in labeled:
        for name, child in place.folder.full.items():
            tops.setdefault(name, []).append(child)
    deep = {
        name: list(map(_without_wrappers, nodes))
        for name, nodes in tops.items()
        if not any(node.n_direct for node in nodes)
    }
    if all(_holds_its_name(name, node) for name, nodes in deep.items() for node in nodes):
        return []
    inner = {name for nodes in deep.values() for node in nodes for name in node.full}
    n_deep = sum(node.n_images for nodes in deep.values() for node in nodes)
    n_all = sum(node.n_images for nodes in tops.values() for node in nodes)
    if len(inner) > 1 and (2 * n_deep > n_all or len(inner & set(tops)) > 1):
        raise AmbiguousError(_two_readings(root, labeled, tops, deep, inner))
    return sorted(deep, key=natural_key) if len(inner) > 1 else []


def _holds_its_name(name: str, folder: Folder) -> bool:
    """Whether a folder only holds one of the same name with the images."""
    return set(folder.full) == {name} and not folder.full[name].full


def _without_wrappers(folder: Folder) -> Folder:
    """The folder inside that has several folders or images, as ``photos-001/photos`` of a download in pieces."""
    while not folder.n_direct and len(folder.full) == 1 and not next(iter(folder.full.values())).n_direct:
        (folder,) = folder.full.values()
    return folder


def _two_readings(
    root: Path, labeled: list[Place], tops: Mapping[str, object], deep: Mapping[str, list[Folder]], inner: set[str]
) -> str:
    """The error that shows both readings, each with its command."""
    n_above = {place.folder.name.count("/") for place in labeled}
    above = "[^/]+/" * min(n_above)
    path = shlex.quote(str(root))
    nodes = [node for found in deep.values() for node in found]
    below = [folder.name.split("/")[min(n_above) + 1 : -1] for node in nodes for folder in _above_images(node)]
    # SUN397 has abbey and church/indoor.
    are_long = len(set(map(len, below))) > 1 == len(n_above) and not any(
        name.lower() in CONTAINER_NAMES | set(PART_NAMES) for names in below for name in names
    )
    innermost = {"/".join(names) if are_long else names[-1] for names in below}
    pattern = f"^{above}[^/]+/(.+)/[^/]+$" if are_long else "([^/]+)/[^/]+$"
    repeated = len(nodes) > len(deep) or sum(len(node.full) for node in nodes) > len(inner)
    lines = [f"{escape(str(root))}: can be read in two ways; choose one (these options work with every command):"]
    if len(n_above) == 1 and len(tops) > 1:
        lines.append(
            f"- The classes are {first_names(list(tops), 4)}: topwork fit {path} --label-regex '^{above}([^/]+)/'"
        )
    are_patients = len(tops) > _FEW_PATIENTS and all(any(map(str.isdecimal, name)) for name in tops)
    option = f" --{'group' if are_patients else 'domain'}-by '^{above}([^/]+)/'"
    domain = option if repeated and len(n_above) == 1 and len(tops) > 1 else ""
    lines.append(
        f"- The classes are the innermost folders, {first_names(sorted(innermost, key=natural_key), 4)}: "
        f"topwork fit {path} --label-regex '{pattern}'{domain}"
    )
    alone = [node for node in nodes if len(node.full) > 1][:2] if labeled[0].part is None else []
    lines += [f"- Only {escape(node.name)}: topwork fit {shlex.quote(str(root / node.name))}" for node in alone]
    return "\n".join(lines)


def _above_images(folder: Folder) -> Iterator[Folder]:
    """The folders in it that hold images directly."""
    for child in folder.full.values():
        yield from [child] * bool(child.n_direct)
        yield from _above_images(child)


def _notes_on_folders(
    root: Path, places: list[Place], labeled: list[Place], aside: list[Folder], outside: Mapping[str, int]
) -> list[str]:
    """Sentences on the parts without class folders and on the folders next to the parts."""
    notes = []
    for place in places:
        if place.part and place not in labeled and place.folder.n_images:
            where = root / place.folder.name if root.is_dir() else root
            notes.append(
                f"{escape(place.folder.name)} has no class folders, so its {count(outside[place.folder.name], 'image')} "
                f"are not used. Classify them with: topwork predict RUN {shlex.quote(str(where))}"
            )
    others = [folder for folder in aside if folder not in [place.folder for place in places]]
    if others:
        notes.append(f"Ignored, because there are train/valid/test folders next to them: {_names_of(others)}.")
    return notes


def _names_of(folders: Iterable[Folder]) -> str:
    return first_names([folder.name for folder in folders])


# ---- duplicates


def merged_forms(listing: Listing) -> Listing:
    """Class names that differ only in Unicode form (macOS decomposes accents) become one, the more frequent of them."""
    forms: dict[str, Counter[str]] = {}
    for name in listing.class_names:
        forms.setdefault(canonical(name), Counter())[name] += 0
    double = {form for form, found in forms.items() if len(found) > 1}
    if not double:
        return listing
    for entry in listing.entries:
        forms[canonical(entry.label)][entry.label] += 1
    chosen = {name: found.most_common(1)[0][0] for found in forms.values() for name in found}
    entries = tuple(replace(entry, label=chosen[entry.label]) for entry in listing.entries)
    names = first_names([chosen[next(iter(forms[form]))] for form in sorted(double, key=natural_key)])
    note = f"Class names that differ only in Unicode form, merged: {names}."
    class_names = tuple(name for name in listing.class_names if chosen[name] == name)
    return replace(listing, entries=entries, class_names=class_names, notes=(*listing.notes, note))


def _without_copies(listing: Listing, found: Found) -> Listing:
    """Drops links to files that are used already; a folder that only stores what links in two others lead to is no class."""
    if not found.links:
        return listing
    stores = _stores(listing.entries, found.links)
    kept = [entry for entry in listing.entries if entry.label not in stores or entry.path in found.links]
    used = {entry.path for entry in kept if entry.path not in found.links}
    entries, rejects = [], list(listing.rejects)
    for entry in kept:
        real = found.links.get(entry.path)
        if real is None or real not in used:
            used.add(real or entry.path)
            entries.append(entry)
        else:
            rejects.append(Reject(entry.path, f"link to a file already used: {escape(real)}", expected=True))
    rejects += [Reject(f"{name}/", "only holds the targets of links", expected=True) for name in stores]
    notes = [f"Ignored, because links point to its files: {first_names(sorted(stores))}."] if stores else []
    class_names = tuple(name for name in listing.class_names if name not in stores)
    return replace(
        listing, entries=tuple(entries), class_names=class_names, rejects=tuple(rejects), notes=(*listing.notes, *notes)
    )


def _stores(entries: Sequence[Entry], links: Mapping[str, str]) -> set[str]:
    label_of = {entry.path: entry.label for entry in entries}
    linked_from: dict[str, set[str]] = {}
    targets: dict[str, set[str]] = {}
    for name, real in links.items():
        if name in label_of and real in label_of and label_of[name] != label_of[real]:
            linked_from.setdefault(label_of[real], set()).add(label_of[name])
            targets.setdefault(label_of[real], set()).add(real)
    n_real = Counter(entry.label for entry in entries if entry.path not in links)
    return {
        label for label, others in linked_from.items() if len(others) > 1 and 2 * len(targets[label]) > n_real[label]
    }


# ---- labels, groups and domains by a regular expression

_NAME_PATTERNS = (r"^(.*?[^\W\d_])[ ._-]*\(?\d+\)?\.\w+$", r"^\d+[ ._-]+([^\W\d_].*)\.\w+$", r"^(\d+)_\d+\.\w+$")


def regex_for_names(names: Sequence[str]) -> str | None:
    r"""A pattern for ``--label-regex`` if file names look like ``cat.12.jpg``, ``great_dane_3.jpg``, ``3_cat.png`` or ``0_12.jpg``; else None."""
    for pattern in _NAME_PATTERNS:
        labels = Counter(match[1] for name in names if (match := re.match(pattern, name.rsplit("/", 1)[-1])))
        n_matched = sum(labels.values())
        are_labels = 2 <= len(labels) <= max(2, n_matched / 3) and 2 * n_matched > len(names)
        if are_labels and not all(map(_split_name, labels)):
            return pattern
    return None


def label_taker(pattern: str) -> Callable[[str], str | None]:
    """The function from a path to its label, or None if the pattern does not match.

    The label is the named group ``label``; else, if other groups have names, the name of the one that matched (so
    that ``(?P<cat>^[A-Z])|(?P<dog>^[a-z])`` goes by the case of the first letter); else the first group.

    Raises:
        UsageError: not a regular expression, or one without a group.
    """
    compiled = _compiled(pattern, "--label-regex")
    if not compiled.groups:
        raise UsageError(f"--label-regex {pattern}: put the label in parentheses, such as '(.+)_\\d+'.")

    def take(path: str) -> str | None:
        match = compiled.search(path if "/" in pattern else path.rsplit("/", 1)[-1])
        if match is None:
            return None
        if "label" in compiled.groupindex:
            return match["label"]
        if compiled.groupindex:
            return next((name for name, text in match.groupdict().items() if text is not None), None)
        return match[1]

    return take


def _by_name(root: Path, found: Found, places: list[Place], pattern: str) -> Listing:
    take = label_taker(pattern)
    entries, rejects = [], list(found.rejects)
    parts = [(place.folder.name, place.part) for place in places if place.part not in (None, "unlabeled")]
    for name in found.files:
        label = take(name)
        if label:
            part = next((part for prefix, part in parts if name.startswith(prefix)), None)
            entries.append(Entry(name, label, part))
        else:
            rejects.append(Reject(name, "the name does not match --label-regex", expected=not looks_like_image(name)))
    return make_listing(root, "names", entries, rejects, [])


def with_groups(listing: Listing, rules: Rules) -> Listing:
    """Groups and domains taken from the paths, unless a column gave the groups.

    Of a match, the group of the pattern that is called ``group`` or ``domain`` counts, else its first, else all of it.

    Raises:
        UsageError: a pattern is no regular expression, or matches no path.
    """
    for name, pattern in (("group", rules.group_by), ("domain", rules.domain_by)):
        is_known = name == "group" and (pattern == PATIENT_ID or any(entry.group for entry in listing.entries))
        if pattern is None or not listing.entries or is_known:
            continue
        if name == "group" and re.fullmatch(r"\w+", pattern):
            raise UsageError(
                f"--group-by {pattern}: no such column (only tables have columns). "
                "Use a regular expression on the path instead, such as 'patient(\\d+)'."
            )
        compiled = _compiled(pattern, f"--{name}-by")
        chosen: int | str = name if name in compiled.groupindex else min(1, compiled.groups)
        matches: list[Any] = [compiled.search(entry.path) for entry in listing.entries]
        n_matched, n = sum(match is not None for match in matches), len(matches)
        if not n_matched:
            example = escape(listing.entries[0].path)
            raise UsageError(f"--{name}-by {pattern}: matches none of the {n} paths, for example {example}.")
        entries = tuple(
            replace(entry, **{name: match and match[chosen]})
            for entry, match in zip(listing.entries, matches, strict=True)
        )
        notes = [f"--{name}-by matches {n_matched} of {n} paths."] if n_matched < n else []
        listing = replace(listing, entries=entries, notes=(*listing.notes, *notes))
    return listing


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern}: not a valid regular expression: {error}.") from None
