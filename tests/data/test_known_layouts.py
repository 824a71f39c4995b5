"""Well-known datasets as they are unpacked, and the forms of the docs page: topwork reads each, or asks the right question."""

from __future__ import annotations

import ast
import csv
import hashlib
import html
import itertools
import json
import math
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawing import draw
from topwork.data.listing import list_data, read_image
from topwork.data.manifest import scan
from topwork.data.samples import Listing, Rules
from topwork.errors import UsageError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def images(folder: str, n: int = 4, ending: str = ".jpg", start: int = 0, prefix: str = "") -> list[str]:
    return [f"{folder}/{prefix}{number}{ending}" for number in range(start, start + n)]


def table(path: Path, *rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def classes(listing: Listing) -> dict[str, int]:
    return dict(Counter(entry.label for entry in listing.entries))


def parts(listing: Listing) -> dict[str | None, int]:
    return dict(Counter(entry.part for entry in listing.entries))


# ---- datasets by name: (what builds it, classes, parts)


def dog_breeds(root: Path) -> None:
    """Kaggle dog-breed-identification."""
    breeds = ["boston_bull", "dingo", "pekinese"]
    touch(root, *images("train", 9, prefix="0a"), *images("test", 5, prefix="0b"))
    table(root / "labels.csv", ["id", "breed"], *[[f"0a{n}", breeds[n % 3]] for n in range(9)])
    table(root / "sample_submission.csv", ["id", *breeds], *[[f"0b{n}", *[1 / 3] * 3] for n in range(5)])


def stanford_dogs(root: Path) -> None:
    for breed in ("n02085620-Chihuahua", "n02085782-Japanese_spaniel"):
        touch(root, *images(f"images/Images/{breed}", prefix=breed[:9] + "_"))
        touch(root, *images(f"annotations/Annotation/{breed}", ending="", prefix=breed[:9] + "_"))


def cassava(root: Path) -> None:
    touch(root, *images("train_images", 10, prefix="10000"), "test_images/2216849948.jpg")
    table(root / "train.csv", ["image_id", "label"], *[[f"10000{n}.jpg", n % 5] for n in range(10)])
    table(root / "sample_submission.csv", ["image_id", "label"], ["2216849948.jpg", 4])
    names = ["Bacterial Blight (CBB)", "Brown Streak (CBSD)", "Green Mottle (CGM)", "Mosaic (CMD)", "Healthy"]
    (root / "label_num_to_disease_map.json").write_text(json.dumps({str(n): name for n, name in enumerate(names)}))
    touch(root, "train_tfrecords/ld_train00-1338.tfrec")


def plant_pathology(root: Path) -> None:
    """Kaggle plant-pathology-2020."""
    kinds = ["healthy", "multiple_diseases", "rust", "scab"]
    touch(root, *images("images", 8, prefix="Train_"), *images("images", 8, prefix="Test_"))
    table(
        root / "train.csv",
        ["image_id", *kinds],
        *[[f"Train_{n}", *(int(n % 4 == k) for k in range(4))] for n in range(8)],
    )
    table(root / "test.csv", ["image_id"], *[[f"Test_{n}"] for n in range(8)])
    table(root / "sample_submission.csv", ["image_id", *kinds], *[[f"Test_{n}", *[0.25] * 4] for n in range(8)])


def aptos(root: Path) -> None:
    touch(root, *images("train_images", 10, ".png", prefix="00a"), *images("test_images", 4, ".png", prefix="00b"))
    table(root / "train.csv", ["id_code", "diagnosis"], *[[f"00a{n}", n % 5] for n in range(10)])
    table(root / "test.csv", ["id_code"], *[[f"00b{n}"] for n in range(4)])
    table(root / "sample_submission.csv", ["id_code", "diagnosis"], *[[f"00b{n}", 0] for n in range(4)])


def ham10000(root: Path) -> None:
    touch(root, *images("HAM10000_images_part_1", 4, prefix="ISIC_002"))
    touch(root, *images("HAM10000_images_part_2", 4, start=4, prefix="ISIC_002"))
    rows = [
        [f"HAM_{n // 2}", f"ISIC_002{n}", ("bkl", "nv")[n % 2], "histo", 80.0 + n, "male", "scalp"] for n in range(8)
    ]
    table(
        root / "HAM10000_metadata.csv", ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"], *rows
    )
    pixels = [f"pixel{n:04d}" for n in range(8)]
    table(root / "hmnist_8_8_L.csv", [*pixels, "label"], *[[*range(8), n % 7] for n in range(8)])


def chest_xray(root: Path) -> None:
    """Kaggle chest-xray-pneumonia, which holds everything twice."""
    for place in ("chest_xray", "chest_xray/chest_xray"):
        for part, n in (("train", 6), ("val", 2), ("test", 3)):
            for kind in ("NORMAL", "PNEUMONIA"):
                touch(root, *images(f"{place}/{part}/{kind}", n, ".jpeg"), f"{place}/{part}/{kind}/.DS_Store")
    touch(root, "chest_xray/__MACOSX/._chest_xray")


def intel_scenes(root: Path) -> None:
    for part, n in (("seg_train", 5), ("seg_test", 3)):
        for kind in ("buildings", "forest", "street"):
            touch(root, *images(f"{part}/{part}/{kind}", n))
    touch(root, *images("seg_pred/seg_pred", 7))


def flower_photos(root: Path) -> None:
    for kind in ("daisy", "roses", "tulips"):
        touch(root, *images(f"flower_photos/{kind}"))
    touch(root, "flower_photos/LICENSE.txt")


def pet_images(root: Path) -> None:
    for kind in ("Cat", "Dog"):
        touch(root, *images(f"PetImages/{kind}"), f"PetImages/{kind}/Thumbs.db")
    touch(root, "MSR-LA - 3467.docx", "readme[1].txt")


def fruits_360(root: Path) -> None:
    for part, n in (("Training", 5), ("Test", 2)):
        for kind in ("Apple Braeburn", "Banana"):
            touch(root, *images(f"fruits-360_dataset/fruits-360/{part}/{kind}", n, "_100.jpg"))
    touch(root, *images("fruits-360_dataset/fruits-360/test-multiple_fruits", 3))
    touch(root, "fruits-360_dataset/fruits-360/papers/paper.pdf", "fruits-360_dataset/fruits-360/readme.md")


def cats_and_dogs_twice(root: Path) -> None:
    for part, n in (("training_set", 5), ("test_set", 2)):
        for kind in ("cats", "dogs"):
            touch(root, *images(f"{part}/{part}/{kind}", n), f"{part}/{part}/{kind}/_DS_Store")


def tiny_imagenet(root: Path) -> None:
    for kind in ("n01443537", "n01629819"):
        touch(root, *images(f"train/{kind}/images", ending=".JPEG"))
    touch(root, *images("val/images", 4, ".JPEG"), *images("test/images", 3, ".JPEG"), "words.txt", "wnids.txt")
    lines = [f"{n}.JPEG\t{('n01443537', 'n01629819')[n % 2]}\t0\t32\t44\t62\n" for n in range(4)]
    write(root / "val" / "val_annotations.txt", "".join(lines))


def birds(root: Path) -> None:
    rows = []
    for part, n in (("train", 4), ("valid", 2), ("test", 2)):
        for number, kind in enumerate(("ABBOTTS BABBLER", "ABBOTTS BOOBY")):
            rows += [[number, name, kind, part, kind.lower()] for name in images(f"{part}/{kind}", n)]
    touch(root, *[str(row[1]) for row in rows])
    table(root / "birds.csv", ["class id", "filepaths", "labels", "dataset", "scientific name"], *rows)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def imagenette(root: Path) -> None:
    """With a table of noisy labels that could be read in two ways."""
    rows = []
    for part in ("train", "val"):
        for synset in ("n01440764", "n02102040"):
            names = images(f"{part}/{synset}")
            touch(root, *names)
            rows += [[name, synset, synset, part == "val"] for name in names]
    table(root / "noisy_imagenette.csv", ["path", "noisy_labels_0", "noisy_labels_1", "is_valid"], *rows)


def food_101(root: Path) -> None:
    """Lists without labels divide the images."""
    dishes = ["apple_pie", "baby_back_ribs"]
    touch(root, *images("images/apple_pie", 6), *images("images/baby_back_ribs", 6, start=100))
    for part, rows in (("train", range(4)), ("test", range(4, 6))):
        write(root / "meta" / f"{part}.txt", "".join(f"apple_pie/{n}\nbaby_back_ribs/{100 + n}\n" for n in rows))
    write(root / "meta" / "classes.txt", "\n".join(dishes))
    write(root / "meta" / "train.json", json.dumps({dish: [f"{dish}/0"] for dish in dishes}))


def textures(root: Path) -> None:
    """DTD: ten ways to divide the images, of which none is taken."""
    touch(root, *images("images/banded", 6), *images("images/dotted", 6, start=100))
    names = [f"banded/{n}.jpg" for n in range(6)] + [f"dotted/{100 + n}.jpg" for n in range(6)]
    for number in range(1, 11):
        for index, part in enumerate(("train", "val", "test")):
            own = [name for n, name in enumerate(names) if (n + number) % 3 == index]
            write(root / "labels" / f"{part}{number}.txt", "\n".join(own))


def nih_chest(root: Path) -> None:
    touch(root, *images("images_001/images", 5, ".png", prefix="0000"))
    touch(root, *images("images_002/images", 5, ".png", start=5, prefix="0000"))
    rows = [[f"0000{n}.png", ["No Finding", "Mass"][n % 2], n // 2, 58] for n in range(10)]
    table(root / "Data_Entry_2017.csv", ["Image Index", "Finding Labels", "Patient ID", "Patient Age"], *rows)
    write(root / "train_val_list.txt", "\n".join(str(row[0]) for row in rows[:8]))
    write(root / "test_list.txt", "\n".join(str(row[0]) for row in rows[8:]))


def oxford_pets(root: Path) -> None:
    names = [f"{breed}_{n}" for breed in ("Abyssinian", "american_bulldog") for n in range(4)]
    touch(root, *[f"images/{name}.jpg" for name in names], *[f"annotations/trimaps/{name}.png" for name in names])
    lines = [f"{name} {1 + (name[0] == 'a')} 1 1\n" for name in names]
    write(root / "annotations" / "list.txt", "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n" + "".join(lines))
    write(root / "annotations" / "trainval.txt", "".join(lines[::2]))
    write(root / "annotations" / "test.txt", "".join(lines[1::2]))


def traffic_signs(root: Path) -> None:
    """GTSRB on Kaggle: only the table knows the classes of the test images."""
    columns = ["Width", "Height", "Roi.X1", "Roi.Y1", "ClassId", "Path"]
    train = [[30, 30, 5, 5, c, f"Train/{c}/0000{c}_{n}.png"] for c in range(3) for n in range(4)]
    test = [[30, 30, 5, 5, n % 3, f"Test/{n:05}.png"] for n in range(6)]
    meta = [[f"Meta/{c}.png", c, 1] for c in range(3)]
    touch(root, *[str(row[-1]) for row in [*train, *test]], *[str(row[0]) for row in meta])
    for name, rows in (("Train", train), ("Test", test)):
        table(root / f"{name}.csv", columns, *rows)
    table(root / "Meta.csv", ["Path", "ClassId", "ShapeId"], *meta)


def north_american_birds(root: Path) -> None:
    """NABirds: the names of the numbers stand next to images/, and those of their orders with them."""
    for number in (295, 296):
        touch(root, *images(f"images/{number:04}"))
    write(root / "classes.txt", "0 Birds\n295 Black Duck\n296 Mallard\n")
    write(root / "hierarchy.txt", "0 0\n295 0\n296 0\n")


def udacity_flowers(root: Path) -> None:
    for number in (1, 2, 10):
        touch(root, *images(f"train/{number}", 4, prefix=f"image_{number}"), *images(f"valid/{number}", 2, start=4))
    write(root / "cat_to_name.json", json.dumps({"1": "pink primrose", "2": "canna lily", "10": "globe thistle"}))


def cub(root: Path) -> None:
    touch(root, *images("images/001.Black_footed_Albatross", 4), *images("images/002.Laysan_Albatross", 4, start=4))
    folders = ["001.Black_footed_Albatross"] * 4 + ["002.Laysan_Albatross"] * 4
    write(root / "images.txt", "".join(f"{n + 1} {folder}/{n}.jpg\n" for n, folder in enumerate(folders)))
    write(root / "train_test_split.txt", "".join(f"{n + 1} {n % 2}\n" for n in range(8)))
    write(root / "image_class_labels.txt", "".join(f"{n + 1} {1 + n // 4}\n" for n in range(8)))
    write(root / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")


def inaturalist(root: Path) -> None:
    """COCO-style JSON for each part; the images are two folders below, under numbers."""
    kinds = [{"id": 100, "name": "Turdus merula"}, {"id": 101, "name": "Parus major"}]
    names = [f"train_val2019/Birds/{100 + n % 2}/{n}a.jpg" for n in range(8)]
    touch(root, *names)
    for part, rows in (("train", range(6)), ("val", range(6, 8))):
        found = {
            "images": [{"id": n, "file_name": names[n]} for n in rows],
            "annotations": [{"image_id": n, "category_id": 100 + n % 2} for n in rows],
            "categories": kinds,
        }
        write(root / f"{part}2019.json", json.dumps(found))


def places_365(root: Path) -> None:
    train = [f"/{name[0]}/{name}/0000{n}.jpg" for name in ("airfield", "bakery") for n in range(3)]
    touch(root, *[f"data_256{name}" for name in train], *images("val_256", 4, prefix="Places365_val_"))
    write(root / "places365_train_standard.txt", "".join(f"{name} {n // 3}\n" for n, name in enumerate(train)))
    write(root / "places365_val.txt", "".join(f"Places365_val_{n}.jpg {n % 2}\n" for n in range(4)))
    write(root / "categories_places365.txt", "/a/airfield 0\n/b/bakery 1\n")


def eurosat(root: Path) -> None:
    touch(
        root, *images("EuroSAT/2750/AnnualCrop", prefix="AnnualCrop_"), *images("EuroSAT/2750/Forest", prefix="Forest_")
    )


def uc_merced(root: Path) -> None:
    for kind in ("agricultural", "airplane"):
        touch(root, *images(f"UCMerced_LandUse/Images/{kind}", ending=".tif", prefix=kind))
    touch(root, "UCMerced_LandUse/readme.txt")


def mvtec(root: Path) -> None:
    touch(root, *images("bottle/train/good", 4, ".png"))
    for kind in ("good", "broken_large"):
        touch(root, *images(f"bottle/test/{kind}", 3, ".png", start=20))
    touch(root, *images("bottle/ground_truth/broken_large", 3, "_mask.png", start=20))


def via(root: Path) -> None:
    """An export of the VGG Image Annotator."""
    touch(root, *images(".", 6))
    rows = {
        f"{n}.jpg9": {"filename": f"{n}.jpg", "regions": [], "file_attributes": {"kind": "ab"[n % 2]}} for n in range(6)
    }
    write(root / "via_export.json", json.dumps(rows))


def traffic_signs_of_torchvision(root: Path) -> None:
    """The classes of the test images stand in a table, as numbers without the zeros of the folders."""
    for number in range(3):
        touch(root, *images(f"GTSRB/Training/{number:05}", 4, ".ppm", prefix="00000_"))
    touch(root, *images("GTSRB/Final_Test/Images", 6, ".ppm"))
    table(root / "GT-final_test.csv", ["Filename;Width;ClassId"], *[[f"{n}.ppm;30;{n % 3}"] for n in range(6)])


def inaturalist_mini(root: Path) -> None:
    for part, n in (("train_mini", 6), ("val", 2)):
        for kind in ("00000_Animalia", "00001_Plantae"):
            touch(root, *images(f"{part}/{kind}", n))


def retinal_scans_twice(root: Path) -> None:
    """OCT2017: everything is there twice, once below its own name."""
    for place in ("OCT2017 ", "oct2017/OCT2017 "):
        for part, n in (("train", 4), ("val", 1), ("test", 2)):
            for kind in ("CNV", "DRUSEN"):
                for number in range(n):
                    write(root / f"{place}/{part}/{kind}/{number}.jpeg", f"{part} {kind} {number}")


def garbage_twice(root: Path) -> None:
    for place in ("Garbage classification", "garbage classification"):
        for kind in ("glass", "paper"):
            for number in range(4):
                write(root / f"{place}/Garbage classification/{kind}/{kind}{number}.jpg", f"{kind} {number}")


def domain_net(root: Path) -> None:
    for domain in ("clipart", "real"):
        for part, own in PARTS_OF_SIX.items():
            names = [f"{domain}/{kind}/{n}.jpg {number}" for number, kind in enumerate(("ant", "bee")) for n in own]
            touch(root, *[name.split()[0] for name in names])
            write(root / f"{domain}_{part}.txt", "\n".join(names))


def lists_and_their_union(root: Path) -> None:
    """The flowers of PaddleClas."""
    touch(root, *images("jpg", 10))
    for name, rows in (("train", range(8)), ("val", range(8, 10)), ("train_extra", range(10))):
        write(root / f"{name}_list.txt", "\n".join(f"jpg/{n}.jpg {n % 2}" for n in rows))
    write(root / "flowers_label_list.txt", "0 rose\n1 tulip\n")


def skin_of_dataverse(root: Path) -> None:
    touch(root, *images("HAM10000_images_part_1", 4), *images("HAM10000_images_part_2", 4, start=4))
    rows = [f"HAM_{n}\t{n}\t{('bkl', 'nv')[n % 2]}" for n in range(8)]
    write(root / "HAM10000_metadata.tab", "\n".join(["lesion_id\timage_id\tdx", *rows]))


def birds_and_segmentations(root: Path) -> None:
    cub(root / "CUB_200_2011")
    touch(root, *images("segmentations/001.Black_footed_Albatross", 4, ".png"))
    touch(root, *images("segmentations/002.Laysan_Albatross", 4, ".png", start=4))


def retinal_diseases(root: Path) -> None:
    """RFMiD on Kaggle: every part has a table and images 1.png, 2.png, ... in folders of its own name."""
    for part, own, n in (("Training", "Training", 6), ("Evaluation", "Validation", 4), ("Test", "Test", 4)):
        place = f"{part}_Set/{part}_Set"
        touch(root, *images(f"{place}/{own}", n, ".png", start=1))
        rows = [[number, number % 2] for number in range(1, n + 1)]
        table(root / f"{place}/RFMiD_{own}_Labels.csv", ["ID", "Disease_Risk"], *rows)


def skin_and_segmentations(root: Path) -> str:
    touch(root, *images("HAM10000_images_part_1"), *images("HAM10000_images_part_2", start=4), "HAM10000_metadata")
    touch(root, *images("HAM10000_segmentations", 8, "_segmentation.png"))
    return "pieces or groups, not classes"


def fish(root: Path) -> None:
    """A Large Scale Fish Dataset: in each class a folder of images and one of their segmentations."""
    for kind in ("Trout", "Sea Bass"):
        touch(root, *images(f"Fish_Dataset/{kind}/{kind}", ending=".png"))
        touch(root, *images(f"Fish_Dataset/{kind}/{kind} GT", ending=".png"))


def smokers(root: Path) -> None:
    """PAD-UFES-20: the diagnosis stands beside columns of True and False."""
    touch(root, *images("imgs_part_1", 3, ".png"), *images("imgs_part_2", 3, ".png", start=3))
    rows = [[f"PAT_{n}", n % 2 == 0, n % 2 == 1, ("BCC", "NEV")[n % 2], f"{n}.png"] for n in range(6)]
    table(root / "metadata.csv", ["patient_id", "smoke", "drink", "diagnostic", "img_id"], *rows)


FIVE = dict.fromkeys(
    ("Bacterial Blight (CBB)", "Brown Streak (CBSD)", "Green Mottle (CGM)", "Healthy", "Mosaic (CMD)"), 2
)
KNOWN: dict[str, tuple[Callable[[Path], None], dict[str, int], dict[str | None, int]]] = {
    "dog breeds": (dog_breeds, {"boston_bull": 3, "dingo": 3, "pekinese": 3}, {None: 9}),
    "Stanford dogs": (stanford_dogs, {"n02085620-Chihuahua": 4, "n02085782-Japanese_spaniel": 4}, {None: 8}),
    "cassava": (cassava, FIVE, {None: 10}),
    "plant pathology": (plant_pathology, {"healthy": 2, "multiple_diseases": 2, "rust": 2, "scab": 2}, {None: 8}),
    "APTOS": (aptos, {str(n): 2 for n in range(5)}, {None: 10}),
    "HAM10000": (ham10000, {"bkl": 4, "nv": 4}, {None: 8}),
    "chest X-ray": (chest_xray, {"NORMAL": 11, "PNEUMONIA": 11}, {"train": 12, "valid": 4, "test": 6}),
    "Intel scenes": (intel_scenes, {"buildings": 8, "forest": 8, "street": 8}, {"train": 15, "test": 9}),
    "flower photos": (flower_photos, {"daisy": 4, "roses": 4, "tulips": 4}, {None: 12}),
    "PetImages": (pet_images, {"Cat": 4, "Dog": 4}, {None: 8}),
    "Fruits-360": (fruits_360, {"Apple Braeburn": 7, "Banana": 7}, {"train": 10, "test": 4}),
    "cats and dogs": (cats_and_dogs_twice, {"cats": 7, "dogs": 7}, {"train": 10, "test": 4}),
    "Tiny ImageNet": (tiny_imagenet, {"n01443537": 6, "n01629819": 6}, {"train": 8, "valid": 4}),
    "Imagenette": (imagenette, {"n01440764": 8, "n02102040": 8}, {"train": 8, "valid": 8}),
    "Food-101": (food_101, {"apple_pie": 6, "baby_back_ribs": 6}, {"train": 8, "test": 4}),
    "textures": (textures, {"banded": 6, "dotted": 6}, {None: 12}),
    "NIH chest X-rays": (nih_chest, {"Mass": 5, "No Finding": 5}, {"train": 8, "test": 2}),
    "Oxford pets": (oxford_pets, {"Abyssinian": 4, "american_bulldog": 4}, {"train": 4, "test": 4}),
    "traffic signs": (traffic_signs, {"0": 6, "1": 6, "2": 6}, {"train": 12, "test": 6}),
    "Udacity's flowers": (
        udacity_flowers,
        {"pink primrose": 6, "canna lily": 6, "globe thistle": 6},
        {"train": 12, "valid": 6},
    ),
    "NABirds": (north_american_birds, {"Black Duck": 4, "Mallard": 4}, {None: 8}),
    "CUB": (cub, {"001.Black_footed_Albatross": 4, "002.Laysan_Albatross": 4}, {"train": 4, "test": 4}),
    "iNaturalist": (inaturalist, {"Parus major": 4, "Turdus merula": 4}, {"train": 6, "valid": 2}),
    "Places365": (places_365, {"/a/airfield": 5, "/b/bakery": 5}, {"train": 6, "valid": 4}),
    "EuroSAT": (eurosat, {"AnnualCrop": 4, "Forest": 4}, {None: 8}),
    "UC Merced": (uc_merced, {"agricultural": 4, "airplane": 4}, {None: 8}),
    "MVTec AD": (mvtec, {"broken_large": 3, "good": 7}, {"train": 4, "test": 6}),
    "VGG Image Annotator": (via, {"a": 3, "b": 3}, {None: 6}),
    "GTSRB": (traffic_signs_of_torchvision, dict.fromkeys(("00000", "00001", "00002"), 6), {"train": 12, "test": 6}),
    "iNaturalist mini": (
        inaturalist_mini,
        {"00000_Animalia": 8, "00001_Plantae": 8},
        {"train": 12, "valid": 4},
    ),
    "OCT2017": (retinal_scans_twice, {"CNV": 7, "DRUSEN": 7}, {"train": 8, "valid": 2, "test": 4}),
    "garbage": (garbage_twice, {"glass": 4, "paper": 4}, {None: 8}),
    "DomainNet": (domain_net, {"ant": 12, "bee": 12}, {"train": 16, "test": 8}),
    "PaddleClas": (lists_and_their_union, {"rose": 5, "tulip": 5}, {"train": 8, "valid": 2}),
    "HAM10000 of Dataverse": (skin_of_dataverse, {"bkl": 4, "nv": 4}, {None: 8}),
    "CUB of Kaggle": (
        birds_and_segmentations,
        {"001.Black_footed_Albatross": 4, "002.Laysan_Albatross": 4},
        {"train": 4, "test": 4},
    ),
    "RFMiD": (retinal_diseases, {"0": 7, "1": 7}, {"train": 6, "valid": 4, "test": 4}),
    "fish": (fish, {"Trout": 4, "Sea Bass": 4}, {None: 8}),
    "PAD-UFES": (smokers, {"BCC": 3, "NEV": 3}, {None: 6}),
    "birds": (birds, {"ABBOTTS BABBLER": 8, "ABBOTTS BOOBY": 8}, {"train": 8, "valid": 4, "test": 4}),
}


def zip_of(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(folder.rglob("*")):
            if one.is_file():
                file.write(one, one.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("form", ["folder", "wrapped", "zip"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_data_set_as_it_is_unpacked(name, form, tmp_path) -> None:
    build, expected, expected_parts = KNOWN[name]
    root = tmp_path / "data"
    build(root / "outer" if form == "wrapped" else root)
    listing = list_data(zip_of(root) if form == "zip" else root)
    assert classes(listing) == expected
    assert parts(listing) == expected_parts
    assert not any("trimaps" in entry.path or " GT/" in entry.path for entry in listing.entries)
    assert all(read_image(listing.root, entry.path) for entry in listing.entries)
    failed = [reject for reject in listing.rejects if not reject.expected]
    assert not failed


@pytest.mark.parametrize("form", ["folder", "table"])
def test_class_numbers_get_names_from_the_files_unless_the_table_itself_is_given(form, tmp_path) -> None:
    rows = [[f"images/{name}_{n}.jpg", number] for number, name in enumerate(("cat", "dog")) for n in range(3)]
    touch(tmp_path, *[str(path) for path, _ in rows])
    table(tmp_path / "labels.csv", ["path", "label"], *rows)
    listing = list_data(tmp_path / "labels.csv" if form == "table" else tmp_path)
    assert classes(listing) == ({"0": 3, "1": 3} if form == "table" else {"cat": 3, "dog": 3})


ATTRIBUTES = ["Arched_Eyebrows", "Bald", "Smiling"]


@pytest.mark.parametrize("form", ["csv", "txt"])
def test_celeba_in_its_official_parts(form, tmp_path) -> None:
    """Attributes and parts stand in tables of their own, as on Kaggle and as torchvision keeps them."""
    names = [f"{n:06}.jpg" for n in range(1, 11)]
    marks = [[1 if (n >> k) % 2 else -1 for k in range(3)] for n in range(10)]
    touch(tmp_path, *[f"img_align_celeba/{name}" for name in names])
    rows = [[name, *own] for name, own in zip(names, marks, strict=True)]
    shares = [[name, max(0, n - 7)] for n, name in enumerate(names)]
    boxes = [[name, 95 + n, 71, 226, 313] for n, name in enumerate(names)]
    if form == "csv":
        table(tmp_path / "list_attr_celeba.csv", ["image_id", *ATTRIBUTES], *rows)
        table(tmp_path / "list_eval_partition.csv", ["image_id", "partition"], *shares)
        table(tmp_path / "list_bbox_celeba.csv", ["image_id", "x_1", "y_1", "width", "height"], *boxes)
    else:
        lines = ["10", " ".join(ATTRIBUTES), *[f"{row[0]}  {row[1]:2}  {row[2]:2} {row[3]:2}" for row in rows]]
        write(tmp_path / "list_attr_celeba.txt", "\n".join(lines))
        write(tmp_path / "list_eval_partition.txt", "".join(f"{name} {part}\n" for name, part in shares))
        lines = ["10", "image_id x_1 y_1 width height", *[" ".join(map(str, row)) for row in boxes]]
        write(tmp_path / "list_bbox_celeba.txt", "\n".join(lines))
    for path in (tmp_path, tmp_path / f"list_attr_celeba.{form}"):
        with pytest.raises(UsageError, match="--multi-label"):
            list_data(path)
        listing = list_data(path, rules=Rules(multi_label=True))
        assert parts(listing) == {"train": 8, "valid": 1, "test": 1}
        assert [entry.label for entry in listing.entries][:4] == ["", *ATTRIBUTES[:2], "Arched_Eyebrows|Bald"]
        assert len(listing.entries) == 10
        assert not [one for one in listing.rejects if not one.expected]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.csv", "image,split\n0.jpg,train\n1.jpg,test\n2.jpg,train\n3.jpg,test\n"),
        ("train_test_split.txt", "0.jpg 1\n1.jpg 0\n2.jpg 1\n3.jpg 0\n"),
        ("partition.tsv", "image\tpartition\n0.jpg\tTrain\n1.jpg\tTest\n2.jpg\tTrain\n3.jpg\tTest\n"),
    ],
)
def test_a_table_of_parts_beside_one_of_labels(name, text, tmp_path) -> None:
    touch(tmp_path, *images("photos"))
    table(tmp_path / "labels.csv", ["image", "label"], *[[f"{n}.jpg", "ab"[n // 2]] for n in range(4)])
    write(tmp_path / name, text)
    for path in (tmp_path, tmp_path / "labels.csv"):
        listing = list_data(path)
        assert [entry.part for entry in listing.entries] == ["train", "test"] * 2
        assert listing.notes[-1] == f"Train, valid and test parts from {name}."


# ---- the page docs/layouts.md

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
ROWS = [
    [html.unescape(cell.strip()) for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if "<pre>" in line
]


def drawn(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw("disc", int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4]), 32).save(path)


def build_picture(picture: str, root: Path) -> None:
    """Builds what a picture of the page shows: a path per line, with the content of a text file indented below it."""
    if picture.startswith("npz: "):
        arrays = {
            name: np.arange(math.prod(shape := ast.literal_eval(size))).reshape(shape).astype(np.uint8)
            % (250 if len(shape) > 2 else 2)
            for name, size in re.findall(r"(\w+) (\(.*?\))", picture)
        }
        np.savez(root.with_suffix(".npz"), **arrays)
        return
    text: Path | None = None
    for line in picture.splitlines():
        if line.startswith("  "):
            assert text is not None
            text.write_text(text.read_text() + line[2:] + "\n")
            continue
        path = root / line.removeprefix("zip: ").split(" ")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if " -> " in line:
            path.symlink_to(line.split(" -> ")[1])
        elif line.endswith(" …"):
            first = int(re.search(r"(\d+)\.\w+$", path.name)[1])
            for number in range(first, first + 4):
                drawn(path.with_name(path.name.replace(f"{first}.", f"{number}.")))
        elif path.suffix == ".jpg":
            drawn(path)
        else:
            path.write_text("")
            text = path
    if picture.startswith("zip: "):
        zip_of(root)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_each_row_of_the_page_is_read_as_it_says(row, tmp_path, monkeypatch) -> None:
    _, picture, command, read_as, _ = row
    build_picture(re.sub(r"</?pre>", "", picture).replace("<br>", "\n"), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    topwork, fit, path, *options = shlex.split(re.sub(r"</?code>", "", command))
    assert (topwork, fit) == ("topwork", "fit")
    asked: dict[str, Any] = {"multi_label": "--multi-label" in options}
    options = [option for option in options if option != "--multi-label"]
    asked |= {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    if read_as.startswith("asks: "):
        with pytest.raises(UsageError, match=read_as.removeprefix("asks: ")) as caught:
            scan(path, rules=Rules(**asked))
        assert "topwork fit data" in str(caught.value)
        return
    manifest = scan(path, rules=Rules(**asked))
    found = Counter(sample.part for sample in manifest.samples)
    in_parts = ", ".join(f"{part} {found[part]}" for part in ("train", "valid", "test") if found[part])
    assert (
        ", ".join(f"{name} {n}" for name, n in manifest.counts.items()) + (f"; {in_parts}" if in_parts else "")
        == read_as
    )
    assert manifest.n_failed == 0


# ---- names that mislead


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled", "no_label"])
def test_unlabeled_images_beside_class_folders_are_no_class(name: str, tmp_path: Path) -> None:
    touch(tmp_path, *images("positive"), *images("negative"), *images(name, 20))
    listing = list_data(tmp_path)
    assert listing.class_names == ("negative", "positive")
    (note,) = listing.notes
    assert f"topwork predict RUN {tmp_path / name}" in note
    assert all(reject.expected for reject in listing.rejects)


def test_windows_paths_beside_folders_called_like_the_labels(tmp_path: Path) -> None:
    touch(tmp_path, *images("cat", 3), *images("dog", 3))
    table(tmp_path / "labels.csv", ["path", "label"], *[[f"{c}\\{n}.jpg", c] for c in ("cat", "dog") for n in range(3)])
    listing = list_data(tmp_path / "labels.csv")
    assert classes(listing) == {"cat": 3, "dog": 3}
    assert listing.entries[0].path == "cat/0.jpg"


@pytest.mark.parametrize("form", ["{}", "{}.0"])
def test_numbers_that_lost_their_leading_zeros(form: str, tmp_path: Path) -> None:
    touch(tmp_path, *[f"{n:04d}.jpg" for n in range(6)])
    table(tmp_path / "labels.csv", ["id", "label"], *[[form.format(n), "ab"[n % 2]] for n in range(6)])
    assert [entry.path for entry in list_data(tmp_path / "labels.csv").entries] == [f"{n:04d}.jpg" for n in range(6)]


def test_parts_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    """Kaggle's dogs-vs-cats: the class is in the file name."""
    touch(tmp_path, *images("train", 6, prefix="cat."), *images("train", 6, prefix="dog."), *images("test1", 5))
    with pytest.raises(UsageError, match="If the labels are in the file names: topwork fit ") as raised:
        list_data(tmp_path)
    pattern = shlex.split(str(raised.value))[-1]
    assert classes(list_data(tmp_path, rules=Rules(label_regex=pattern))) == {"cat": 6, "dog": 6}


def test_detection_data_are_no_class_called_train(tmp_path: Path) -> None:
    touch(tmp_path, *images("images/train", 4), *images("labels/train", 4, ending=".txt"))
    with pytest.raises(UsageError, match="the folders train hold images but no class folders"):
        list_data(tmp_path)


def test_boxes_in_a_text_for_each_image_are_no_tables(tmp_path: Path) -> None:
    for number in range(60):
        touch(tmp_path, f"images/{number}a.jpg")
        write(tmp_path / f"labels/{number}a.txt", "0 0.5 0.5 0.1 0.1\n")
        write(tmp_path / f"labels/{number}a_old.txt", "0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UsageError, match=r"no class folders here.*the \.txt files beside the images hold boxes"):
        list_data(tmp_path)


def test_boxes_in_xml_are_named(tmp_path: Path) -> None:
    touch(tmp_path, *images("."), *images(".", ending=".xml"))
    with pytest.raises(UsageError, match=r"the \.xml files beside the images hold boxes"):
        list_data(tmp_path)


@pytest.mark.parametrize("folder", ["{}", "data/{}/train"])
def test_labels_in_a_folder_beside_that_of_the_images(folder: str, tmp_path: Path) -> None:
    for number in range(6):
        touch(tmp_path, f"{folder.format('images')}/{number}.jpg")
        write(tmp_path / f"{folder.format('labels')}/{number}.txt", ["cat", "dog"][number % 2] + "\n")
    assert classes(list_data(tmp_path)) == {"cat": 3, "dog": 3}


@pytest.mark.parametrize("name", ["{}.json", "{}.jpg.json"])
def test_tags_of_supervisely(name: str, tmp_path: Path) -> None:
    for number in range(6):
        touch(tmp_path, f"ds0/img/{number}.jpg")
        tags = [{"name": ["cat", "dog"][number % 2], "value": None}]
        write(tmp_path / "ds0/ann" / name.format(number), json.dumps({"tags": tags, "objects": []}))
    write(tmp_path / "meta.json", json.dumps({"classes": [], "tags": [{"name": "cat"}, {"name": "dog"}]}))
    assert classes(list_data(tmp_path)) == {"cat": 3, "dog": 3}


@pytest.mark.parametrize(
    "names",
    [("Training", "Validierung", "Test"), ("entraînement", "validation", "test"), ("treino", "validacao", "teste")],
)
def test_parts_in_other_languages(names: tuple[str, str, str], tmp_path: Path) -> None:
    for folder in names:
        touch(tmp_path, *images(f"{folder}/cat", 3), *images(f"{folder}/dog", 3))
    listing = list_data(tmp_path)
    assert classes(listing) == {"cat": 9, "dog": 9}
    assert parts(listing) == {"train": 6, "valid": 6, "test": 6}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data/train-00000.parquet", "cannot be read as Parquet"),
        ("inner.zip", "unpack it"),
        ("labels.xlsx", "save it as CSV"),
    ],
)
def test_what_is_not_opened_is_said_with_the_way_out(name: str, words: str, tmp_path: Path) -> None:
    touch(tmp_path, name)
    with pytest.raises(UsageError, match=words):
        list_data(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["cars_train/1.jpg", "cars_test/2.jpg", "devkit/cars_train_annos.mat"],
            "devkit/cars_train_annos.mat: a MATLAB file.*CSV",
        ),
        (["train_32x32.mat", "test_32x32.mat"], "test_32x32.mat: a MATLAB file"),
        (["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"], "MNIST's own format; save the arrays as .npz"),
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"], "pickled CIFAR batches"),
        (["train-00000-of-00002.tfrecord"], "TFRecords, which are not read"),
        (["train.tfrecord-00000-of-00002"], "TFRecords, which are not read"),
        (["data.mdb", "lock.mdb"], "records of a kind that is not read; save the images as files, or in Parquet"),
        (["train.pt"], "a pickle, which can run code"),
        (["x.tar.zst"], "x.tar.zst: an archive of a kind that is not read; unpack it first"),
        (["x.tar.gz.partaa", "x.tar.gz.partab"], "a piece of an archive; join the pieces"),
        (["images/1.jpg", "labels.csv.gz"], "labels.csv.gz: a compressed table; unpack it first"),
        (["images/1.jpg", "labels.db"], "labels.db: a database; save the table as CSV"),
        (["x.h5"], "save them as .npz"),
        (["hgg/1.nii.gz", "lgg/2.nii.gz"], "a volume; save its slices as images"),
        (["photos-2024-001.zip", "photos-2024-002.zip"], "photos-2024-001.zip: an archive inside; unpack it first"),
    ],
)
def test_data_that_are_not_opened_are_named_with_the_way_out(names, words, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UsageError, match=words):
        scan(tmp_path)


def test_one_file_that_is_no_dataset(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "labels.mat")
    with pytest.raises(UsageError, match=r"one image, not a dataset.*topwork predict"):
        list_data(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="a MATLAB file"):
        list_data(tmp_path / "labels.mat")
    for name in ("cut.zip", "page.tar.gz"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(UsageError, match=f"{name}: not the archive that its name says.*download it again"):
            list_data(tmp_path / name)


def test_pixels_in_a_table_are_refused_with_the_way_out(tmp_path: Path) -> None:
    table(tmp_path / "mnist.csv", ["label", *[f"pixel{n}" for n in range(784)]], [3, *[0] * 784])
    table(tmp_path / "fer2013.csv", ["emotion", "pixels", "Usage"], [0, "1 2 3 4", "Training"])
    table(tmp_path / "emnist.csv", *[[label, *range(label, label + 784)] for label in (45, 36, 43)])
    for name in ("mnist.csv", "fer2013.csv", "emnist.csv"):
        with pytest.raises(UsageError, match=r"the pixels of the images are in the table.*\.npz"):
            list_data(tmp_path / name)


def test_a_download_in_numbered_pieces_is_asked_about(tmp_path: Path) -> None:
    for piece in (1, 2):
        touch(
            tmp_path,
            *images(f"photos-2024-00{piece}/photos/cat", start=10 * piece),
            *images(f"photos-2024-00{piece}/photos/dog", start=10 * piece),
        )
    with pytest.raises(UsageError, match="The classes are the innermost folders, cat, dog: ") as raised:
        list_data(tmp_path)
    (line,) = (line for line in str(raised.value).splitlines() if "innermost" in line)
    words = shlex.split(line.split(": ")[1])
    assert classes(list_data(words[2], rules=Rules(label_regex=words[4]))) == {"cat": 8, "dog": 8}


@pytest.mark.parametrize("cells", [["0.0", "1.0", ""], ["True", "False", ""], ["0", "1", ""]])
def test_a_folder_of_images_is_no_class_beside_a_table_of_some_of_them(cells, tmp_path: Path) -> None:
    touch(tmp_path, *images("shots", 9))
    table(tmp_path / "l.csv", ["image", "is_defect"], *[[f"{n}.jpg", cells[n % 3]] for n in range(9)])
    listing = list_data(tmp_path)
    assert classes(listing) == {cell.removesuffix(".0"): 3 for cell in cells[:2]}
    assert sum(reject.reason == "no label" for reject in listing.rejects) == 3


def test_two_columns_of_yes_and_no_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, *images("shots", 8))
    table(tmp_path / "l.csv", ["image", "is_defect", "is_checked"], *[[f"{n}.jpg", n % 2 > 0, n > 3] for n in range(8)])
    with pytest.raises(UsageError, match=r"--multi-label.* or choose one column with --label-column"):
        list_data(tmp_path)
    assert classes(list_data(tmp_path, rules=Rules(label_column="is_defect"))) == {"False": 4, "True": 4}


def test_a_table_that_names_no_image_is_mentioned(tmp_path: Path) -> None:
    """RSNA's hemorrhages: a row for each image and kind."""
    touch(tmp_path, *images("stage_2_train", 3, ".dcm", prefix="ID_"))
    rows = [[f"ID_{n}_{kind}", n % 2] for n in range(3) for kind in ("epidural", "any")]
    table(tmp_path / "stage_2_train.csv", ["ID", "Label"], *rows)
    assert "stage_2_train.csv: 0 of the 6 files that it names are here." in list_data(tmp_path).notes[-1]


def test_classes_that_may_be_meant_as_one(tmp_path: Path) -> None:
    for kind in ("Cat", "cat", "dog", "dog ", "🐱"):
        touch(tmp_path, *images(kind, 2))
    listing = list_data(tmp_path)
    assert len(listing.class_names) == 5
    assert [note.split(": ")[1] for note in listing.notes] == ["Cat, cat.", "dog, dog ."]


def test_classes_written_differently_in_another_part_are_one(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *images("train/Cat"),
        *images("train/Dog"),
        *images("train/dog"),
        *images("test/cat"),
        *images("test/DOG"),
    )
    listing = list_data(tmp_path)
    assert classes(listing) == {
        "Cat": 8,
        "DOG": 4,
        "Dog": 4,
        "dog": 4,
    }  # two kinds of dog in train: not clear which is meant
    assert "Class names written differently in different parts, merged: Cat, cat." in listing.notes
    assert listing.class_names == ("Cat", "DOG", "Dog", "dog")


@pytest.mark.parametrize(
    ("labels", "said"), [("a b N/A", "N/A is"), ("a b null ?", "null, ? are"), ("0 1 -1", "-1 is"), ("-1 0 x", "")]
)
def test_words_for_a_missing_label_are_pointed_out(labels: str, said: str, tmp_path: Path) -> None:
    touch(tmp_path, *images(".", 12))
    words = labels.split()
    table(tmp_path / "l.csv", ["image", "label"], *[[f"{n}.jpg", words[n % len(words)]] for n in range(12)])
    notes = [note for note in list_data(tmp_path).notes if "the label is missing" in note]
    assert [note.split(" read")[0] for note in notes] == [said] * bool(said)


def test_nan_is_said_to_be_a_class(tmp_path: Path) -> None:
    touch(tmp_path, *images(".", 6))
    table(tmp_path / "l.csv", ["image", "label"], *[[f"{n}.jpg", ["a", "b", "nan"][n % 3]] for n in range(6)])
    assert "nan is read as a class. If it means that the label is missing" in list_data(tmp_path).notes[-1]
    (tmp_path / "l.csv").rename(tmp_path / "old")
    write(
        tmp_path / "l.json", json.dumps([{"image": f"{n}.jpg", "label": ["a", "b", math.nan][n % 3]} for n in range(6)])
    )
    assert classes(list_data(tmp_path / "l.json")) == {"a": 2, "b": 2}


def test_home_folders_and_file_urls(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path, *images("pets/cat"), *images("pets/dog"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/pets", f"{tmp_path}/pets/", f"file://{tmp_path}/pets"):
        listing = list_data(path)
        assert classes(listing) == {"cat": 4, "dog": 4}
        assert read_image(listing.root, listing.entries[0].path) == b"pets/cat/0.jpg"


@pytest.mark.parametrize("name", ["photos.rar", "photos.7z"])
def test_other_archives_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"Rar!\x1a\7\0")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UsageError, match="unpack it"):
            list_data(path)


def test_a_spreadsheet_is_no_archive_of_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "labels.xlsx", "w") as file:
        file.writestr("xl/workbook.xml", "x")
    with pytest.raises(UsageError, match="save it as CSV"):
        list_data(tmp_path / "labels.xlsx")


def test_a_column_of_patients_is_pointed_out(tmp_path: Path) -> None:
    touch(tmp_path, *images(".", 6))
    rows = [[f"{n}.jpg", "ab"[n % 2], f"p{n // 2}"] for n in range(6)]
    table(tmp_path / "l.csv", ["path", "label", "Patient ID"], *rows)
    assert "--group-by 'Patient ID'" in list_data(tmp_path / "l.csv").notes[-1]
    assert len(list_data(tmp_path / "l.csv", rules=Rules(group_by="Patient ID")).notes) == 1
    table(tmp_path / "l.csv", ["path", "label", "patient_id"], *[[*row[:2], n] for n, row in enumerate(rows)])
    assert len(list_data(tmp_path / "l.csv").notes) == 1, "every patient once: nothing to keep together"


def test_a_class_called_like_two_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, *images(".", 4))
    table(tmp_path / "l.csv", ["path", "a|b", "c"], *[[f"{n}.jpg", n % 2, 1] for n in range(4)])
    with pytest.raises(UsageError, match=r"label a\|b: .*rename"):
        list_data(tmp_path / "l.csv", rules=Rules(multi_label=True))


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    """Ultrasound images of breasts (BUSI), each with its masks."""
    for name in ("benign", "malignant"):
        touch(tmp_path, *[f"{name}/{name} ({n}){end}.png" for n in range(4) for end in ("", "_mask", "_mask_1")])
    touch(tmp_path, "benign/with_mask.png", "benign/_mask.png")
    listing = list_data(tmp_path)
    assert classes(listing) == {"benign": 6, "malignant": 4}
    assert sum(reject.reason == "a mask or annotation of another image" for reject in listing.rejects) == 16
    assert any("Ignored as masks" in note and "benign (0)_mask.png" in note for note in listing.notes)


@pytest.mark.parametrize("form", ["{}/images/{}.png {}/masks/{}.png", "Images/{}/{}.png Masks/{}/{}.png"])
def test_folders_of_masks_beside_those_of_images(form: str, tmp_path: Path) -> None:
    """X-rays of COVID-19 and their masks of the lungs; and the same with the masks apart."""
    for name in ("COVID", "Normal"):
        touch(tmp_path, *[form.format(name, n, name, n).split()[k] for n in range(4) for k in (0, 1)])
    listing = list_data(tmp_path)
    assert classes(listing) == {"COVID": 4, "Normal": 4}
    assert not any("ask" in entry.path for entry in listing.entries)


def test_a_folder_that_repeats_the_classes_is_asked_about(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        touch(tmp_path, *images(name), *images(f"augmented/{name}", ending="_flipped.jpg"))
    with pytest.raises(
        UsageError, match=r"can be read in two ways.*\n.*\n- The classes are the innermost folders, cat, dog: "
    ):
        list_data(tmp_path)


def test_folds_with_parts_of_their_own_are_no_classes(tmp_path: Path) -> None:
    for fold, part, name in itertools.product(("fold1", "fold2"), ("train", "val"), ("cat", "dog")):
        touch(tmp_path, *images(f"folds/{fold}/{part}/{name}", 2))
    with pytest.raises(
        UsageError, match="fold1, fold2 each hold train, val folders with the same class folders"
    ) as raised:
        list_data(tmp_path)
    one, every = (shlex.split(line.split(": ", 1)[1]) for line in str(raised.value).splitlines()[1:])
    assert Counter(entry.part for entry in list_data(one[2]).entries) == {"train": 4, "valid": 4}
    listing = list_data(every[2], rules=Rules(label_regex=every[4], domain_by=every[6]))
    assert classes(listing) == {"cat": 8, "dog": 8}
    assert {entry.domain for entry in listing.entries} == {"fold1", "fold2"}


@pytest.mark.parametrize(
    ("folder", "cell"), [("P{}", "P{}"), ("scans/{:05d}/t1", "{}"), ("1.2.84.{}", "1.2.84.{}"), ("{}", "{}.0")]
)
@pytest.mark.parametrize("is_given", [True, False])
def test_a_table_of_folders_labels_the_images_in_them(folder: str, cell: str, is_given: bool, tmp_path: Path) -> None:
    """A folder of images for each patient, and a table with the diagnosis of each."""
    for patient in range(1, 7):
        touch(tmp_path, *images(folder.format(patient), 3, ".png"))
    rows = [[cell.format(n), 40 + n, ["benign", "malignant"][n % 2]] for n in range(1, 6)]
    table(tmp_path / "clinical.csv", ["patient_id", "age", "diagnosis"], *rows, [cell.format(99), 30, "benign"])
    listing = list_data(tmp_path / "clinical.csv" if is_given else tmp_path)
    found = {entry.path: entry for entry in listing.entries if entry.path.endswith(".png")}
    assert Counter(entry.label for entry in found.values()) == {"benign": 6, "malignant": 9}
    assert Counter(entry.group for entry in found.values()) == {cell.format(n): 3 for n in range(1, 6)}
    assert any(
        "patient_id (folders; 15 images in them; those of one folder stay in one part)" in note
        for note in listing.notes
    )


def test_a_table_about_the_classes_leaves_the_class_folders_alone(tmp_path: Path) -> None:
    touch(tmp_path, *images("cat"), *images("dog"), *images("car"))
    table(tmp_path / "classes.csv", ["class", "kind"], ["cat", "animal"], ["dog", "animal"], ["car", "thing"])
    assert classes(list_data(tmp_path)) == {"car": 4, "cat": 4, "dog": 4}


def test_a_table_of_the_training_images_is_not_overruled_by_their_folders(tmp_path: Path) -> None:
    """Images in folders a, b, ..., and a test folder without labels."""
    touch(tmp_path, *images("train/a", 4), *images("train/b", 4, start=4), *images("test", 6, start=100))
    table(tmp_path / "train.csv", ["id", "label"], *[[n, ["cat", "dog"][n % 2]] for n in range(8)])
    with pytest.raises(UsageError, match="two sets of labels that disagree"):
        list_data(tmp_path)


def test_images_by_class_without_their_ending(tmp_path: Path) -> None:
    touch(tmp_path, *images("images", 8, prefix="im"))
    by_class = {name: [f"im{n}" for n in range(start, start + 4)] for name, start in (("cat", 0), ("dog", 4))}
    (tmp_path / "labels.json").write_text(json.dumps(by_class))
    assert classes(list_data(tmp_path)) == {"cat": 4, "dog": 4}


@pytest.mark.parametrize("name", ["labels.csv", "split_zhou.json"])
def test_the_parts_of_a_table_beside_class_folders_are_used(name: str, tmp_path: Path) -> None:
    touch(tmp_path, *images("images/cat", 6), *images("images/dog", 6))
    rows = [[f"{label}/{n}.jpg", label, "test" if n > 3 else "train"] for label in ("cat", "dog") for n in range(6)]
    if name == "labels.csv":
        table(tmp_path / name, ["path", "label", "split"], *rows)
    else:
        lists = {
            part: [[path, int(label == "dog"), label] for path, label, own in rows if own == part]
            for part in ("train", "test")
        }
        write(tmp_path / name, json.dumps(lists))
    listing = list_data(tmp_path)
    assert classes(listing) == {"cat": 6, "dog": 6}
    assert Counter(entry.part for entry in listing.entries) == {"train": 8, "test": 4}


def test_patients_in_a_table_beside_class_folders_are_pointed_out(tmp_path: Path) -> None:
    touch(tmp_path, *images("cat", 6, prefix="c"), *images("dog", 6, prefix="d"))
    rows = [[f"{name[0]}{n}.jpg", name, n // 2] for name in ("cat", "dog") for n in range(6)]
    table(tmp_path / "labels.csv", ["image", "label", "patient"], *rows)
    assert "--group-by patient" in list_data(tmp_path).notes[-1]
    groups = Counter(entry.group for entry in list_data(tmp_path, rules=Rules(group_by="patient")).entries)
    assert groups == {"0": 4, "1": 4, "2": 4}


def test_lists_of_numbers_keep_the_names_of_the_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, *images("images/cat"), *images("images/dog"))
    for part, rows in (("train", range(3)), ("val", range(3, 4))):
        lines = [f"images/{name}/{n}.jpg {k}\n" for k, name in enumerate(("cat", "dog")) for n in rows]
        write(tmp_path / f"{part}.txt", "".join(lines))
    listing = list_data(tmp_path)
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert parts(listing) == {"train": 6, "valid": 2}


@pytest.mark.parametrize("names", [("train_1", "train_2", "test"), ("train.X1", "train.X2", "test.X")])
def test_a_train_folder_in_pieces(names: tuple[str, ...], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        touch(tmp_path, *images(f"{name}/cat", start=10 * number), *images(f"{name}/dog", start=10 * number))
    assert parts(list_data(tmp_path)) == {"train": 16, "test": 8}


def test_a_test_folder_around_a_folder_that_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, *images("train/cat"), *images("train/dog"), *images("test/unknown", 5))
    listing = list_data(tmp_path)
    assert classes(listing) == {"cat": 4, "dog": 4}
    assert "5 images are not used" in listing.notes[0]


def test_names_of_folders_in_a_table_are_no_groups(tmp_path: Path) -> None:
    """Each label has one folder: a split by folder would lose classes."""
    touch(tmp_path, *images("a/n01", prefix="x"), *images("b/n02", prefix="y"))
    write(tmp_path / "labels.json", json.dumps({"n01": "tench", "n02": "goldfish"}))
    listing = list_data(tmp_path)
    assert classes(listing) == {"goldfish": 4, "tench": 4}
    assert {entry.group for entry in listing.entries} == {None}


def test_folders_of_patients_are_no_classes_beside_a_table(tmp_path: Path) -> None:
    names = [f"train/patient{n:05}/study1/view1.jpg" for n in range(6)]
    touch(tmp_path, *names)
    rows = [[f"CheXpert-v1.0/{name}", "1.0" if n % 2 else "", "" if n % 2 else "1.0"] for n, name in enumerate(names)]
    table(tmp_path / "train.csv", ["Path", "No Finding", "Edema"], *rows)
    assert classes(list_data(tmp_path)) == {"Edema": 3, "No Finding": 3}


def test_tables_of_genus_and_species_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, *images("images", 8))
    for level, names in (("genus", ("Quercus", "Acer")), ("species", ("Quercus robur", "Acer campestre"))):
        for part, rows in (("train", range(6)), ("test", range(6, 8))):
            table(tmp_path / f"{level}_{part}.csv", ["image", "label"], *[[f"{n}.jpg", names[n % 2]] for n in rows])
    with pytest.raises(UsageError, match="several tables have labels; choose one"):
        list_data(tmp_path)


def test_the_innermost_folders_are_named_as_the_command_reads_them(tmp_path: Path) -> None:
    for kind, tumor in (("benign", "adenosis"), ("benign", "tubular"), ("malignant", "ductal")):
        touch(tmp_path, *images(f"{kind}/{tumor}/p1/40X"), *images(f"{kind}/{tumor}/p1/100X"))
    with pytest.raises(UsageError, match=r"innermost folders, 40X, 100X: .*label-regex"):
        list_data(tmp_path)


@pytest.mark.parametrize("name", ["MNIST/raw/train-images-idx3-ubyte", "cifar-10-batches-bin/data_batch_1.bin"])
def test_files_of_samples_are_no_class(name: str, tmp_path: Path) -> None:
    touch(tmp_path, name, f"{name.split('/')[0]}/batches.meta.txt")
    with pytest.raises(UsageError, match=r"save (the arrays|them) as \.npz"):
        list_data(tmp_path)


def test_a_small_test_folder_beside_the_data(tmp_path: Path) -> None:
    """New Plant Diseases: everything but the test images is two folders below."""
    for part, n in (("train", 8), ("valid", 4)):
        for name in ("healthy", "scab"):
            touch(tmp_path, *images(f"Plants(Augmented)/Plants(Augmented)/{part}/{name}", n, ending=".JPG"))
    touch(tmp_path, *images("test/test", 3))
    listing = list_data(tmp_path)
    assert classes(listing) == {"healthy": 12, "scab": 12}
    assert parts(listing) == {"train": 16, "valid": 8}
    assert not [reject for reject in listing.rejects if not reject.expected]


def test_names_by_part_in_json_divide_the_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, *images("images/cat", 6), *images("images/dog", 6))
    names = {part: [f"{c}/{n}.jpg" for c in ("cat", "dog") for n in own] for part, own in PARTS_OF_SIX.items()}
    write(tmp_path / "splits.json", json.dumps(names))
    listing = list_data(tmp_path)
    assert classes(listing) == {"cat": 6, "dog": 6}
    assert parts(listing) == {"train": 8, "test": 4}


PARTS_OF_SIX = {"train": range(4), "test": range(4, 6)}


def test_notes_of_google_takeout_are_no_tables(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        touch(tmp_path, *images(f"Takeout/Google Photos/{name}"))
        for number in range(4):
            own = tmp_path / f"Takeout/Google Photos/{name}/{number}.jpg.json"
            write(own, json.dumps({"title": f"{number}.jpg", "people": []}))
    assert set(classes(list_data(tmp_path))) == {"cat", "dog"}


def aircraft(root: Path) -> str:
    """Lists of boxes, families and variants; the variants are what people want, but nothing says so."""
    names = [f"{n:07}" for n in range(12)]
    touch(root, *[f"data/images/{name}.jpg" for name in names])
    write(root / "data/images_box.txt", "".join(f"{name} 3 4 900 600\n" for name in names))
    for part, own in (("train", names[:4]), ("val", names[4:8]), ("test", names[8:])):
        write(root / f"data/images_{part}.txt", "\n".join(own))
    for level, kinds in (("family", ("A300", "Boeing 717")), ("variant", ("A300B4", "717-200"))):
        for part, own in (("train", names[:4]), ("val", names[4:8]), ("trainval", names[:8]), ("test", names[8:])):
            rows = "".join(f"{name} {kinds[n % 2]}\n" for n, name in enumerate(own))
            write(root / f"data/images_{level}_{part}.txt", rows)
    return r"several tables have labels; choose one:\n(- .*family.*\n){3}(- .*variant_\w+.txt\n?){3}$"


def scenes(root: Path) -> str:
    """SUN397: some classes have two levels."""
    for kind in ("a/abbey", "c/church/indoor", "c/church/outdoor", "m/mosque/indoor", "o/oast_house"):
        touch(root, *images(f"SUN397/{kind}"))
    return r"abbey, church/indoor, church/outdoor, mosque/indoor and 1 more: .*'\^\[\^/\]\+/\[\^/\]\+/\(\.\+\)/\[\^/\]\+\$'"


def magnifications(root: Path) -> str:
    """BreakHis: a table of folds, in which only the magnification could be a label."""
    kinds = ("benign/adenosis", "malignant/ductal")
    names = [name for kind in kinds for size in ("40X", "100X") for name in images(f"{kind}/p1/{size}")]
    touch(root, *names)
    table(root / "Folds.csv", ["grp", "mag", "filename"], *[["train", name.split("/")[3], name] for name in names])
    return r"The classes are benign, malignant: (.*\n)+- The labels of the table: .*Folds\.csv"


def patches(root: Path) -> str:
    touch(root, *images("patches/patient_004_node_1", prefix="x_"), *images("patches/patient_010_node_2", prefix="x_"))
    table(root / "metadata.csv", ["patient", "node", "tumor"], [4, 1, 0], [10, 2, 1])
    return r"pieces or groups, not classes.*--label-regex '\(\[\^/\]\+\)/\[\^/\]\+\$'\nTables here: metadata\.csv: no column path"


def objects(root: Path) -> str:
    """PASCAL VOC with its segmentations."""
    touch(root, *images("VOC2012/JPEGImages", 8), *images("VOC2012/SegmentationClass", 2, ".png"))
    touch(root, *images("VOC2012/SegmentationObject", 2, ".png"), *images("VOC2012/Annotations", 8, ".xml"))
    return "no images in class folders here"


def rendered(root: Path) -> str:
    """CLEVR: the words in the names are parts."""
    touch(root, *[name for part in ("train", "val") for name in images(f"images/{part}", prefix=f"CLEVR_{part}_")])
    return "no images in class folders here"


def clothes(root: Path) -> str:
    """Fashion products, once more in another folder: no folder is a class, and the table asks for its column."""
    for name in ("myntradataset/images", "images"):
        for number in range(8):
            write(root / f"{name}/{number}.jpg", str(number))
    rows = [[n, ("Men", "Women")[n % 2], ("Shirts", "Watches", "Heels")[n % 3]] for n in range(8)]
    table(root / "styles.csv", ["id", "gender", "articleType"], *rows)
    return "several columns could be the label: gender, articleType"


def saved_below(root: Path) -> str:
    touch(root, "d/train/data-00000-of-00001.arrow", "d/train/state.json")
    write(root / "d/dataset_dict.json", '{"splits": ["train", "test"]}')
    return r"d/dataset_dict\.json: written by save_to_disk; give the path of its folder"


def arrays_in_a_folder(root: Path) -> str:
    touch(root, "pathmnist.npz")
    return r"pathmnist\.npz: arrays; give the path of this file"


def grades(root: Path) -> str:
    """IDRiD: two grades for each image; among the few test images one of them has too many values to be a label."""
    base = "B. Disease Grading"
    for part, own, n in (("a. Training", "a. IDRiD_Training", 12), ("b. Testing", "b. IDRiD_Testing", 6)):
        touch(root, *images(f"{base}/1. Original Images/{part} Set", n, prefix=f"{own[3:]}_"))
        rows = [[f"{own[3:]}_{k}", k % 4, k % 2] for k in range(n)]
        table(root / f"{base}/2. Groundtruths/{own} Labels.csv", ["Image name", "Retinopathy grade", "Risk"], *rows)
    return "several columns could be the label: Retinopathy grade, Risk"


def sizes(root: Path) -> str:
    """The flowers of Kaggle's TPU course: every size is a dataset with a test part without labels."""
    for size in ("jpeg-192x192", "jpeg-224x224"):
        for kind in ("daisy", "rose"):
            touch(root, *images(f"{size}/train/{kind}"), *images(f"{size}/val/{kind}", 2))
        touch(root, *images(f"{size}/test"), f"tfrecords-{size}/train/00.tfrec")
    return (
        r"each hold .* folders with the same class folders; choose one:\n- One of them: topwork fit \S+jpeg-192x192\n"
    )


def histology(root: Path) -> str:
    """The classes of each patient: images of one patient have to stay in one part."""
    for patient in range(8863, 8870):
        touch(root, *images(f"IDC/{patient}/0", prefix=str(patient)), *images(f"IDC/{patient}/1", prefix=str(patient)))
    return r"innermost folders, 0, 1: .* --group-by '\^\[\^/\]\+/\(\[\^/\]\+\)/'"


def organs(root: Path) -> str:
    """HyperKvasir: the folders can be read in two ways, and so can the table."""
    rows = []
    for place, kind in (("lower/landmarks", "cecum"), ("lower/findings", "polyps"), ("upper/landmarks", "pylorus")):
        names = images(f"labeled-images/{place}/{kind}", prefix=kind)
        touch(root, *names)
        rows += [[Path(name).stem, *place.split("/"), kind] for name in names]
    table(root / "labeled-images/image-labels.csv", ["Image", "Organ", "Classification", "Finding"], *rows)
    return (
        r"two ways; choose one(.*\n)+Tables here: .*several columns could be the label: Organ, Classification, Finding"
    )


def meals(root: Path) -> str:
    """Food-11: the class is the first number in the name."""
    touch(root, *[f"{part}/{n % 3}_{n}.jpg" for part in ("training", "validation") for n in range(12)])
    return r"--label-regex '\^\(\\d\+\)_\\d\+\\\.\\w\+\$'"


def castings(root: Path) -> str:
    """Two datasets, each in a folder of its own name."""
    for kind in ("def_front", "ok_front"):
        touch(root, *images(f"casting_512x512/casting_512x512/{kind}"))
        for part in ("train", "test"):
            touch(root, *images(f"casting_data/casting_data/{part}/{kind}"))
    return r"innermost folders, def_front, ok_front: (.*\n)- Only casting_512x512/casting_512x512/: .*\n- Only casting_data/"


def paintings(root: Path) -> str:
    """The same, but the images of one have no class folders."""
    for name in ("Degas", "Sisley"):
        touch(root, *images(f"images/images/{name}"), *images("resized/resized", prefix=name))
    return r"two ways; choose one(.*\n)+- Only images/images/: "


ASKED = [
    castings,
    paintings,
    skin_and_segmentations,
    grades,
    histology,
    sizes,
    organs,
    meals,
    aircraft,
    scenes,
    magnifications,
    patches,
    objects,
    rendered,
    clothes,
    saved_below,
    arrays_in_a_folder,
]


@pytest.mark.parametrize("build", ASKED)
def test_well_known_data_that_are_asked_about_or_refused(build: Callable[[Path], str], tmp_path: Path) -> None:
    message = build(tmp_path)
    with pytest.raises(UsageError, match=message):
        list_data(tmp_path)


def test_a_table_that_needs_multi_label_is_named_beside_the_one_that_is_read(tmp_path: Path) -> None:
    """CelebA's identities and attributes."""
    touch(tmp_path, *images("img_align_celeba", 6))
    write(tmp_path / "identity_CelebA.txt", "".join(f"{n}.jpg {100 + n % 2}\n" for n in range(6)))
    table(tmp_path / "list_attr.csv", ["image_id", "Bald", "Male"], *[[f"{n}.jpg", 1, n % 2] for n in range(6)])
    assert any("list_attr.csv" in note and "--multi-label" in note for note in list_data(tmp_path).notes)


def test_folders_of_the_same_names_but_other_images_are_no_copies(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        touch(tmp_path, *images(name), *images(f"augmented/{name}"))
    with pytest.raises(UsageError, match="can be read in two ways"):
        list_data(tmp_path)


def test_tables_of_boxes_keep_their_parts(tmp_path: Path) -> None:
    """A second box of another class contradicts its own table, not the other one."""
    for part, start in (("train", 0), ("valid", 6)):
        touch(tmp_path, *images(part, 6, start=start))
        rows = [[f"{start + n}.jpg", kind, 1, 2, 3, 4] for n in range(6) for kind in ("cat", "dog")[n % 2 :]]
        table(tmp_path / part / "_annotations.csv", ["filename", "class", "xmin", "ymin", "xmax", "ymax"], *rows)
    assert parts(list_data(tmp_path)) == {"train": 6, "valid": 6}


def test_tables_further_up_than_the_images_are_found(tmp_path: Path) -> None:
    grades(tmp_path)
    listing = list_data(tmp_path, rules=Rules(label_column="Retinopathy grade"))
    assert classes(listing) == {"0": 5, "1": 5, "2": 4, "3": 4}
    assert parts(listing) == {"train": 12, "test": 6}


def test_one_folder_of_images_with_the_label_in_their_names_is_pointed_out(tmp_path: Path) -> None:
    touch(tmp_path, *[f"dataset2/{kind}{n}.jpg" for kind in ("cloudy", "rain") for n in range(6)])
    assert any("--label-regex '^(.*?" in note for note in list_data(tmp_path).notes)


@pytest.mark.parametrize("place", ["{}", "lungs/{}", "lungs/lungs/{}"])
@pytest.mark.parametrize("name", ["test", "Test cases", "predict"])
def test_a_folder_of_test_images_beside_class_folders_is_no_class(place: str, name: str, tmp_path: Path) -> None:
    """IQ-OTH/NCCD keeps its test cases next to the classes, or next to the folder around them."""
    touch(tmp_path, *images(place.format("benign"), 6), *images(place.format("malignant"), 6))
    touch(tmp_path, *images(place.rpartition("/")[0].rpartition("/")[0] + f"/{name}" if "/" in place else name, 3))
    assert classes(list_data(tmp_path)) == {"benign": 6, "malignant": 6}


def test_a_single_list_of_a_part_gives_no_parts(tmp_path: Path) -> None:
    aircraft(tmp_path)
    listing = list_data(tmp_path / "data/images_variant_train.txt")
    assert classes(listing) == {"A300B4": 2, "717-200": 2}
    assert not any("parts from" in note for note in listing.notes)
