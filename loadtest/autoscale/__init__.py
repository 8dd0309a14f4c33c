"""Autoscaling on a clock that is only counted: KEDA, the HPA, a consumer group and pods, second by second.

Nothing here talks to a cluster. What it computes follows KEDA 2.21 and Kubernetes 1.36; the same seed gives the
same numbers.
"""
