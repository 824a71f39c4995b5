"""One contract for every family of networks that people start from: what must hold for each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from topwork.features.engine import MAX_STAGES, OpenVINOEngine, feature_network, feature_stages, load_engine
from topwork.models.backbone import load_backbone

QUICK = (
    "test_vit", "test_vit3", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet",
    "test_coatnet", "test_maxvit", "test_mambaout", "test_vit_relpos",
)  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_the_engine_gives_torchs_features_for_any_number_of_images(name):
    backbone = load_backbone(f"random:{name}")
    side = backbone.spec.height
    images = np.random.default_rng(0).integers(0, 256, (17, side, side, 3), dtype=np.uint8)
    engine = load_engine(backbone, "openvino", "f32")
    assert isinstance(engine, OpenVINOEngine)
    with torch.inference_mode():
        last, stages = (value.numpy() for value in feature_network(backbone)(torch.from_numpy(images)))
    assert last.shape == (17, backbone.n_features)
    assert stages.shape[1] > 0
    assert len(feature_stages(backbone)) <= MAX_STAGES
    for n in (1, 3, 17):
        found = engine.run_unrounded(images[:n])
        for name_of, expected in (("last", last), ("stages", stages)):
            spread = expected.std() if expected.size else 1.0
            np.testing.assert_allclose(found[name_of], expected[:n], rtol=0, atol=2e-3 * spread, err_msg=name_of)
