"""The files of deploy/ are what their schemas and programs take, and name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cellserve.service.settings import ENV_PREFIX, Settings

DEPLOY = Path(__file__).parent.parent / "deploy"
SETTINGS = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}


def test_the_compose_files_are_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*command, *map(str, DEPLOY.rglob("compose.yaml"))], check=True)


MANIFESTS = [*sorted((DEPLOY / "kubernetes").glob("*.yaml")), DEPLOY / "one-machine" / "kubernetes.yaml"]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_the_kubernetes_manifests_are_valid(file: Path) -> None:
    documents = list(yaml.safe_load_all(file.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, "1.28", strict=True)


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.yaml")), ids=lambda file: file.name)
def test_the_variables_set_by_the_files_are_settings(file: Path) -> None:
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z_]+", file.read_text())) <= SETTINGS


def test_models_of_ones_own_are_mounted_where_the_image_looks_for_them() -> None:
    (where,) = re.findall(r"CELLSERVE_MODELS=(\S+)", (DEPLOY.parent / "Dockerfile").read_text())
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("replica-1", "replica-2"):
        assert services[name]["volumes"] == [f"${{MODELS:-../artifacts}}:{where}:ro"]
    for file in ("cellserve", "models"):
        for document in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{file}.yaml").read_text()):
            if document["kind"] in ("Deployment", "Pod"):
                spec = document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
                (container,) = spec["containers"]
                mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
                assert mounts["models"]["mountPath"] == where
                assert mounts["models"].get("readOnly", False) is (file == "cellserve")
                claims = {volume["name"]: volume.get("persistentVolumeClaim", {}) for volume in spec["volumes"]}
                assert claims["models"]["claimName"] == "cellserve-models"


def test_on_one_machine_the_sessions_are_in_the_volume_that_the_image_keeps_them_in() -> None:
    entry = (DEPLOY / "entrypoint.sh").read_text()
    (folder,) = re.findall(r"CELLSERVE_STORE=lmdb:(\S+)", entry)
    service = yaml.safe_load((DEPLOY / "one-machine" / "compose.yaml").read_text())["services"]["cellserve"]
    assert f"cells:{folder}" in service["volumes"]
    pod = next(yaml.safe_load_all((DEPLOY / "one-machine" / "kubernetes.yaml").read_text()))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    store = next(one["value"] for one in container["env"] if one["name"] == "CELLSERVE_STORE")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert store.startswith(f"lmdb:{mounts['sessions']}/") and mounts["sessions"] == folder
    user = re.findall(r"^USER (\d+)", (DEPLOY.parent / "Dockerfile").read_text(), re.M)
    assert user == [str(pod["securityContext"]["runAsUser"])] == [str(pod["securityContext"]["fsGroup"])]


def test_prometheus_scrapes_the_replicas_at_their_port_for_operations() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    replicas = {name for name in services if name.startswith("replica")}
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    port = services["replica-1"]["environment"]["CELLSERVE_OPERATIONS_PORT"]
    assert set(job["static_configs"][0]["targets"]) == {f"{name}:{port}" for name in replicas}


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "nginx.conf").read_text().replace("/tmp/nginx", str(tmp_path / "nginx"))
    text = re.sub(r"replica-\d:8000", "127.0.0.1:1", text)
    (tmp_path / "nginx.conf").write_text(text)
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    subprocess.run([program, "-t", "-q", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], check=True)
