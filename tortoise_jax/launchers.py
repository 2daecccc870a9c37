"""What the environment says about the other processes of a run: TPU pods, SLURM, Open MPI, Kubernetes.

JAX finds the coordinator and the process's index by the same variables (`jax/_src/clusters`). What it does not find, it
takes for a process alone: N workers would train N times, in one folder. So the variables are read here first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from tortoise_jax.errors import UserError

ALONE = "for one process alone give --num_processes 1"
TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
BY_HAND = "give --coordinator HOST:PORT, --num_processes N and --process_id I"


@dataclasses.dataclass(frozen=True)
class Announced:
    """Several workers: `count` is 0 where only JAX can find out how many."""

    by: str
    count: int
    remedy: str


def announced(environment: Mapping[str, str]) -> Announced | None:
    """The workers this process is one of; None where the environment names one or none. In JAX's own order."""
    for read in (open_mpi, slurm, tpu_pod, kubernetes, coordinator):
        found = read(environment)
        if found is not None and found.count != 1:
            return found
    return None


def open_mpi(environment: Mapping[str, str]) -> Announced | None:
    size = whole(environment, "OMPI_COMM_WORLD_SIZE")
    by_hand = f"{BY_HAND}: $OMPI_COMM_WORLD_SIZE and $OMPI_COMM_WORLD_RANK hold the last two"
    # Open MPI 5 no longer sets the variable that JAX takes the coordinator's address from.
    return Announced(f"Open MPI (OMPI_COMM_WORLD_SIZE={size})", size, by_hand) if size else None


def slurm(environment: Mapping[str, str]) -> Announced | None:
    """A task of `srun`. A shell or batch script in an allocation of several tasks is refused: only srun starts all."""
    if "SLURM_JOB_ID" not in environment:
        return None
    tasks, step = whole(environment, "SLURM_NTASKS"), whole(environment, "SLURM_STEP_NUM_TASKS")
    if tasks > 1 and step != tasks:
        started = f"SLURM_STEP_NUM_TASKS={step}" if step else "SLURM_STEP_NUM_TASKS is not set"
        raise UserError(
            f"SLURM_NTASKS={tasks} announces {tasks} tasks, but srun did not start this process as one of them "
            f"({started}): start the command with srun; {ALONE}"
        )
    count = max(tasks, step)
    return Announced(f"SLURM (SLURM_NTASKS={count})", count, BY_HAND) if count else None


def alone_on_its_machine(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started one process on this machine, which then has all its cards."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return whole(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    nodes = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # "8(x3),2"
    tasks = [int(count) for count, times in nodes for _ in range(int(times or 1))]
    node = whole(environment, "SLURM_NODEID")
    return node < len(tasks) and tasks[node] == 1


def tpu_pod(environment: Mapping[str, str]) -> Announced | None:
    """A TPU slice or several; where these variables are missing, JAX asks the TPU machine's metadata server."""
    for name in TPU_WORKERS:
        if workers := environment.get(name):
            slices = whole(environment, "MEGASCALE_NUM_SLICES") or 1
            count = len(workers.split(",")) * slices
            by = f"a TPU pod ({name}={workers}{f', MEGASCALE_NUM_SLICES={slices}' if slices > 1 else ''})"
            return Announced(by, count, f"is jax[tpu] installed, and TPU_WORKER_ID set? Else {BY_HAND}")
    return None


def kubernetes(environment: Mapping[str, str]) -> Announced | None:
    """A pod of an indexed job; how many there are only the cluster knows."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    by = f"a Kubernetes job (JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']})"
    return Announced(by, 0, f"is jax[k8s] installed? Else {BY_HAND}")


def coordinator(environment: Mapping[str, str]) -> Announced | None:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    return Announced(f"JAX_COORDINATOR_ADDRESS={address}", 0, BY_HAND) if address else None


def whole(environment: Mapping[str, str], name: str) -> int:
    """A variable that holds a whole number, 0 where it is not set."""
    value = environment.get(name) or "0"
    if not value.isdecimal():
        raise UserError(f"{name}={value}: expected a whole number")
    return int(value)
