"""A Kubernetes cluster: what is asked of it, and what its objects' states mean."""
