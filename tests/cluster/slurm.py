"""A real SLURM for tests: munged, slurmctld and two slurmd of this machine, on loopback only."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from engines import environment, free_ports, kill, parent_of, processes_with, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# The second option is also the time from a requeue to the next start. It must be longer than KillWait: until then an
# old srun signals the step, and that of the restarted job has the same number.
AuthInfo=socket={folder}/munge.socket,cred_expire=30
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SlurmdParameters=config_overrides
SlurmctldTimeout=30
# A node that is silent for so long is lost.
SlurmdTimeout=15
KillWait=20
InactiveLimit=0
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """The daemons, their configuration in `folder`, and the commands."""

    def __init__(self, folder: Path) -> None:
        if missing := [name for name in DAEMONS if not shutil.which(name)]:
            pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
        if os.geteuid():
            pytest.skip("slurmd runs the jobs of a user only as root")
        self.folder, self.daemons = folder, dict[str, subprocess.Popen[bytes]]()
        (folder / "state").mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=free_ports(3)))
        # The names of the nodes have no addresses, but those of a real cluster have.
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), MASTER_ADDR="127.0.0.1")

    def __enter__(self) -> "Slurm":
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        places = ("munge.socket", "munge.key", "munge.pid", "munge.log", "munge.seed")
        options = [f"--{name}={self.folder / place}" for name, place in zip(names, places, strict=True)]
        self.start("munged", "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, 20, "the socket of munged")
        self.start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs():
            self("scancel", "--signal=KILL", "--full", job)
            self("scancel", job)
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(20)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
        kill(*processes_with(SLURM_CONF=self.environment["SLURM_CONF"]))

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)
        wait_until(lambda: self("sinfo", "-h", "-n", name, "-o", "%t").strip() in ("idle", "mix", "alloc"), 60, name)

    def kill_node(self, name: str) -> None:
        """Ends the daemon of a node, and all that it started there, at once."""
        tasks = processes_with(SLURM_CONF=self.environment["SLURM_CONF"], SLURMD_NODENAME=name)
        steps = {parent for parent in map(parent_of, tasks) if parent not in tasks and parent > 1}
        self.daemons[name].kill()
        kill(*steps, *tasks)
        self.daemons[name].wait()

    def __call__(self, *command: str, within: float = 60) -> str:
        """The output of a command; empty if it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=within
        )
        return done.stdout

    def jobs(self) -> list[str]:
        return self("squeue", "-h", "-o", "%i").split()

    def submit(self, script: str) -> str:
        path = self.folder / f"{time.monotonic_ns()}.sh"
        path.write_text(script)
        output = f"--output={self.folder}/job-%j.out"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--chdir={ROOT}", output, "--open-mode=append", str(path)],
            env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(done.stdout.strip())

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self("scontrol", "-o", "show", "job", number)))

    def wait(self, number: str, within: float, *states: str) -> dict[str, str]:
        """Waits until a job is in one of the states, by default at an end; the message of an error has the logs."""
        states = states or ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        try:
            wait_until(lambda: self.job(number).get("JobState") in states, within, f"{states}")
        except AssertionError as error:
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.out"))
            raise AssertionError(f"{error}\n{json.dumps(self.job(number), indent=1)}\n{logs}") from None
        return self.job(number)

    def output(self, number: str) -> str:
        return (self.folder / f"job-{number}.out").read_text()
