from tests.sweeps.slurm import cluster, two_nodes

__all__ = ["cluster", "two_nodes"]
