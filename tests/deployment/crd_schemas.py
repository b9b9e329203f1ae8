"""The shape of custom resources whose schemas no registry package carries.

Written from the projects' API documents: LeaderWorkerSet v1, InferencePool v1, HTTPRoute v1 and
PodMonitoring v1, of each only the fields that the manifests use. Any other field is an error.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 1}
ZERO_OR_MORE: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
LABELS: Schema = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}}


def record(*required: str, **properties: Schema) -> Schema:
    """Returns the schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def rows(item: Schema, most: int = 16) -> Schema:
    """Returns the schema of a list that is not empty."""
    return {"type": "array", "minItems": 1, "maxItems": most, "items": item}


def one_of(*words: str) -> Schema:
    """Returns the schema of a closed set of words."""
    return {"enum": list(words)}


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    """Returns the schema of a whole document."""
    metadata = record("name", name=TEXT, labels=LABELS, annotations=LABELS)
    return record(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


LEADER_WORKER_SET = resource(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    record(
        "leaderWorkerTemplate",
        replicas=ZERO_OR_MORE,
        startupPolicy=one_of("LeaderCreated", "LeaderReady"),
        rolloutStrategy=record(
            "type",
            type=one_of("RollingUpdate"),
            rollingUpdateConfiguration=record(
                maxUnavailable=ZERO_OR_MORE, maxSurge=ZERO_OR_MORE, partition=ZERO_OR_MORE
            ),
        ),
        leaderWorkerTemplate=record(
            "workerTemplate",
            size=COUNT,
            restartPolicy=one_of(
                "Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"
            ),
            # Pod templates, which Kubernetes' own schema judges.
            leaderTemplate={"type": "object"},
            workerTemplate={"type": "object"},
        ),
    ),
)

INFERENCE_POOL = resource(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    record(
        "selector",
        "targetPorts",
        selector=record("matchLabels", matchLabels=LABELS),
        targetPorts=rows(record("number", number=PORT), most=8),
        endpointPickerRef=record(
            "name",
            "port",
            group={"type": "string"},
            kind=one_of("Service"),
            name=TEXT,
            port=record("number", number=PORT),
            failureMode=one_of("FailOpen", "FailClose"),
        ),
    ),
)

HTTP_ROUTE = resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    record(
        "parentRefs",
        "rules",
        parentRefs=rows(record("name", group=TEXT, kind=TEXT, name=TEXT, sectionName=TEXT)),
        rules=rows(
            record(
                matches=rows(record(path=record(type=one_of("Exact", "PathPrefix"), value=TEXT))),
                backendRefs=rows(record("name", group=TEXT, kind=TEXT, name=TEXT, port=PORT)),
                timeouts=record(request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
)

POD_MONITORING = resource(
    "monitoring.googleapis.com/v1",
    "PodMonitoring",
    record(
        "selector",
        "endpoints",
        selector=record(matchLabels=LABELS),
        endpoints=rows(record("port", port=TEXT, path=TEXT, interval=DURATION, timeout=DURATION)),
    ),
)

SCHEMAS = {
    "LeaderWorkerSet": LEADER_WORKER_SET,
    "InferencePool": INFERENCE_POOL,
    "HTTPRoute": HTTP_ROUTE,
    "PodMonitoring": POD_MONITORING,
}
