"""Reads what configs/ holds for deployments: Kubernetes documents and Dockerfiles."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "configs" / "kubernetes"
DOCKER = ROOT / "configs" / "docker"

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One pod template of a manifest, and what surrounds it."""

    file: str
    role: str  # "pod", "leader" or "worker"
    template: Document
    documents: tuple[Document, ...]  # of the same file
    num_hosts: int  # pods that hold one model

    @property
    def container(self) -> Document:
        """Returns the only container."""
        (container,) = self.template["spec"]["containers"]
        return container

    @property
    def labels(self) -> dict[str, str]:
        """Returns what selectors match."""
        return self.template["metadata"]["labels"]


def documents_of(path: Path) -> tuple[Document, ...]:
    """Returns every document of a YAML file."""
    return tuple(yaml.safe_load_all(path.read_text()))


def documents() -> Iterator[tuple[str, Document]]:
    """Returns every document with the file that it is in."""
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in documents_of(path):
            yield path.name, document


def workloads() -> Iterator[Workload]:
    """Returns every pod template that runs jaxserve."""
    for file, document in documents():
        siblings = documents_of(KUBERNETES / file)
        if document["kind"] == "Deployment":
            templates = {"pod": document["spec"]["template"]}
            num_hosts = 1
        elif document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            templates = {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}
            num_hosts = group["size"]
        else:
            continue
        for role, template in templates.items():
            yield Workload(
                file=file,
                role=role,
                template=template,
                documents=siblings,
                num_hosts=num_hosts,
            )


def instructions_of(path: Path) -> list[tuple[str, str]]:
    """Returns a Dockerfile's instructions, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def words_of(text: str) -> list[str]:
    """Returns the words of an exec-form instruction."""
    words = json.loads(text)
    assert isinstance(words, list) and all(isinstance(word, str) for word in words), text
    return words


def environment_of(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """Returns what ENV sets in the last stage."""
    pairs = [pair for name, text in last_stage(instructions) if name == "ENV" for pair in
             shlex.split(text)]  # fmt: skip
    return dict(pair.split("=", 1) for pair in pairs)


def last_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the instructions of the stage that becomes the image."""
    starts = [at for at, (name, _) in enumerate(instructions) if name == "FROM"]
    return instructions[starts[-1] :]
