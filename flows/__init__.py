"""The workflow around the packages: Hydra composes, Prefect runs, MLflow remembers."""
