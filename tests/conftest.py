"""What every test has: no network, a cache of its own, at most two threads for torch, the shared images if present.

Drawn images and small networks are made in the tests that use them, not here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

REPOSITORY = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# How long one example takes depends on what else the machine does: no deadline.
hypothesis.settings.register_profile("fast", deadline=None, derandomize="CI" in os.environ, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test file is imported: the hub and GPUs are cut off, and idle threads sleep rather than spin.

    What is tested is what the CPU computes, to the bit in places; a GPU computes in bf16, and six tolerances are too
    narrow for that (seen on an H200). huggingface_hub reads its variables only once, OpenMP as well. On a shared machine spinning threads take the time of
    those that have work: one training run went from 8.8 to 23.2 images/s without them.
    """
    os.environ.update(OFFLINE)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process that a test starts compiles its imports again
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hypothesis.settings.load_profile("fast" if config.option.markexpr == "not slow" else "thorough")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all tests of a session, in all its processes: the user's own is left alone, and a backbone is prepared once."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "topwork-cache"
        patch.setenv("TOPWORK_CACHE", str(folder))
        yield folder


@pytest.fixture
def own_cache(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test alone, which may damage it: nothing is in it but a prepared ``random:test_efficientnet``."""
    from topwork.features.engine import load_engine
    from topwork.models.backbone import load_backbone

    folder, backbone = tmp_path / "cache", load_backbone("random:test_efficientnet")
    load_engine(backbone)
    shutil.copytree(backbone.folder, folder / "backbones" / backbone.folder.name)
    monkeypatch.setenv("TOPWORK_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def two_torch_threads() -> None:
    """Hold torch, where a test has loaded it, to two threads: the sums come out alike on small and large machines."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        if torch.get_num_threads() > 2:
            torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with ants-bees, caltech-mini and pacs-mini, which lies beside the repository; never written to."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared images are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium with a fake camera, driven by Playwright: one for all tests, as there can be no second one."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium_path = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium_path).exists():
        pytest.skip("there is no Chromium on this machine")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path, args=flags)
        yield chromium
        chromium.close()
