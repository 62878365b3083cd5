"""Run commands of this project on GPUs (or CPU cores) of a SLURM cluster: `python docs/slurm.py --help`.

    python docs/slurm.py --jobs 8 --gpu -- dvc repro
    python docs/slurm.py --jobs 8 --gpu --queue gpu --walltime 24:00:00 -- python -m ablations run joint_search
    python docs/slurm.py --jobs 8 --gpu --print            # only print the job file

Start it on a login node (which may call `sbatch`), in the project's environment and in the root of a checkout that has
the same path on the compute nodes. It runs the Dask scheduler and the command, and requests `--jobs` workers, each a
SLURM job that runs one training at a time. Workers are cancelled when the command ends or is stopped. A worker that
SLURM ends (time limit, preemption) is replaced, and its training resumes from the checkpoint on another one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from dask_jobqueue import SLURMCluster


def slurm_cluster(options: argparse.Namespace) -> SLURMCluster:
    """Make the cluster, without workers yet; its `job_script()` is passed to `sbatch`."""
    return SLURMCluster(
        queue=options.queue,
        account=options.account,
        walltime=options.walltime,
        cores=1,  # worker threads: one training at a time
        processes=1,
        job_cpu=options.cpus,
        memory=options.memory,
        nanny=False,  # a nanny would keep trainings from starting loader processes
        python=sys.executable,
        interface=options.interface,
        job_extra_directives=["--gres=gpu:1"] if options.gpu else [],
        job_script_prologue=[f"cd {shlex.quote(str(Path.cwd()))}", "export PYTHONPATH=. MLFLOW_DISABLE_TELEMETRY=true"],
        worker_extra_args=["--memory-limit", "0", *(["--resources", "GPU=1"] if options.gpu else [])],
        log_directory=".work/slurm",
        scheduler_options={"dashboard": False, "dashboard_address": ":0"},  # any free port, not 8787
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--jobs", type=int, default=4, help="workers, each a SLURM job; default: 4")
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    parser.add_argument("--cpus", type=int, default=4, help="CPUs per worker; default: 4")
    parser.add_argument("--memory", default="16GiB", help="memory per worker; default: 16GiB")
    parser.add_argument("--walltime", default="04:00:00", help="time limit of a worker; default: 04:00:00")
    parser.add_argument("--queue", help="SLURM partition")
    parser.add_argument("--account", help="SLURM account")
    parser.add_argument("--interface", help="network interface on which nodes reach this machine, such as ib0")
    parser.add_argument("--print", action="store_true", help="print the job file and exit")
    parser.add_argument("command", nargs="*", help="after --: the command to run")
    return parser.parse_args(arguments)


def main() -> int:
    """Start the scheduler, request workers and run the command."""
    options = parse()
    with slurm_cluster(options) as cluster:
        if options.print or not options.command:
            print(cluster.job_script())
            return 0
        Path(".work/slurm").mkdir(parents=True, exist_ok=True)
        cluster.adapt(minimum_jobs=options.jobs, maximum_jobs=options.jobs)  # replaces workers that SLURM ends
        environment = os.environ | {"DASK_SCHEDULER_ADDRESS": cluster.scheduler_address}
        signal.signal(signal.SIGINT, lambda *_: None)  # the command gets it too, and ends in its own time
        command = subprocess.Popen(options.command, env=environment)
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        return command.wait()


if __name__ == "__main__":
    sys.exit(main())
