"""A sweep by Hydra's Ray launcher on a cluster of two nodes of this machine: a job fails, and a node is killed."""

import contextlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from engines import TEXT, environment, free_ports, kill, loopback_only, pace, processes_with, saved_step, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
DEPTHS = (1, 2, 5000, 3, 4, 5, 6, 7)  # the third is refused


@pytest.fixture(scope="module", autouse=True)
def _loopback():
    with loopback_only():
        yield


@pytest.fixture
def cluster(tmp_path, tmp_path_factory):
    """Ray's two nodes with one CPU each: their address, and kill_node(i)."""
    pytest.importorskip("ray", reason="Ray is not installed: docs/sweeps.md")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed")
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "SRU_CACHE": str(tmp_path / "cache")}
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={tmp_path_factory.mktemp('r')}")
    started = []

    def kill_node(i):
        kill(*processes_with(MACHINE=f"{i}-{port}"))

    with contextlib.ExitStack() as stack:
        for i, words in enumerate((head, (f"--address={address}",))):
            out = stack.enter_context((tmp_path / f"node{i}.out").open("w"))
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--block", "--num-cpus=1"]
            command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
            variables = environment(MACHINE=f"{i}-{port}", **quiet)
            started.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=out, stderr=out))
            wait_until(lambda i=i: "Ray runtime started" in (tmp_path / f"node{i}.out").read_text(), 120, f"node {i}")
        try:
            yield address, kill_node
        finally:
            for i in (1, 0):
                kill_node(i)
                started[i].wait(20)


def test_a_job_that_fails_and_a_node_that_is_killed_stop_no_other_job(cluster, tmp_path):
    address, kill_node = cluster
    folder = tmp_path / "sweep"
    words = [word for word in TEXT if not word.startswith(("depth", "epochs"))]
    launcher = ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address={address}"]
    launcher += ["+hydra.launcher.ray.init.object_store_memory=null", "+hydra.launcher.ray.remote.num_cpus=1"]
    depths = f"depth={','.join(map(str, DEPTHS))}"
    with (tmp_path / "sweep.out").open("w+") as out:
        sweep = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "-m", depths, "epochs=3", pace(0.2), *words, *launcher,
             f"hydra.sweep.dir={folder}"],
            cwd=tmp_path, env=environment(), stdout=out, stderr=out,
        )  # fmt: skip
        try:
            # Of the first two jobs, each node runs one; both have saved, neither has ended.
            wait_until(lambda: all(saved_step(folder / str(i)) for i in (0, 1)), 300, "checkpoints of two jobs")
            assert not any((folder / f"{i}/metrics.json").exists() for i in (0, 1))
            kill_node(1)
            status = sweep.wait(600)
        finally:
            sweep.kill()
        out.seek(0)
        printed = out.read()
    assert status == 1, printed
    assert "finished 7, failed 1" in printed
    assert json.loads((folder / "2/failed.json").read_text())["overrides"][0] == "depth=5000"
    sizes = []
    for i, depth in enumerate(DEPTHS):
        if depth != 5000:
            result = json.loads((folder / f"{i}/metrics.json").read_text())
            assert result["epochs"] == 3
            assert saved_step(folder / str(i)) == 30
            sizes.append(result["encoder_parameters"])
    assert sizes == sorted(set(sizes))
    # One of the first two was on the killed node, and resumed from its checkpoint on the other.
    resumed = [i for i in (0, 1) if f"resume: {folder / str(i)}" in (folder / f"{i}/config.yaml").read_text()]
    assert len(resumed) == 1
