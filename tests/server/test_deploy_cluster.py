"""The examples for clusters are valid YAML, and the real command line takes the commands in them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from topwork.cli import app, plain_tokens

DEPLOY = Path(__file__).parents[2] / "deploy"
IMAGE = "registry.example.com/topwork-cluster"


def read(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def commands() -> list[list[str]]:
    """Every topwork command in the files, and those that torchrun starts in the docs, as words."""
    found = [shlex.split(read("ray-job.yaml")["spec"]["entrypoint"])]
    found += [
        service["command"]
        for service in read("compose-s3.yaml")["services"].values()
        if "topwork" in service.get("command", ())
    ]
    found += [
        shlex.split(text)
        for text in re.findall(r"(topwork fit .*)'$", (DEPLOY / "ray-cluster.yaml").read_text(), re.MULTILINE)
    ]
    docs = DEPLOY.parent / "docs" / "how-to" / "cluster.md"
    found += [
        shlex.split(text) for text in re.findall(r"-m (topwork\.cli fit [^`\n.]*)$", docs.read_text(), re.MULTILINE)
    ]
    return found


def test_the_command_line_takes_every_command():
    assert len(commands()) == 5
    for words in commands():
        app.parse_args(plain_tokens(words[1:]), exit_on_error=False, print_error=False)


def test_the_job_has_what_kuberay_asks_for():
    job = read("ray-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == IMAGE
        assert container["resources"]["limits"]["memory"]
    for group in groups[1:]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_cluster_is_one_that_rays_launcher_takes():
    launcher = pytest.importorskip("ray.autoscaler._private.util")
    config = read("ray-cluster.yaml")
    pytest.importorskip("jsonschema")
    launcher.validate_config(launcher.prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]


def test_the_same_ray_everywhere():
    version = read("ray-job.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"rayproject/ray:{version}-" in (DEPLOY / "Dockerfile.cluster").read_text()
    try:
        assert importlib.metadata.version("ray").split(".")[0] == version.split(".")[0]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Ray is not installed")


def test_services_wait_for_each_other_and_use_one_store():
    services = read("compose-s3.yaml")["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        assert name == "store" or service["environment"]["AWS_ENDPOINT_URL"] == "http://store:5000"
    assert "moto" in json.dumps(services["store"])
