"""Manifests for Kubernetes and a Dockerfile, made from a run's config."""
