"""What each launcher says in the environment, and that a process joins the others or is refused."""

from __future__ import annotations

import os
from typing import Any

import jax
import pytest
from jax._src import distributed

from tests.support.host_processes import Host, free_port
from tortoise_jax import launchers, parallel
from tortoise_jax.errors import UserError

SLURM = {"SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
TPU_CLUSTER = "jax._src.clusters.cloud_tpu_cluster"
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}


def srun(tasks: int) -> dict[str, str]:
    return SLURM | {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_TASKS": str(tasks)}


@pytest.mark.parametrize(
    ("environment", "by", "count"),
    [
        (srun(4), "SLURM (SLURM_NTASKS=4)", 4),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI (OMPI_COMM_WORLD_SIZE=3)", 3),
        # mpirun inside an allocation of SLURM: srun started one process or none, mpirun the others.
        (SLURM | {"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI (OMPI_COMM_WORLD_SIZE=4)", 4),
        (TPU, "a TPU pod (TPU_WORKER_HOSTNAMES=10.0.0.1,10.0.0.2)", 2),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, "a TPU pod (TPU_PROCESS_ADDRESSES=a:1,b:1,c:1)", 3),
        (
            TPU | {"MEGASCALE_NUM_SLICES": "2"},
            "a TPU pod (TPU_WORKER_HOSTNAMES=10.0.0.1,10.0.0.2, MEGASCALE_NUM_SLICES=2)",
            4,
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            "a Kubernetes job (JOB_COMPLETION_INDEX=1)",
            0,
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS=a:1", 0),
    ],
)
def test_several_workers_are_found(environment: dict[str, str], by: str, count: int) -> None:
    found = launchers.announced(environment)
    assert found is not None
    assert (found.by, found.count) == (by, count)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        srun(1),
        SLURM,  # an allocation without a number of tasks
        {"SLURM_NTASKS": "4"},  # left over, outside any job
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod that is no part of an indexed job
    ],
)
def test_one_worker_is_a_process_alone(environment: dict[str, str]) -> None:
    assert launchers.announced(environment) is None


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "SLURM_STEP_NUM_TASKS is not set"),  # salloc's shell, or a batch script
        ({"SLURM_STEP_NUM_TASKS": "1"}, "SLURM_STEP_NUM_TASKS=1"),  # an interactive step
    ],
)
def test_an_allocation_of_several_tasks_without_srun_is_refused(more: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError) as error:
        launchers.announced(SLURM | {"SLURM_NTASKS": "4"} | more)
    assert str(error.value) == (
        f"SLURM_NTASKS=4 announces 4 tasks, but srun did not start this process as one of them ({reason}): "
        "start the command with srun; for one process alone give --num_processes 1"
    )


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=two: expected a whole number"):
        launchers.announced({"OMPI_COMM_WORLD_SIZE": "two"})


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("announced", "remedy"),
    [
        # Each lacks what JAX needs to find the coordinator: joining fails before anything is sent.
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK"),  # Open MPI 5
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, "give --coordinator HOST:PORT"),
        (TPU, r"is jax\[tpu\] installed"),
    ],
)
def test_workers_that_jax_does_not_find_are_refused(
    environment: pytest.MonkeyPatch, announced: dict[str, str], remedy: str
) -> None:
    monkeypatch = environment
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    for name, value in announced.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"could not join the other hosts: .*{remedy}.*--num_processes 1") as error:
        parallel.initialize()
    assert "\n" not in str(error.value)
    parallel.initialize(num_processes=1)  # on purpose


def test_fewer_processes_than_announced_are_refused(environment: pytest.MonkeyPatch) -> None:
    def join(by: str, *coordinates: Any) -> None:
        environment.setattr(distributed.global_state, "num_processes", 1)

    environment.setattr(parallel, "join", join)
    environment.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE=2.: 2 processes are announced, but JAX joined 1"):
        parallel.initialize()


def test_a_kubernetes_job_asks_jax(environment: pytest.MonkeyPatch) -> None:
    """Whose detection needs a cluster: here only that it is asked, with the limits, and without coordinates."""
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def initialize(*coordinates: Any, **limits: Any) -> None:
        asked.append((coordinates, limits))
        raise RuntimeError("Retry failed with all attempts exhausted\nand more")

    environment.setattr(jax.distributed, "initialize", initialize)
    environment.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    environment.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError) as error:
        parallel.initialize()
    assert str(error.value).startswith(
        "a Kubernetes job (JOB_COMPLETION_INDEX=1): could not join the other hosts: "
        "Retry failed with all attempts exhausted; is jax[k8s] installed?"
    )
    [(coordinates, limits)] = asked
    assert coordinates == (None, None, None)
    assert limits["heartbeat_timeout_seconds"] == parallel.LOST_SECONDS == 100
    assert limits["initialization_timeout"] > parallel.JOIN_SECONDS == 300


@pytest.mark.parametrize("workers", ["10.0.0.1,10.0.0.2", "a:0:10.0.0.1,b:1:10.0.0.2", "10.0.0.1"])
def test_a_tpu_machine_asks_its_metadata_server(environment: pytest.MonkeyPatch, workers: str) -> None:
    answers = {"agent-worker-number": "1", "worker-network-endpoints": workers, "tpu-env": ""}
    environment.setattr(f"{TPU_CLUSTER}.running_in_cloud_tpu_vm", True)
    environment.setattr(f"{TPU_CLUSTER}.get_metadata", lambda key: (answers[key], 200))
    found = parallel.tpu_machine()
    if "," in workers:
        assert found == launchers.Announced("the TPU machine's metadata (2 workers)", 2, launchers.BY_HAND)
    else:
        assert found is None
    environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")  # the environment goes first
    assert parallel.tpu_machine() is None


def test_a_silent_metadata_server_is_one_line(environment: pytest.MonkeyPatch) -> None:
    def unreachable(key: str) -> tuple[str, int]:
        raise OSError("Max retries exceeded")

    environment.setattr(f"{TPU_CLUSTER}.running_in_cloud_tpu_vm", True)
    environment.setattr(f"{TPU_CLUSTER}.get_metadata", unreachable)
    with pytest.raises(UserError, match=r"metadata server does not say .*Max retries.*give --coordinator.*--num_proc"):
        parallel.initialize()


@pytest.mark.parametrize("launcher", ["slurm", "open_mpi"])
def test_started_by_a_launcher_processes_join(launcher: str) -> None:
    """JAX's own detection, from the variables a launcher sets, on this machine."""
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    if launcher == "slurm":
        environments = [srun(2) | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    else:
        world = OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "2"}
        environments = [
            world | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(2)
        ]
    both = [Host("nothing", **(port | environment)) for environment in environments]
    assert [host.end() for host in both] == [0, 0]
    assert [host.lines for host in both] == [["joined 2", "ended"]] * 2


@pytest.mark.parametrize(("per_node", "cards"), [("1(x2)", ["all", "all"]), ("2", ["0", "1"])])
def test_a_process_alone_on_its_machine_has_all_its_cards(per_node: str, cards: list[str]) -> None:
    """Under SLURM JAX gives every process one card, which leaves the others idle where a node has one process."""
    port = {"JAX_COORDINATOR_PORT": str(free_port()), "SLURM_STEP_TASKS_PER_NODE": per_node}
    where = [("0", str(i)) if per_node == "2" else (str(i), "0") for i in range(2)]
    environments = [
        srun(2) | {"SLURM_PROCID": str(i), "SLURM_NODEID": node, "SLURM_LOCALID": local}
        for i, (node, local) in enumerate(where)
    ]
    both = [Host("cards", **(port | environment)) for environment in environments]
    assert [host.end() for host in both] == [0, 0]
    assert [host.lines for host in both] == [["joined 2", f"cards: {card}", "ended"] for card in cards]


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),1", "SLURM_NODEID": "2"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),1", "SLURM_NODEID": "3"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),1", "SLURM_NODEID": "4"}, False),
    ],
)
def test_processes_of_one_machine_are_counted(environment: dict[str, str], alone: bool) -> None:
    assert launchers.alone_on_its_machine(environment) == alone
