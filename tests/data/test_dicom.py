"""DICOM: what a viewer shows, who is on it, and what cannot be read."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from topwork.data.dicom import NO_DICOM
from topwork.data.images import decode
from topwork.data.manifest import scan
from topwork.data.samples import Rules
from topwork.errors import ImageError, UsageError

pydicom = pytest.importorskip("pydicom")


def dicom(pixels: np.ndarray, kind: str = "MONOCHROME2", patient: str = "", **tags: object) -> bytes:
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds = pydicom.Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientID = patient
    frames = pixels if pixels.ndim == 4 else pixels[None]
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if kind == "RGB" else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if kind == "RGB" else 1, kind
    if kind == "RGB":
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    if len(frames) > 1:
        ds.NumberOfFrames = len(frames)
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = frames.tobytes()
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


VALUES = np.array([[-1000, -160, 40], [139, 240, 3000]], np.int16)


def test_a_window_is_applied_as_the_standard_says() -> None:
    """Center 40, width 400: black up to -160.5, white from 238.5 on (PS3.3 C.11.2.1.2.1)."""
    found = decode(
        dicom(VALUES + 1024, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 600], WindowWidth=[400, 9])
    )
    expected = [0, 255 * (0.5 / 399), 255 * (0.5 / 399 + 0.5), 255 * (99.5 / 399 + 0.5), 255, 255]
    assert np.abs(found.pixels[..., 0].ravel() - expected).max() <= 0.51
    assert (found.pixels == found.pixels[..., :1]).all()
    assert (found.facts.format, found.facts.mode, found.facts.is_gray) == ("DICOM", "I;16", True)


def test_without_a_window_the_range_of_the_values_is_shown_and_monochrome1_is_inverted() -> None:
    values = np.array([[100, 200, 300]], np.uint16)
    assert decode(dicom(values)).pixels[0, :, 0].tolist() == [0, 128, 255]
    assert decode(dicom(values, "MONOCHROME1")).pixels[0, :, 0].tolist() == [255, 128, 0]


def test_a_lookup_table() -> None:
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4, 0, 8])
    table.add_new("LUTData", "US", [0, 10, 20, 255])
    data = dicom(np.array([[0, 1, 2, 3, 9]], np.uint8), VOILUTSequence=[table])
    assert decode(data).pixels[0, :, 0].tolist() == [0, 10, 20, 255, 255]


def test_colors_and_the_first_frame() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    found = decode(dicom(frames, "RGB"))
    assert np.array_equal(found.pixels, frames[0])
    assert found.facts.is_animated


def test_images_of_one_patient_are_one_group_and_no_name_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        folder = tmp_path / "data" / ("ill" if number % 2 else "well")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 4096, (40, 40)).astype(np.uint16)
        (folder / f"{number}.dcm").write_bytes(dicom(pixels, patient=f"Jane Doe {number // 2}"))
    groups = [
        (sample.path, sample.group) for sample in scan(tmp_path / "data", rules=Rules(group_by="PatientID")).samples
    ]
    by_number = {path.split("/")[1]: group for path, group in groups}
    assert by_number["0.dcm"] == by_number["1.dcm"] != by_number["2.dcm"]
    assert len(set(by_number.values())) == 4
    assert not any("Doe" in str(group) for _, group in groups)
    assert all(sample.group is None for sample in scan(tmp_path / "data").samples)


def test_what_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(np.zeros((10, 10), np.uint8))
    with pytest.raises(ImageError, match="too large"):
        decode(dicom(np.zeros((1, 1), np.uint8), Rows=60_000, Columns=60_000))
    with pytest.raises(ImageError, match="deflated"):
        decode(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"))
    for cut in (140, 300, len(data) - 20):
        with pytest.raises(ImageError):
            decode(data[:cut])
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value) == NO_DICOM


def test_group_by_patient_needs_patients(tmp_path: Path) -> None:
    from drawing import draw_folders

    with pytest.raises(UsageError, match="--group-by PatientID: none of the images is a DICOM file with a PatientID"):
        scan(draw_folders(tmp_path, n_each=2), rules=Rules(group_by="PatientID"))
