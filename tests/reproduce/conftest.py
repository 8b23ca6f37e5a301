from tests.sweeps.slurm import cluster

__all__ = ["cluster"]
