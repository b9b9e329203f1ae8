"""Kubernetes manifests against jaxserve itself: flags, ports, times, users, labels, metrics."""

import math
import re

import httpx2
import pytest
import yaml

from jaxserve.cli import serve_configs
from jaxserve.config import EngineConfig
from jaxserve.engine.ipc import EXIT_GRACE_S
from jaxserve.server import build_app
from jaxserve.server.auth import OPEN_PATHS
from jaxserve.server.http import CLOSE_GRACE_S
from tests.deployment.manifests import (
    DOCKER,
    KUBERNETES,
    documents,
    documents_of,
    environment_of,
    instructions_of,
    workloads as all_workloads,
)
from tests.server.serving import EchoServer

WORKLOADS = tuple(all_workloads())
SERVING = tuple(workload for workload in WORKLOADS if workload.role != "worker")
PROBES = {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}


def named(workloads):
    """Returns a parametrization by file and role."""
    ids = [f"{workload.file}-{workload.role}" for workload in workloads]
    return pytest.mark.parametrize("workload", workloads, ids=ids)


def configs_of(workload, monkeypatch):
    """Returns what the container's arguments mean to the real command line."""
    monkeypatch.delenv("JAXSERVE_API_KEY", raising=False)
    command, *arguments = workload.container["args"]
    assert command == "serve" and "command" not in workload.container
    return serve_configs(arguments)


def seconds_to_end(workload, server) -> float:
    """Returns how long a pod may take from its deletion to its last process's end."""
    sleep_s = workload.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    return sleep_s + server.shutdown_timeout + CLOSE_GRACE_S + 2 * EXIT_GRACE_S


@named(WORKLOADS)
def test_arguments_are_flags_that_serve_takes(workload, monkeypatch):
    engine, server = configs_of(workload, monkeypatch)
    assert engine.model != EngineConfig().model
    assert server.host == "0.0.0.0"  # probes come from outside the pod


@named(SERVING)
def test_ports_agree(workload, monkeypatch):
    _, server = configs_of(workload, monkeypatch)
    assert workload.container["ports"] == [{"name": "http", "containerPort": server.port}]
    (service,) = (each for each in workload.documents if each["kind"] == "Service")
    assert service["spec"]["ports"] == [{"name": "http", "port": 8000, "targetPort": "http"}]
    assert service["spec"]["selector"].items() <= workload.labels.items()
    (pool, _) = documents_of(KUBERNETES / "inference-pool.yaml")
    assert pool["spec"]["targetPorts"] == [{"number": server.port}]
    assert pool["spec"]["selector"]["matchLabels"].items() <= workload.labels.items()


@named(SERVING)
def test_probes_ask_paths_that_answer_without_a_key(workload):
    for probe, path in PROBES.items():
        assert workload.container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in OPEN_PATHS


@named(SERVING)
def test_a_pod_has_the_time_to_drain(workload, monkeypatch):
    _, server = configs_of(workload, monkeypatch)
    grace_s = workload.template["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > seconds_to_end(workload, server)


@named([workload for workload in WORKLOADS if workload.role == "worker"])
def test_a_worker_outlives_its_leaders_drain(workload, monkeypatch):
    (leader,) = (each for each in WORKLOADS if (each.file, each.role) == (workload.file, "leader"))
    assert workload.container["args"] == leader.container["args"]
    _, server = configs_of(leader, monkeypatch)
    grace_s = workload.template["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > seconds_to_end(leader, server)
    assert "lifecycle" not in workload.container  # SIGTERM alone does not end it


@named([workload for workload in WORKLOADS if workload.role == "worker"])
def test_a_worker_is_probed_where_it_answers(workload, monkeypatch):
    _, server = configs_of(workload, monkeypatch)
    assert server.health_port == "auto"
    assert workload.container["ports"] == [{"name": "health", "containerPort": server.port}]
    for probe in ("startupProbe", "livenessProbe"):
        assert workload.container[probe]["httpGet"] == {"path": "/health", "port": "health"}


@named(WORKLOADS)
def test_the_mesh_is_what_the_nodes_have(workload, monkeypatch):
    engine, _ = configs_of(workload, monkeypatch)
    requests = workload.container["resources"]["requests"]
    limits = workload.container["resources"]["limits"]
    (resource,) = (name for name in requests if "/" in name)
    assert limits[resource] == requests[resource]
    num_devices = int(requests[resource]) * workload.num_hosts
    assert math.prod(map(int, engine.mesh.split("x"))) == num_devices
    if resource == "google.com/tpu":
        topology = workload.template["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == num_devices


@named(WORKLOADS)
def test_a_pod_may_do_little_and_writes_only_to_its_volumes(workload):
    spec, container = workload.template["spec"], workload.container
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    target = container["image"].rsplit("-", 1)[1]
    instructions = instructions_of(DOCKER / f"Dockerfile.{target}")
    user = spec["securityContext"]
    assert user["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    assert ("USER", f"{user['runAsUser']}:{user['runAsGroup']}") in instructions
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {environment_of(instructions)["HOME"]: "cache", "/tmp": "tmp"}
    claim = documents_of(KUBERNETES / "cache.yaml")[0]["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": claim}
    assert "emptyDir" in volumes["tmp"]


@pytest.mark.parametrize("file", sorted({workload.file for workload in WORKLOADS}))
def test_selectors_find_the_pods(file):
    labels = [workload.labels for workload in WORKLOADS if workload.file == file]
    for document in documents_of(KUBERNETES / file):
        selector = document["spec"].get("selector", {}).get("matchLabels", {})
        for each in labels:
            assert selector.items() <= each.items(), document["kind"]


@pytest.mark.parametrize("file", ["service-monitor.yaml", "pod-monitoring.yaml"])
def test_scrapers_find_the_metrics(file):
    (monitor,) = documents_of(KUBERNETES / file)
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] in {route.path for route in build_app(*serve_configs([])).routes}
    for workload in SERVING:
        assert endpoint["port"] in {port["name"] for port in workload.container["ports"]}
        assert monitor["spec"]["selector"]["matchLabels"].items() <= workload.labels.items()


def test_every_metric_that_a_manifest_names_is_exported():
    text = "\n".join(path.read_text() for path in KUBERNETES.glob("*.yaml"))
    named_metrics = set(re.findall(r"jaxserve:[a-z_]+", text))
    assert len(named_metrics) >= 4
    with EchoServer() as server:
        exported = httpx2.get(f"{server.url}/metrics").text
    for name in named_metrics | {name.replace("jaxserve:", "vllm:") for name in named_metrics}:
        assert f"\n{name}{{" in exported, name
    for label in ("block_size=", "num_gpu_blocks="):  # what a picker reads of the cache
        assert re.search(rf"jaxserve:cache_config_info{{[^}}]*{label}", exported)


def test_the_endpoint_picker_reads_the_engine_that_pods_say_they_run():
    (config_map,) = documents_of(KUBERNETES / "endpoint-picker.yaml")
    config = yaml.safe_load(config_map["data"]["config.yaml"])
    plugins = {plugin["type"]: plugin for plugin in config["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
    for workload in SERVING:
        assert workload.labels["llm-d.ai/engine-type"] == engine["name"]
    for profile in config["schedulingProfiles"]:
        assert {each["pluginRef"] for each in profile["plugins"]} <= set(plugins)


def test_autoscalers_name_what_there_is():
    names = {(document["kind"], document["metadata"]["name"]) for _, document in documents()}
    for file in ("hpa.yaml", "keda.yaml"):
        (scaler,) = documents_of(KUBERNETES / file)
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
