"""Manifests against schemas: published ones where a package carries them, else our own.

Kubernetes' kinds and every pod template: kubernetes-validate. ScaledObject and ServiceMonitor: the
models that cloudcoil generates from KEDA's and the Prometheus operator's CRDs. The rest:
crd_schemas.py, structure only. The Serve config: Ray's own.
"""

import copy
import subprocess
import sys

import pytest

from tests.deployment.crd_schemas import SCHEMAS
from tests.deployment.manifests import ROOT, documents, workloads

pytestmark = pytest.mark.slow

KUBERNETES_VERSIONS = ("1.34", "1.37")  # the first in which `preStop.sleep` is stable; the newest
GENERATED = ("ScaledObject", "ServiceMonitor")
DOCUMENTS = tuple(documents())
WORKLOADS = tuple(workloads())


def of_kinds(is_wanted):
    """Returns a parametrization over the documents whose kind is wanted."""
    chosen = [(file, each) for file, each in DOCUMENTS if is_wanted(each["kind"])]
    ids = [f"{file}-{each['kind']}" for file, each in chosen]
    return pytest.mark.parametrize("document", [each for _, each in chosen], ids=ids)


def check_kubernetes(document, version):
    """Raises unless the document is what that Kubernetes takes, unknown fields refused."""
    import kubernetes_validate

    kubernetes_validate.validate(document, version, strict=True)


def generated_schema(kind):
    """Returns a CRD's schema, closed: an unknown field would be dropped in silence."""
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    model = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}[kind]
    return close(model.model_json_schema(by_alias=True))


def close(schema):
    """Forbids fields that a schema does not name, at every depth."""
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def check_schema(document, schema):
    """Raises unless the document fits the JSON schema."""
    import jsonschema

    jsonschema.Draft202012Validator(schema).validate(document)


def broken(document):
    """Returns the document with a field that no kind has."""
    other = copy.deepcopy(document)
    other.get("spec", other)["noSuchField"] = 1
    return other


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@of_kinds(lambda kind: kind not in (*SCHEMAS, *GENERATED))
def test_kubernetes_takes_the_document(document, version):
    check_kubernetes(document, version)
    with pytest.raises(Exception, match="noSuchField"):
        check_kubernetes(broken(document), version)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: f"{each.file}-{each.role}")
def test_kubernetes_takes_the_pod_template(workload, version):
    document = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "jaxserve"},
        "template": workload.template,
    }
    check_kubernetes(document, version)
    broken_template = copy.deepcopy(document)
    broken_template["template"]["spec"]["containers"][0]["argz"] = []
    with pytest.raises(Exception, match="argz"):
        check_kubernetes(broken_template, version)


@of_kinds(lambda kind: kind in GENERATED)
def test_the_projects_generated_schema_takes_the_document(document):
    schema = generated_schema(document["kind"])
    check_schema(document, schema)
    with pytest.raises(Exception, match="noSuchField"):
        check_schema(broken(document), schema)


@of_kinds(lambda kind: kind in SCHEMAS)
def test_our_own_schema_takes_the_document(document):
    schema = SCHEMAS[document["kind"]]
    check_schema(document, schema)
    with pytest.raises(Exception, match="noSuchField"):
        check_schema(broken(document), schema)


def test_ray_takes_the_serve_config():
    """In a process of its own: importing Ray warns, which is an error here."""
    code = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema;"
        "from jaxserve.ray_serve import replica_options; from jaxserve.asgi import hosted_configs;"
        "config = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])));"
        "(app,) = config.applications;"
        "options = replica_options(app.args); hosted_configs(options.serve.split());"
        "print(app.import_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "configs" / "ray" / "serve.yaml")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "jaxserve.ray_serve:application\n"), done.stderr
