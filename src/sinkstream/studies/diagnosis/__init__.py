"""Diagnosis: why a policy's quality differs from strict streaming's, from run records and nothing else."""
