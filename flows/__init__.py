"""The edge of deepwright: command line, configuration, workflow and tracking.

The only place that imports Hydra, Prefect and MLflow. What teaches, measures or serves a model is in packages/.
"""
