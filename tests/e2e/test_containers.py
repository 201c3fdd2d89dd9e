"""What the relay does in a container, and that the files for containers agree with each other, with the program and the page.
The image is built and run by tests/packages/test_image.py."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from relaymta.cli import main
from relaymta.cli.options import CONFIG_PATH
from relaymta.config import Config, load
from relaymta.config import Relay as RelayTable
from relaymta.supervisor import readiness
from relaymta.supervisor.slots import STOP_SECONDS
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.dockerfile import ROOT, health_check, stages
from tests.support.pages import blocks, section

PAGE = "containers.md"
IMAGE = stages()[-1]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
OBJECTS = {
    one["kind"]: one for one in yaml.safe_load_all((ROOT / "config/kubernetes.yaml").read_text()) if one["kind"] != "Service"
}
SERVICES = [one for one in yaml.safe_load_all((ROOT / "config/kubernetes.yaml").read_text()) if one["kind"] == "Service"]
POD = OBJECTS["StatefulSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and process namespaces need root")


# A spool that ends with its container


@as_root
def test_a_spool_on_an_overlay_is_refused_as_the_page_says(overlay):
    config = overlay.parent / "relaymta.toml"
    config.write_text(
        f'spool = "{overlay}/lib/relaymta"\n[[listener]]\naddress = "127.0.0.1:{free_port()}"\n[metrics]\nlisten = "off"\n'
    )
    (said,) = [block for block in blocks(section(PAGE, "Where the queue is")) if block.startswith("spool: ")]
    said = said.replace("/var/lib/relaymta", f"{overlay}/lib/relaymta")
    for verb in (["serve"], ["config", "check"]):
        done = subprocess.run(
            [sys.executable, "-m", "relaymta", *verb, "-c", config], capture_output=True, text=True, timeout=90, check=False
        )
        assert (done.returncode, done.stderr, done.stdout) == (78, f"{config}:1: {said}", "")
    assert list(overlay.iterdir()) == [], "nothing was made there"


PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def first(relay: Relay) -> int:
    """The process that is the first one in its namespace."""
    assert relay.process is not None
    return int(Path(f"/proc/{relay.process.pid}/task/{relay.process.pid}/children").read_text())


def dead_children(pid: int) -> list[int]:
    stats = (Path(f"/proc/{child}/stat").read_text() for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [int(text.split()[0]) for text in stats if text.rpartition(")")[2].split()[0] == "Z"]


@as_root
def test_as_process_1_it_is_healthy_buries_what_others_leave_and_drains_at_sigterm(overlay, ledger):
    """Its spool is on an overlay: it is started with --ephemeral."""
    key = overlay.parent / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    sign = f'dkim=[{{domain="b.example",selector="s",key="{key}"}}]'
    relay = Relay(overlay.parent, f"127.0.0.1:{ledger.port}", sign, wrap=PROCESS_1)
    relay.spool = overlay / "spool"
    check = [word.replace("9125", str(relay.metrics_port)) for word in health_check(IMAGE)]
    check[0] = sys.executable
    with relay:
        healthy = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
        assert (healthy.returncode, json.loads(healthy.stdout)) == (0, {"ready": True, "reasons": []})
        relay.send("X-Ledger: one\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["one"] == 1)
        supervisor = first(relay)
        (worker,) = map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())
        (signer,) = map(int, Path(f"/proc/{worker}/task/{worker}/children").read_text().split())
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{signer}").exists(), what="the end of its signing process, which nobody had waited for")
        wait_for(lambda: relay.unready() == [] and dead_children(supervisor) == [], what="its successor")
        assert relay.process is not None
        os.kill(supervisor, signal.SIGTERM)
        assert relay.process.wait(90) == 0
        assert relay.events("stopped")[-1]["reason"] == "signal"
        assert subprocess.run(check, capture_output=True, timeout=60, check=False).returncode != 0


@as_root
def test_as_process_1_it_ends_at_sigterm_before_it_has_started(tmp_path):
    """The kernel ends such a process by no signal that it has not asked for."""
    config = tmp_path / "relaymta.toml"
    os.mkfifo(config)
    process = subprocess.Popen([*PROCESS_1, sys.executable, "-m", "relaymta", "serve", "-c", config])
    try:
        descriptor = _written_more_than_a_pipe_holds(config)  # so it is read now, and waits for the rest
        (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(pid), signal.SIGTERM)
        os.close(descriptor)  # else it could read on before it hears the signal
        assert process.wait(90) == 143
    finally:
        process.kill()
        process.wait()


def _written_more_than_a_pipe_holds(fifo: Path) -> int:
    """Write until somebody reads, who waits for more then; the descriptor. What opens it first only looks whether it may read."""
    descriptor, left = -1, 200_000
    while left > 0:
        try:
            descriptor = os.open(fifo, os.O_WRONLY) if descriptor < 0 else descriptor
            left -= os.write(descriptor, b"#" * left)
        except BrokenPipeError:
            os.close(descriptor)
            descriptor = -1
    return descriptor


# The files agree


def test_the_image_runs_the_relay_as_a_user_and_without_a_compiler():
    base = "debian:bookworm-slim"
    build, image = stages()
    assert (build.one("FROM"), image.one("FROM")) == (f"{base} AS build", base)
    (install, *_) = image.every("RUN")
    assert re.findall(r"apt-get install -y --no-install-recommends (.*?) &&", install) == ["ca-certificates python3"]
    uid, gid = map(int, image.one("USER").split(":"))
    assert f"groupadd --gid {gid} " in install and f"useradd --uid {uid} --gid {gid} " in install
    assert f"-m 0700 -o {uid} -g {gid} {image.one('VOLUME')}" in install
    assert image.one("STOPSIGNAL") == "SIGTERM"
    assert json.loads(image.one("ENTRYPOINT")) == ["/opt/relaymta/bin/relaymta"] and json.loads(image.one("CMD")) == ["serve"]
    assert image.one("ENV").startswith("PATH=/opt/relaymta/bin:")
    assert "/opt/relaymta" in build.every("RUN")[-1] and "--from=build /opt/relaymta /opt/relaymta" in image.every("COPY")


def test_what_is_downloaded_does_not_depend_on_our_source():
    rows = stages()[0].rows
    (whole,) = [number for number, row in enumerate(rows) if row == ("COPY", ". .")]
    downloads = [number for number, (_, rest) in enumerate(rows) if "apt-get install" in rest or "-r run.txt" in rest]
    (later,) = [row[1] for row in rows[whole + 1 :]]
    assert all(number < whole for number in downloads) and len(downloads) == 2
    assert "--no-build-isolation --no-deps" in later and "--no-index" in later


def test_what_the_image_is_made_from_is_in_its_context():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*", "what is not named stays outside"
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert all((ROOT / path).exists() for path in let_in)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "setup.py", "relaymta", project["readme"], *project["license-files"]}
    for stage in stages():
        needed |= {path for copy in stage.every("COPY") if not copy.startswith("--from") for path in copy.split()[:-1]} - {"."}
    assert all(any(Path(path).is_relative_to(one) for one in let_in) for path in needed)


def test_no_file_names_a_registry():
    for path in ("Dockerfile", "compose.yaml", "config/kubernetes.yaml", f"docs/{PAGE}"):
        assert "://" not in (ROOT / path).read_text(), path
    images = {service["image"] for service in COMPOSE["services"].values()} | {CONTAINER["image"]}
    assert images == {"relaymta"} and {service["build"] for service in COMPOSE["services"].values()} == {"."}


def configured(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "relaymta.toml"
    path.write_text(text)
    return load(path, {})


def in_kubernetes() -> str:
    return str(OBJECTS["ConfigMap"]["data"]["relaymta.toml"])


def ports(config: Config) -> set[int]:
    return {int(listener.address.rpartition(":")[2]) for listener in config.listener}


def test_the_image_has_a_configuration_that_it_can_run_with(tmp_path):
    source, there = next(copy.split() for copy in IMAGE.every("COPY") if not copy.startswith("--from"))
    assert there == CONFIG_PATH
    config = configured((ROOT / source).read_text(), tmp_path)
    assert config.spool == IMAGE.one("VOLUME") and config.log.file == "-" and config.workers == 2
    assert config.metrics.listen in "".join(health_check(IMAGE)).replace("', ", ":")
    exposed = set(map(int, IMAGE.one("EXPOSE").split()))
    assert ports(config) < exposed and int(config.metrics.listen.rpartition(":")[2]) in exposed
    assert config.relay.networks == RelayTable().networks, "nobody else may relay"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_compose_is_closed(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]
    published = {int(str(port).rpartition(":")[2]) for port in service.get("ports", [])}
    assert published <= set(map(int, IMAGE.one("EXPOSE").split()))
    if "serve" in service.get("command", ["serve"]):
        assert int(service["stop_grace_period"].removesuffix("s")) > STOP_SECONDS
        assert service["healthcheck"]["test"] == ["CMD", *health_check(IMAGE)]


def test_the_relay_of_compose_keeps_its_queue(tmp_path):
    relay = COMPOSE["services"]["relay"]
    queue, configuration = relay["volumes"]
    name, path = queue.split(":")
    assert name in COMPOSE["volumes"] and path == IMAGE.one("VOLUME")
    folder, there, how = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", configuration).split(":")
    assert (ROOT / folder / Path(CONFIG_PATH).name).exists() and there == str(Path(CONFIG_PATH).parent) and how == "ro"
    assert relay["restart"] == "unless-stopped" and "profiles" not in relay


def test_the_example_for_compose_lets_containers_relay_and_not_the_gateway(tmp_path):
    (text,) = [block for block in blocks(section(PAGE, "With compose")) if "[[listener]]" in block]
    config = configured(text, tmp_path)
    (net,) = COMPOSE["networks"]["mail"]["ipam"]["config"]
    networks = [str(network) for network in config.relay.networks]
    assert networks == ["127.0.0.0/8", net["ip_range"]]
    assert ip_address(net["gateway"]) in ip_network(net["subnet"])
    assert ip_address(net["gateway"]) not in ip_network(net["ip_range"])
    assert ip_network(net["ip_range"]).subnet_of(ip_network(net["subnet"]))
    assert ports(config) == {2525}


def test_what_is_tried_with_compose_is_a_command_of_ours():
    for name in ("try", "sink"):
        verb, *options = COMPOSE["services"][name]["command"]
        known = CliRunner().invoke(main, [verb, "--help"]).output
        assert all(option in known for option in options if option.startswith("--"))


def test_the_pod_is_closed_and_has_the_images_user():
    uid, gid = map(int, IMAGE.one("USER").split(":"))
    pod = POD["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"], pod["runAsNonRoot"]) == (uid, gid, gid, True)
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    container = CONTAINER["securityContext"]
    assert container["readOnlyRootFilesystem"] and not container["allowPrivilegeEscalation"]
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is POD["enableServiceLinks"] is False


def test_the_pod_has_what_its_configuration_names(tmp_path):
    config = configured(in_kubernetes(), tmp_path)
    mounts = {one["mountPath"]: one["name"] for one in CONTAINER["volumeMounts"]}
    (claim,) = OBJECTS["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert mounts[config.spool] == claim["metadata"]["name"] and config.spool == IMAGE.one("VOLUME")
    volumes = {one["name"]: one for one in POD["volumes"]}
    assert volumes[mounts[str(Path(CONFIG_PATH).parent)]]["configMap"]["name"] == OBJECTS["ConfigMap"]["metadata"]["name"]
    (route,) = config.route
    secret = Path(route.password_file)
    mounted = volumes[mounts[str(secret.parent)]]["secret"]
    assert mounted["secretName"] == OBJECTS["Secret"]["metadata"]["name"] and secret.name in OBJECTS["Secret"]["stringData"]
    assert set(mounts.values()) == {*volumes, claim["metadata"]["name"]}, "each volume is mounted"
    assert OBJECTS["StatefulSet"]["spec"]["serviceName"] == SERVICES[0]["metadata"]["name"]


def test_the_probes_and_services_go_to_ports_of_the_relay(tmp_path):
    config = configured(in_kubernetes(), tmp_path)
    container = {one["name"]: one["containerPort"] for one in CONTAINER["ports"]}
    assert config.metrics.listen == f"0.0.0.0:{container['metrics']}", "probes come from the node"
    assert {port for name, port in container.items() if name != "metrics"} == ports(config)
    assert set(container.values()) <= set(map(int, IMAGE.one("EXPOSE").split()))
    targets = {port["targetPort"] for service in SERVICES for port in service["spec"]["ports"]}
    assert targets == set(container)
    probes = {probe: CONTAINER[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")}
    assert probes == {
        "livenessProbe": {"path": "/livez", "port": "metrics"},
        "readinessProbe": {"path": "/readyz", "port": "metrics"},
    }
    before = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > STOP_SECONDS + before


def test_all_objects_of_kubernetes_are_about_the_same_pods():
    spec = OBJECTS["StatefulSet"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"] == {"matchLabels": labels} == OBJECTS["PodDisruptionBudget"]["spec"]["selector"]
    assert all(service["spec"]["selector"] == labels for service in SERVICES)
    terms = POD["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert all(term["podAffinityTerm"]["labelSelector"] == {"matchLabels": labels} for term in terms)
    assert {service["spec"].get("type", "ClusterIP") for service in SERVICES} == {"ClusterIP"}, "a balancer may hide who sends"
    assert OBJECTS["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1 < spec["replicas"]


def test_the_page_has_every_reason_of_readyz():
    listed = re.findall(r"^\| `(\w+)` \|", section(PAGE, "Health checks"), re.M)
    assert listed == ["what", "workers", "stopping", *readiness.GAUGES]
    (example,) = [json.loads(block) for block in blocks(section(PAGE, "Health checks")) if block.startswith("{")]
    (reason,) = example["reasons"]
    assert reason["text"].startswith(readiness.GAUGES[reason["what"]][2])
