"""Batch-norm statistics of a network taken again, over images of more than one domain.

Li et al. 2016 (AdaBN), arXiv 1603.04779, put the target's statistics in place of the source's. One model has to answer for
both here, so each batch is half of either: means and variances are those of the joint domain.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from topwork.errors import UsageError
from topwork.models.backbone import Backbone, adopt_weights
from topwork.training.batches import ImageDataset, InputNetwork

MAX_IMAGES = 1024  # of each domain; statistics over more positions are the same
BATCH = 32


def with_statistics_of(backbone: Backbone, domains: list[ImageDataset], seed: int = 0) -> Backbone:
    """The backbone with the running statistics of every batch norm taken over these images, each domain alike.

    Raises:
        UsageError: the network has no batch norm.
    """
    network = backbone.module()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UsageError(f"{backbone.name}: has no batch norms, so there are no statistics to take again.")
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    seen = InputNetwork(network, domains[0].spec)
    per_domain = max(1, BATCH // len(domains))
    n_batches = max(1, min(MAX_IMAGES, max(len(stream.labels) for stream in domains)) // per_domain)
    rng = np.random.default_rng([seed, 23])
    with torch.no_grad():
        for _ in range(n_batches):
            parts = [
                s.load(rng.choice(len(s.labels), min(per_domain, len(s.labels)), replace=False), None) for s in domains
            ]
            seen(torch.from_numpy(np.concatenate(parts)))
    name = f"{backbone.name} (statistics of {len(domains)} domains)"
    return adopt_weights(backbone, network.eval(), name=name)
