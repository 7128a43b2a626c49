"""Start Ray on this machine, or join a cluster, and ask it for its resources.

Nothing of Ray is imported or set in the environment until `ray_started` runs.
"""

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from engine.distributed import cpu_is_chosen, usable_cpus
from search.space import Search
from utils import CHECKPOINTS, InputError, first_line

ROOT = Path(__file__).resolve().parent.parent
WORKER_TIMEOUT = 120  # seconds for a worker process to start, perhaps from a network file system
# 0 keeps Ray off the network, which is its default on Windows and macOS alone.
LISTEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}  # from a trial that uses none
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send nothing
    **HIDE_GPUS,
    "RAY_prestart_worker_first_driver": "0",  # otherwise Ray waits forever for workers that die
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # data/ and checkpoints/ are relative to this folder
    "RAY_AIR_NEW_OUTPUT": "0",  # Monitor prints instead
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the search handles signals itself
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the first report of a trial has no accuracy
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


@contextlib.contextmanager
def ray_started(search: Search) -> Iterator[None]:
    """Run Ray within the block: on this machine, or on the cluster at `search.address`.

    Raises:
        InputError: Ray is not installed or cannot start, nothing answers at the address, or a
            machine cannot run trials.
    """
    if search.address:
        check_address(search.address)
    set_environment(search.address)
    try:  # Ray reads the environment when it is imported
        import ray
        from ray import tune  # noqa: F401  # needs the extras of ray[tune]
    except ImportError as error:
        raise InputError(
            f"ray: {first_line(error.__cause__ or error)}; run"
            " `pip install -r requirements-dev.txt`"
        ) from None
    path = os.pathsep.join([str(ROOT), "${PYTHONPATH}"])  # workers import search.ray_tune
    # Those of a cluster do not inherit the environment of this process.
    of_workers = {"PYTHONPATH": path, "TPSNET_CHECKPOINTS": str(CHECKPOINTS), **HIDE_GPUS}
    of_workers["TPSNET_DEVICE"] = os.environ.get("TPSNET_DEVICE", "")
    # Ray's processes inherit the mask. A signal to the process group then reaches only this
    # process, which ends them in its own time. Ray itself protects them from Ctrl-C.
    is_posix = os.name == "posix"
    mask = is_posix and signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    try:
        ray.init(
            address=search.address or "local",
            num_cpus=None if search.address else usable_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",
            runtime_env={"env_vars": of_workers},
        )
    except Exception as error:  # Ray raises plain ones, too
        if not search.address:
            raise InputError(
                f"ray: it cannot start here ({first_line(error)}); try again when the machine is"
                " less busy, or set RAY_TMPDIR to a folder for Ray's files, instead of /tmp"
            ) from None
        raise InputError(
            f"address: no Ray cluster at {search.address!r} ({first_line(error)}); start one with"
            " `ray start --head`, or leave the option out; for a cluster with a token, set"
            " RAY_AUTH_MODE=token in the environment"
        ) from None
    finally:
        if is_posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        record_memory_kills_as_failures()
        check_workers(search.address)
        yield
    finally:
        ray.shutdown()


def set_environment(address: str) -> None:
    """Set the environment variables that Ray reads.

    Without an address, Ray listens on the loopback address only and requires a random token.
    """
    os.environ.update(SETTINGS)
    if not address:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), LISTEN: "0"}
        for name, value in token.items():
            os.environ.setdefault(name, value)


def check_address(address: str) -> None:
    """Raise InputError unless something listens at the address; Ray would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"address: nothing answers at {address!r} ({first_line(error)}); give the HOST:PORT"
            " that `ray start --head` printed, or leave the option out"
        ) from None
    if os.environ.get(LISTEN) == "0":
        raise InputError(f"address: {LISTEN} is 0 in the environment; set it to 1")


def machines() -> list[dict]:
    """Ray's description of each machine in the cluster."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def check_workers(address: str) -> None:
    """Raise InputError if a machine cannot run trials; Ray would retry forever without a word."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from search.ray_tune import folder_exists

    folder = str(Path.cwd())
    remote = ray.remote(num_cpus=0, max_retries=0)(folder_exists)
    answers = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False)
        ).remote(folder)
        for machine in machines()
    ]
    try:
        if not all(ray.get(answers, timeout=WORKER_TIMEOUT)):
            raise InputError(f"address: {folder} is missing on a machine of the cluster; mount it")
    except ray.exceptions.RayError as error:
        field = "address" if address else "ray"
        raise InputError(
            f"{field}: no worker process of Ray started within {WORKER_TIMEOUT} seconds"
            f" ({first_line(getattr(error, 'cause', error))}); try again when the machine is less"
            " busy, or see session_latest/logs in /tmp/ray, or in ray in RAY_TMPDIR or TMPDIR"
        ) from None


def trial_resources(search: Search) -> dict[str, float]:
    """The resources that Ray reserves for each trial.

    Raises:
        InputError: no machine of the cluster has them, or TPSNET_DEVICE is wrong.
    """
    found = [machine["Resources"] for machine in machines()]
    on_gpu = not cpu_is_chosen() and any(resources.get("GPU") for resources in found)
    gpus = float(on_gpu) if search.gpus_per_trial is None else search.gpus_per_trial
    for name, unit, wanted in (("cpus", "CPU", search.cpus_per_trial), ("gpus", "GPU", gpus)):
        most = max(resources.get(unit, 0) for resources in found)
        if wanted > most:
            raise InputError(
                f"{name}_per_trial: {wanted:g}, but no machine has more than {most:g}; use at most"
                f" {most:g}"
            )
    return {"cpu": search.cpus_per_trial, "gpu": gpus}


def trials_at_once(resources: dict[str, float]) -> int:
    """How many trials the whole cluster can run at a time."""
    import ray

    total = ray.cluster_resources()
    return int(min(total.get(unit.upper(), 0) / n for unit, n in resources.items() if n))


def record_memory_kills_as_failures() -> None:
    """Make Ray Tune record a trial as failed if Ray's memory monitor kills it.

    Ray Tune (2.60) treats RayActorError as the failure of one trial, but any other error, such as
    the memory monitor's OutOfMemoryError, as the end of the search. This patches a private class;
    if a version of Ray lacks it, nothing is changed.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        from ray.air.execution._internal.actor_manager import RayActorManager

        original = RayActorManager._actor_task_failed
    except (ImportError, AttributeError):
        return
    if getattr(original, "is_patched", False):
        return

    def task_failed(self: object, tracked_actor_task: object, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(self, tracked_actor_task, exception)

    task_failed.is_patched = True
    RayActorManager._actor_task_failed = task_failed
