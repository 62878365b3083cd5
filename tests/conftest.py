"""Before any test imports torch: one thread a process, since threads that wait for each other on few cores are slow."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
